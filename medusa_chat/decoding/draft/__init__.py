"""Draft: the candidate nodes that a step verifies.

base       Draft, and the sizes that drafts share
fixed      the same nodes at every step
dynamic    the likeliest nodes of each step
selection  how those are selected on the device
filling    the guesses of a tree's nodes
ranking    the order of a head's candidates behind a node: parent bias, noise, calibration
guesses    the heads' guesses, as the host reads them
copies     guesses copied from the conversation
"""
