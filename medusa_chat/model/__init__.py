"""Backbones and Medusa heads: loaded, attended to, laid out for a device.

loading.py    a ModelSpec becomes a backbone, heads and a tokenizer
pretrained.py transformers' own model and tokenizer of a spec
weight_files.py, finite.py      damaged files of weights, and NaN, are found and named
config_values.py  values of a config that no step computes with
native_weights.py  a model packed for the native step
backbone.py   a transformers model that runs tree nodes after a cached text
heads.py      Medusa heads, for training and for decoding
head_vocabulary.py, parent_bias.py  the tokens that heads rank; a bias by the token before
logits.py     what some families do to the logits of their LM head
positions.py  how many positions a model takes, and their encoding
cache.py      keys and values of one text, whose rows can be dropped again
templates.py  messages become a prompt
rendering.py  chat templates rendered with limits
attention/    tree attention, its masks and its kernel
fused/        norms, gates and rotary positions, each as one kernel
linear/       joined, packed and quantized linear layers
layouts/      files of heads in every public layout
"""
