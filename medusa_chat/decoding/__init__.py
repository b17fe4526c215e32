"""Decoding: a prompt becomes a stream of Steps.

engine      one conversation: text, cache, replies
runner      prefill and steps over one text
eager       the step, operation by operation
fast        chooses a faster step, if there is one
native_step the step in one call of the native library
native_texts  many texts at once on the native step
state       model, cache and last hidden state, as every step uses them
report      StepInput and StepReport: the numbers that enter and leave a step
acceptance  the rules: greedy, typical, exact
noise       keyed Gumbel noise
reply       ids to text, stop strings, limits
draft/      the candidate nodes of a step
graphs/     steps that are recorded and replayed
trees/      trees, how they are chosen, and the policy
"""
