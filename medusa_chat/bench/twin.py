"""The fast step against its slow twins: the same tokens as the eager step's and as the CPU's, and what it brings."""

from __future__ import annotations

from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from medusa_chat.config import MAX_NODES, MODES, Sampling
from medusa_chat.decoding.runner import Runner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from medusa_chat.decoding.engine import Engine

TOKENS = 64  # of a reply
# What both sides of a comparison verify: left to themselves they might choose different trees, and a typical reply
# depends on its tree.
TREE = "static-32"

Figures = dict[str, Any]
Ids = list[list[int]]


def compare_with_eager(engine: Engine, prompts: Ids) -> Figures:
    """Decode the prompts in all four modes with the engine's runner and with an eager one, over TREE.

    Returns:
        {mode: {"replies", "equal", "agreed", "tokens_per_second", "eager_tokens_per_second"}}; see `agreement`.
    """
    fast = engine.runner
    capacity = min(
        fast.cache.capacity, max(map(len, prompts)) + TOKENS + MAX_NODES
    )  # no second cache of full size
    eager = Runner(fast.backbone, fast.heads, capacity, fast.accuracy, eager=True)
    found: Figures = {}
    with same_tree(engine):
        for sampling in _samplings(engine):
            ours, rate = _replies_of(fast, engine, prompts, sampling)
            theirs, eager_rate = _replies_of(eager, engine, prompts, sampling)
            rates = {"tokens_per_second": rate, "eager_tokens_per_second": eager_rate}
            found[sampling.mode] = agreement(ours, theirs) | rates
    return found


def compare_in_float32(load: Callable[..., Engine], conversations: Sequence[Any]) -> Figures:
    """A model in float32 on its device against the same on the CPU, and its captured steps against eager ones.

    In 16 bits near-ties part texts that are computed in another order; in float32 they have to be equal.

    Args:
        load: takes what `medusa_chat.load` takes, in place of what the flags say.

    Returns:
        {"tree", "cpu": {mode: {"replies", "equal", "agreed"}}, "eager": as `compare_with_eager` has it}
    """
    plain = {"dtype": "float32", "quant": "none", "quant_heads": "none", "tree": "chain-1"}
    engine, on_cpu = load(**plain), load(**plain, device="cpu")
    prompts = [engine.encode(conversation) for conversation in conversations]
    with same_tree(engine), same_tree(on_cpu):
        found = {
            sampling.mode: agreement(
                *(_replies(each, prompts, sampling)[0] for each in (engine, on_cpu))
            )
            for sampling in _samplings(engine)
        }
    return {"tree": TREE, "cpu": found, "eager": compare_with_eager(engine, prompts)}


@contextmanager
def same_tree(engine: Engine) -> Iterator[None]:
    """Inside, the engine verifies TREE, whatever it was to choose."""
    trees = engine.trees
    engine.trees = copy(trees)
    engine.trees.policy = deepcopy(trees.policy)
    if engine.heads:
        engine.trees.use(TREE)
    try:
        yield
    finally:
        engine.trees = trees
        engine.forget()  # this policy has not seen the text in the cache


def agreement(ours: Ids, theirs: Ids) -> Figures:
    """How far replies to the same prompts are the same, ids against ids.

    Returns:
        {"replies", "equal": how many are the same to their ends, "agreed": the share of tokens that come before a
        reply's first difference}
    """
    pairs = list(zip(ours, theirs, strict=True))
    same = sum(
        sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(a, b, strict=False)))
        for a, b in pairs
    )
    longest = sum(max(len(a), len(b)) for a, b in pairs)
    return {
        "replies": len(pairs),
        "equal": sum(a == b for a, b in pairs),
        "agreed": round(same / longest, 4),
    }


def _samplings(engine: Engine) -> list[Sampling]:
    """All four modes in replies of TOKENS; vanilla alone for a model without heads."""
    modes = MODES if engine.heads else MODES[-1:]
    return [
        replace(Sampling(), mode=mode, max_new_tokens=TOKENS, ignore_eos=True) for mode in modes
    ]


def _replies_of(
    runner: Runner, engine: Engine, prompts: Ids, sampling: Sampling
) -> tuple[Ids, float]:
    """`_replies` of the engine over another runner."""
    engine.forget()
    before, engine.runner = engine.runner, runner
    try:
        return _replies(engine, prompts, sampling)
    finally:
        engine.forget()
        engine.runner = before


def _replies(engine: Engine, prompts: Ids, sampling: Sampling) -> tuple[Ids, float]:
    """Ids of each reply, and tokens/s over all but the first, which warms up."""
    ids, tokens, seconds, copies = [], 0, 0.0, engine.trees.copies
    # A typical reply depends on what is verified, and which copies are depends on replies before.
    engine.trees.use_copies(copies and sampling.mode != "typical")
    try:
        for number, prompt in enumerate([prompts[0], *prompts]):
            engine.forget()
            steps = list(engine.generate(prompt, sampling))
            if number:
                ids.append([token.id for step in steps for token in step.tokens])
                tokens, seconds = (
                    tokens + len(ids[-1]),
                    seconds + sum(step.seconds for step in steps),
                )
    finally:
        engine.trees.use_copies(copies)
    return ids, round(tokens / seconds, 2) if seconds else 0.0
