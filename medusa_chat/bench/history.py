"""Time to the first token of a second turn, by the length of the conversation before it."""

from __future__ import annotations

import random
import time
from contextlib import closing
from statistics import median
from typing import TYPE_CHECKING, Any

from medusa_chat.config import UserError
from medusa_chat.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medusa_chat.bench.job import Tick
    from medusa_chat.decoding.engine import Engine

NEW_TOKENS = 32  # of the second turn
REPLY_TOKENS = 8  # reserved for the reply whose first step is timed


def check_histories(engine: Engine, lengths: Sequence[int]) -> None:
    """Raise UserError for a history that leaves no space for a second turn."""
    for length in lengths:
        if length + NEW_TOKENS + REPLY_TOKENS > engine.context:
            raise UserError(
                f"a history of {length} tokens and a turn of {NEW_TOKENS} do not fit the"
                f" {engine.context} tokens of {engine.name}; --shape llama-1b is a random model"
                " that holds them"
            )


def measure_history(
    engine: Engine, lengths: Sequence[int], rounds: int, tick: Tick
) -> list[dict[str, Any]]:
    """Time a second turn of NEW_TOKENS after histories of each length.

    Returns:
        For each length {"history", "new_tokens", "prefilled", "kept_ms", "anew_ms"}: the median
        time from the call to the first tokens, with the cache kept and with all prefilled anew.
    """
    check_histories(engine, lengths)
    # Random ids: the time does not depend on the text.
    ids = random.Random(0).choices(range(engine.backbone.vocabulary), k=max(lengths) + NEW_TOKENS)
    found = []
    for done, length in enumerate(lengths, 1):
        found.append(_measure_one(engine, ids[:length], ids[-NEW_TOKENS:], rounds))
        tick(done, len(lengths))
    engine.forget()
    return found


def _measure_one(
    engine: Engine, history: list[int], turn: list[int], rounds: int
) -> dict[str, Any]:
    kept: list[float] = []
    anew: list[float] = []
    for _ in range(rounds):
        engine.forget()
        _first_token_seconds(engine, history)
        kept.append(_first_token_seconds(engine, history + turn))
        prefilled = engine.prefilled
        engine.forget()
        anew.append(_first_token_seconds(engine, history + turn))
    return {
        "history": len(history),
        "new_tokens": NEW_TOKENS,
        "prefilled": prefilled,
        "kept_ms": round(1000 * median(kept), 3),
        "anew_ms": round(1000 * median(anew), 3),
    }


def _first_token_seconds(engine: Engine, ids: list[int]) -> float:
    """Seconds until the first step of a reply. The reply ends with it."""
    mode = "greedy" if engine.heads else "vanilla"
    sampling = Sampling(max_new_tokens=REPLY_TOKENS, ignore_eos=True).with_value("mode", mode)
    started = time.perf_counter()
    with closing(engine.generate(ids, sampling)) as steps:
        next(steps)
        return time.perf_counter() - started
