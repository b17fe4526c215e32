"""Steps that are recorded once and replayed.

static_step  the step over buffers that never move
programs     the parts of such a step, and the buffers between them
capture      records them as CUDA graphs
"""
