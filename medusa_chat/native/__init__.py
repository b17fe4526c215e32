"""The decoding step on a CPU in one native call.

build.py       compiles source/ into a library; build_hook.py does so when pip installs
library.py     the library as ctypes sees it, or the reason why it is missing
structures.py  the library's structures
takes.py       the parts of a model and its cache that the step reads
families.py    the backbones that it runs
weights.py     packs linear layers; model.py describes a backbone and heads with them
kept.py        packed matrices in the cache folder
packed.py      a whole backbone packed, with the threads that run it
step.py        runs steps: prefill, vanilla, trees
rows.py        the rows of a step: a fixed tree's, or what they are chosen from
rules.py       decides them where rounding cannot matter
source/        the C files; step.h and matmul.h describe them
"""
