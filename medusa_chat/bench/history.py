"""Time to the first token of a second turn, by the length of the conversation before it."""

from __future__ import annotations

import random
import time
from contextlib import closing
from statistics import median
from typing import TYPE_CHECKING, Any

from medusa_chat.config import Sampling, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medusa_chat.bench.plan import Tick
    from medusa_chat.decoding.engine import Engine

NEW_TOKENS = 32  # of the second turn
REPLY_TOKENS = 8  # room for the reply whose first step is timed


def check_histories(engine: Engine, lengths: Sequence[int]) -> None:
    """Raise UserError for a history that leaves no room for a turn behind it."""
    for length in lengths:
        if length + NEW_TOKENS + REPLY_TOKENS > engine.context:
            raise UserError(
                f"a history of {length} tokens and a turn of {NEW_TOKENS} do not fit the {engine.context} tokens of"
                f" {engine.name}; --shape llama-1b is a random model that holds them"
            )


def measure_history(
    engine: Engine, lengths: Sequence[int], rounds: int, tick: Tick
) -> list[dict[str, Any]]:
    """A second turn of NEW_TOKENS behind histories of each length: with the cache kept, and with all prefilled anew.

    Returns:
        for each length {"history", "new_tokens", "prefilled", "kept_ms", "anew_ms"}: medians of the time from the call
        to the first step's tokens.
    """
    check_histories(engine, lengths)
    # Random ids: what the text says makes no difference to the time, and no tokenizer limits its length.
    ids = random.Random(0).choices(range(engine.backbone.vocabulary), k=max(lengths) + NEW_TOKENS)
    found: list[dict[str, Any]] = []
    for done, length in enumerate(lengths, 1):
        history, whole = ids[:length], ids[:length] + ids[-NEW_TOKENS:]
        kept, anew, prefilled = [], [], 0
        for _ in range(rounds):
            engine.forget()
            _first_token(engine, history)
            kept.append(_first_token(engine, whole))
            prefilled = engine.prefilled
            engine.forget()
            anew.append(_first_token(engine, whole))
        found.append(
            {
                "history": length,
                "new_tokens": NEW_TOKENS,
                "prefilled": prefilled,
                "kept_ms": round(1000 * median(kept), 3),
                "anew_ms": round(1000 * median(anew), 3),
            }
        )
        tick(done, len(lengths))
    engine.forget()
    return found


def _first_token(engine: Engine, ids: list[int]) -> float:
    """Seconds until the first step of a reply is there; the reply ends with it."""
    sampling = Sampling(
        mode="greedy" if engine.heads else "vanilla", max_new_tokens=REPLY_TOKENS, ignore_eos=True
    )
    started = time.perf_counter()
    with closing(engine.generate(ids, sampling)) as steps:
        next(steps)
        return time.perf_counter() - started
