"""The small operations of a layer, each in one kernel: norms, rotary positions, gates.

transformers computes them in 26 kernels a layer, which take about as long as the matmuls of a step.

layers.py   modules that use these operations in place of transformers' own
plain.py    the operations in torch, as transformers computes them
kernels.py  the same as Triton kernels
rule.py     the kernels on a GPU where they work
"""
