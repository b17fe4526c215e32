"""The fast step against its slow twin: same tokens, and what the fast one brings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from medusa_chat.config import MODES, Sampling
from medusa_chat.decoding.engine import Engine
from medusa_chat.decoding.runner import Runner

TOKENS = 64


def compare_with_eager(engine: Engine, prompts: list[list[int]]) -> dict[str, Any]:
    """Decode the prompts in all four modes with the engine's runner and with an eager one.

    Returns:
        {mode: {"replies", "equal", "tokens_per_second", "eager_tokens_per_second"}}
    """
    fast = engine.runner
    eager = Runner(fast.backbone, fast.heads, fast.cache.capacity, fast.accuracy, eager=True)
    found: dict[str, Any] = {}
    for mode in MODES if engine.heads else MODES[-1:]:
        sampling = replace(Sampling(), mode=mode, max_new_tokens=TOKENS, ignore_eos=True)
        replies, rates = {}, {}
        for name, runner in (("captured", fast), ("eager", eager)):
            engine.forget()
            engine.runner = runner
            try:
                replies[name], rates[name] = _replies(engine, prompts, sampling)
            finally:
                engine.forget()
                engine.runner = fast
        pairs = list(zip(replies["captured"], replies["eager"], strict=True))
        found[mode] = {
            "replies": len(pairs), "equal": sum(a == b for a, b in pairs),
            "tokens_per_second": rates["captured"], "eager_tokens_per_second": rates["eager"],
        }  # fmt: skip
    return found


def _replies(engine: Engine, prompts: list[list[int]], sampling: Sampling) -> tuple[list[list[int]], float]:
    """Ids of each reply, and tokens/s over all but the first, which warms up."""
    ids, tokens, seconds = [], 0, 0.0
    for number, prompt in enumerate([prompts[0], *prompts]):
        engine.forget()
        steps = list(engine.generate(prompt, sampling))
        if number:
            ids.append([token.id for step in steps for token in step.tokens])
            tokens, seconds = tokens + len(ids[-1]), seconds + sum(step.seconds for step in steps)
    return ids, round(tokens / seconds, 2) if seconds else 0.0
