"""Steps that are recorded once and replayed.

static_step  the step over buffers that never move
programs     the parts of such a step, and the buffers between them
timer        waits for steps on a GPU
capture      records them as CUDA graphs
"""
