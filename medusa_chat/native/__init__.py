"""The decoding step on a CPU in one native call.

build.py       compiles source/ into a library; build_hook.py does so when pip installs
library.py     the library as ctypes sees it, or why it is not there
families.py    which backbones it runs
weights.py     packs linear layers; model.py describes a backbone and heads with them
step.py        runs steps: prefill, vanilla, trees
source/        step.h and matmul.h say what the C files do
"""
