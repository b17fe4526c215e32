"""`medusa-chat bench` and `medusa-chat verify`: measure a model on this machine and check its text.

job.py            BenchJob: the prompts, modes and lengths to measure
run.py            all measurements of one model, and their result
replies.py        replies to the prompts in every way of decoding
figures.py        figures of those replies: medians over rounds
steps.py          cost of a step by its nodes, and the tree that follows
parts.py          time of a step, part by part
host.py           time that the device waits for the host between captured steps
history.py        time to the first token of a second turn
attention.py      time of a layer's attention on a GPU
bandwidth.py      bytes that a step reads, and the machine's limit
twin.py           captured steps compared with eager ones, and a GPU with the CPU
peers.py          other decoders of the same weights
random_engine.py  an engine over random weights of a known shape
random_model.py   those weights, in memory or as a checkpoint
verification.py   compare every mode with vanilla decoding
near_ties.py      tell a near-tie of two tokens from a fault
prompts.jsonl     the prompts that are used unless others are named
"""
