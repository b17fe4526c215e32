"""Train Medusa heads, calibrate them, and make the text that they learn from.

data.py            documents, their tokens and targets, packed rows
packed_states.py   hidden states of packed rows
kept_states.py     hidden states of a frozen backbone, kept on the disk
reference.py       the backbone's own distribution, by its likeliest tokens
losses.py          the loss of all heads
guesses.py         one head's rows, targets and LM head
objectives.py      losses towards the backbone's own distribution
entropy.py         cross entropy, and the loss of a trained backbone
scoring.py         a loss over a large vocabulary, with its gradient
lm_heads.py        LM heads as the losses need them
schedules.py       learning rates and the weight of the heads' loss over a run
starting.py        the heads that a run begins with
trainee.py         a backbone with its heads, and the loss of a batch
optimization.py    transformers' Trainer with two learning rates and a guard against NaN
trainer.py         `medusa-chat train`: a run from its data to its files
progress.py        progress and log of a run
stopping.py        checkpoints on a signal, and by time
checkpoints.py     begin, resume and fail
outputs.py         the files that a run leaves
evaluate.py        perplexity of a backbone
memory.py          memory that training and answering need
distillation.py    `medusa-chat distill`: the model answers prompts
questions.py       DistillJob, and what its answerers take and give
conversations.py   conversations of distill, and resuming in their file
invention.py       user turns that the model invents
local_model.py     answers of a model on this machine
server.py          answers of a model behind an HTTP server
calibration.py     `medusa-chat calibrate`: accuracies of the heads, and the check of a forecast
observations.py    replies with all that the heads guessed along them
confidence.py      calibration of the heads' probabilities, for dynamic trees
bundled.py         the recipe of the bundled backbone
stories.py         fairy tales for it
"""
