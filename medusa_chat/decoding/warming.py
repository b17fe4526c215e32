"""Steps that are taken before anybody waits for them."""

from __future__ import annotations

from contextlib import closing
from time import perf_counter as clock
from typing import TYPE_CHECKING

from medusa_chat.decoding.trees.policy import VANILLA
from medusa_chat.sampling import Sampling

if TYPE_CHECKING:
    from medusa_chat.decoding.engine import Engine
    from medusa_chat.sampling import Mode

PROMPT = [0] * 16
STEPS = 16
SECONDS = 0.1  # after which no further step is taken: a slow model takes one


def warm_up(engine: Engine) -> None:
    """Take a few steps of a reply that is thrown away; the engine's text must be empty.

    The first steps of a process load code and touch the weights. With the bundled model they take
    up to ten times as long as later ones, which would count in the first reply's speedup.
    """
    trees = engine.trees
    mode: Mode = "vanilla" if trees.current is VANILLA else "greedy"
    sampling = Sampling(mode, max_new_tokens=engine.context, ignore_eos=True)
    started = clock()
    engine.trees = trees.separate()  # it learns nothing from such a text
    try:
        with closing(engine.generate(PROMPT[: engine.context - 1], sampling)) as steps:
            for _, _ in zip(range(STEPS), steps, strict=False):
                if clock() - started > SECONDS:
                    break
    finally:
        engine.forget()
        engine.trees = trees
        engine.prefilled, engine.prefill_seconds = 0, 0.0
