"""Decoding: a prompt becomes a stream of Steps.

engine      one conversation: text, cache, replies
runner      prefill and steps over one text
eager       the step, operation by operation
fast        chooses a faster step, if there is one
native_step the step in one call of the native library
native_choice  a draft's nodes as that step chooses them
native_texts  many texts at once on the native step
state       model, cache and last hidden state, as every step uses them
report      StepInput and StepReport: the numbers that enter and leave a step
acceptance  the rules: greedy, typical, exact
numbers     the numbers of a sampling, as the rules read them
penalties   penalties on tokens that the text holds, for each node along its path
noise       keyed Gumbel noise
reply       ids to text, stop strings, limits
loop        notices a reply that repeats itself
warming     steps before the first reply, which count for nothing
draft/      the candidate nodes of a step
graphs/     steps that are recorded and replayed
trees/      trees, how they are chosen, and the policy
"""
