"""Draft: the candidate nodes that a step verifies.

base       Draft, and the sizes that drafts share
fixed      the same nodes at every step
dynamic    the likeliest nodes of each step
selection  how those are selected on the device
copies     guesses copied from the conversation
"""
