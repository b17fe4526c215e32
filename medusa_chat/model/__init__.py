"""Backbones and Medusa heads: loaded, attended to, laid out for a device.

loading.py    a ModelSpec becomes a backbone, heads and a tokenizer
pretrained.py transformers' own model and tokenizer of a spec
backbone.py   a transformers model that runs tree nodes after a cached text
heads.py      Medusa heads, for training and for decoding
cache.py      keys and values of one text, whose rows can be dropped again
templates.py  messages become a prompt
attention/    tree attention, its masks and its kernel
linear/       joined, packed and quantized linear layers
layouts/      files of heads in every public layout
"""
