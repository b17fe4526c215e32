"""Candidate trees: which tree a step verifies, and why.

tree       Tree and DynamicTree, released trees and tree files
accuracy   how often the heads are right: figures and their file
growth     grow trees from such figures
costs      measure step costs and keep them on disk
bookkeeping  time of a step beside its forward
choice     the fastest tree for these costs and figures
policy     what each step verifies: a tree, copies or the root alone
pause      pause heads that make decoding slower
tracker    learn from the tokens that followed the guesses
copy_gain  tokens that copies add to trees of every size
fading     counts in which older steps count less
control    switch trees, copies and accuracies of an engine
"""
