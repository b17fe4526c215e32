"""Steps that are recorded once and replayed.

static_step  the step over buffers that never move
capture      records it as CUDA graphs
"""
