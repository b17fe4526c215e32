"""Fast steps compared with their slow twins: captured with eager ones, a GPU with the CPU."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from medusa_chat.config import MAX_NODES
from medusa_chat.decoding.runner import Runner
from medusa_chat.sampling import MODES, Sampling
from medusa_chat.text import common_prefix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from medusa_chat.decoding.engine import Engine

TOKENS = 64  # of a reply
# Both sides verify this tree: they might choose different ones, and typical replies depend on it.
TREE = "static-32"

Figures = dict[str, Any]
Ids = list[list[int]]


def compare_with_eager(engine: Engine, prompts: Ids) -> Figures:
    """Decode the prompts in all modes with the engine's runner and with an eager one.

    Returns:
        {mode: {"replies", "equal", "agreed", "tokens_per_second", "eager_tokens_per_second"}};
        see `agreement`.
    """
    fast = engine.runner
    # As small a second cache as the replies allow.
    capacity = min(fast.cache.capacity, max(map(len, prompts)) + TOKENS + MAX_NODES)
    eager = Runner(fast.backbone, fast.heads, capacity, fast.accuracy, eager=True)
    found: Figures = {}
    with same_tree(engine):
        for sampling in _samplings(engine):
            ours, rate = _replies_with(fast, engine, prompts, sampling)
            theirs, eager_rate = _replies_with(eager, engine, prompts, sampling)
            rates = {"tokens_per_second": rate, "eager_tokens_per_second": eager_rate}
            found[sampling.mode] = agreement(ours, theirs) | rates
    return found


def compare_in_float32(load: Callable[..., Engine], conversations: Sequence[Any]) -> Figures:
    """Compare a model on its device with the CPU, and its captured steps with eager ones.

    Both are in float32, where replies must be equal. In 16 bits near-ties may differ. `load` takes
    fields of LoadOptions.

    Returns:
        {"tree", "cpu": {mode: `agreement`}, "eager": `compare_with_eager`}
    """
    plain = {"dtype": "float32", "quant": "none", "quant_heads": "none", "tree": "chain-1"}
    engine = load(**plain)
    on_cpu = load(**plain, device="cpu")
    prompts = [engine.encode(conversation) for conversation in conversations]
    found: Figures = {}
    with same_tree(engine), same_tree(on_cpu):
        for sampling in _samplings(engine):
            ours, _ = _replies(engine, prompts, sampling)
            theirs, _ = _replies(on_cpu, prompts, sampling)
            found[sampling.mode] = agreement(ours, theirs)
    return {"tree": TREE, "cpu": found, "eager": compare_with_eager(engine, prompts)}


@contextmanager
def same_tree(engine: Engine) -> Iterator[None]:
    """Make the engine verify TREE inside the block."""
    trees = engine.trees
    engine.trees = trees.separate()
    if engine.heads:
        engine.trees.use(TREE)
    try:
        yield
    finally:
        engine.trees = trees


def agreement(ours: Ids, theirs: Ids) -> Figures:
    """Compare the ids of replies to the same prompts.

    Returns:
        {"replies", "equal": replies equal to their ends, "agreed": share of tokens before a
        reply's first difference}
    """
    pairs = list(zip(ours, theirs, strict=True))
    same = sum(common_prefix(a, b) for a, b in pairs)
    longest = sum(max(len(a), len(b)) for a, b in pairs)
    return {
        "replies": len(pairs),
        "equal": sum(a == b for a, b in pairs),
        "agreed": round(same / longest, 4),
    }


def _samplings(engine: Engine) -> list[Sampling]:
    """All modes, in replies of TOKENS; only vanilla for a model without heads."""
    modes = MODES if engine.heads else MODES[-1:]
    plain = Sampling(max_new_tokens=TOKENS, ignore_eos=True)
    return [replace(plain, mode=mode) for mode in modes]


def _replies_with(
    runner: Runner, engine: Engine, prompts: Ids, sampling: Sampling
) -> tuple[Ids, float]:
    """Like `_replies`, with another runner in the engine."""
    before = engine.runner
    engine.forget()
    engine.runner = runner
    try:
        return _replies(engine, prompts, sampling)
    finally:
        engine.forget()
        engine.runner = before


def _replies(engine: Engine, prompts: Ids, sampling: Sampling) -> tuple[Ids, float]:
    """Ids of each reply, and tokens/s. The first prompt is also answered once to warm up."""
    ids: Ids = []
    seconds = 0.0
    copies = engine.trees.copies
    # A typical reply depends on the tree, and copies on earlier replies.
    engine.trees.use_copies(copies and sampling.mode != "typical")
    try:
        for number, prompt in enumerate([prompts[0], *prompts]):
            engine.forget()
            steps = list(engine.generate(prompt, sampling))
            if number:
                ids.append([token.id for step in steps for token in step.tokens])
                seconds += sum(step.seconds for step in steps)
    finally:
        engine.trees.use_copies(copies)
    tokens = sum(map(len, ids))
    return ids, round(tokens / seconds, 2) if seconds else 0.0
