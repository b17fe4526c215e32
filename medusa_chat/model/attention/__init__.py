"""Tree attention: every node of a step attends to the cached text and to its own ancestors.

tree_attention.py  the attention function that transformers calls, the masks, the reference in torch
kernel.py          the same over a fixed span of the cache, as a Triton kernel
rule.py            the kernel where it works, else torch
"""
