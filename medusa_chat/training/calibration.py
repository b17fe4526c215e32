"""`medusa-chat calibrate`: accuracy of the heads' guesses along the model's own greedy text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.config import Message, UserError
from medusa_chat.decoding.trees.accuracy import Accuracy
from medusa_chat.decoding.trees.growth import dynamic_tree, grow, likeliest
from medusa_chat.decoding.trees.tree import AnyTree, NodePath, Tree
from medusa_chat.native.model import NativeHeads
from medusa_chat.sampling import Sampling
from medusa_chat.stats import Stats
from medusa_chat.training.confidence import Guessed, calibrated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from medusa_chat.decoding.engine import Engine
    from medusa_chat.events import Step
    from medusa_chat.prompts import Prompt

RANKED_GUESSES = 20  # of each head
SIZES = (8, 16, 32, 64)  # nodes of the trees to count steps of, and to check the forecast with
STORED = 256  # most frequent paths to keep
PRIOR_VISITS = 10  # visits of each path that are added to its count, with independent heads
NO_GUESS = -1  # rank of a token that is not among the guesses
PAST_END = -2  # rank of a token after the reply's end

# Ranks of a reply: for each token but the last, the ranks that heads 1, 2, ... gave to the tokens
# that followed.
Ranks = list[NodePath]


def held_aside(prompts: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Split prompts into those to count, and a fifth of each category for the check.

    Fewer than five prompts are all counted.
    """
    by_category = sorted(range(len(prompts)), key=lambda i: prompts[i].category)
    aside = set(by_category[4::5])
    counted = [prompt for i, prompt in enumerate(prompts) if i not in aside]
    return counted, [prompt for i, prompt in enumerate(prompts) if i in aside]


def calibrate(
    engine: Engine,
    prompts: list[Prompt],
    max_new_tokens: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> Accuracy:
    """Measure the heads over replies to the prompts' first two turns.

    Returns:
        The accuracy of each head, of their most frequent joint guesses, and their calibration.

    Raises:
        UserError: no reply has a second token, so no guess was tested.
    """
    width = min(RANKED_GUESSES, engine.backbone.vocabulary)
    hits = torch.zeros(engine.heads, width, dtype=torch.long)
    tested = torch.zeros(engine.heads, dtype=torch.long)
    replies: list[Guessed] = []
    sampling = Sampling(max_new_tokens=max_new_tokens)
    for done, prompt in enumerate(prompts, 1):
        for ids, steps in answers(engine, prompt, sampling):
            reply = [token.id for step in steps for token in step.tokens]
            ranks, log_p = guess_reply(engine, ids, reply)
            tested += (ranks != PAST_END).sum(1)
            hits += torch.stack([row[row >= 0].bincount(minlength=width) for row in ranks])
            replies.append(Guessed(joint_ranks(ranks), log_p))
        if progress:
            progress(done, len(prompts))
    if not tested[0]:
        raise UserError(
            "no reply has a second token, which a head would guess: nothing is measured; try other"
            " prompts"
        )
    top = hits.cumsum(1) / tested[:, None].clamp(min=1)
    single = Accuracy(tuple(tuple(row) for row in top.tolist()))
    joint = with_paths(single, [reply.ranks for reply in replies])
    return calibrated(joint, replies, _step_starts(joint, replies), SIZES)


def _step_starts(accuracy: Accuracy, replies: Sequence[Guessed]) -> list[list[int]]:
    """The tokens of each reply at which a step begins with the best tree of any of SIZES."""
    trees = [grow(accuracy, size)[0] for size in SIZES]
    starts = []
    for reply in replies:
        places = {place for tree in trees for place in places_along(tree, reply.ranks)}
        starts.append(sorted(places))
    return starts


def answers(
    engine: Engine, prompt: Prompt, sampling: Sampling
) -> Iterator[tuple[list[int], list[Step]]]:
    """Answer a prompt's first two turns. Yields the ids before each reply, and its steps."""
    messages: list[Message] = prompt.system
    for turn in prompt.turns[:2]:
        messages.append({"role": "user", "content": turn})
        ids = engine.encode(messages)
        if len(ids) + 2 >= engine.context:
            return
        steps = list(engine.generate(ids, sampling))
        yield ids, steps
        text = "".join(step.text for step in steps)
        if not text.strip():  # templates refuse an empty reply
            return
        messages.append({"role": "assistant", "content": text})


def rank_reply(engine: Engine, prompt: list[int], reply: list[int]) -> Tensor:
    """The heads' ranks along a reply, [heads, n].

    Entry [k, i] is the rank that head k + 1 gave to token i + k + 1 when token i was chosen, or
    NO_GUESS or PAST_END.
    """
    return guess_reply(engine, prompt, reply)[0]


@torch.inference_mode()
def guess_reply(engine: Engine, prompt: list[int], reply: list[int]) -> tuple[Tensor, Tensor]:
    """The ranks of `rank_reply`, and the log p of the heads' guesses.

    Returns:
        ranks: [heads, n].
        log_p: [n - 1, heads, RANKED_GUESSES], natural logarithms.
    """
    heads = engine.runner.heads
    if heads is None or isinstance(heads, NativeHeads):
        raise UserError("calibration needs Medusa heads, loaded with engine='torch'")
    backbone = engine.backbone
    text = torch.tensor(prompt + reply, device=backbone.device)
    # The first state is that of the prompt's last token, which the reply's first token follows.
    hidden = backbone.hidden_of_text(text)[len(prompt) - 1 : -1]
    logits = heads.logits(hidden, backbone.lm_head)
    top = logits.float().log_softmax(-1).topk(min(RANKED_GUESSES, backbone.vocabulary))
    guesses = top.indices.cpu()  # [heads, n, ranked]
    ranks = torch.full(guesses.shape[:2], PAST_END)
    for head in range(1, engine.heads + 1):
        following = torch.tensor(reply[head:])
        found = guesses[head - 1, : len(following)] == following[:, None]
        rank = torch.where(found.any(1), found.int().argmax(1), NO_GUESS)
        ranks[head - 1, : len(following)] = rank
    return ranks, top.values.transpose(0, 1)[:-1].cpu()


def joint_ranks(ranks: Tensor) -> Ranks:
    """Convert `rank_reply`'s ranks: at each token those before the first head that missed."""
    return [tuple(takewhile(lambda rank: rank >= 0, column)) for column in ranks.T.tolist()[:-1]]


def steps_along(tree: Tree, reply: Ranks) -> Iterator[tuple[NodePath, int]]:
    """Follow the steps of greedy decoding with a tree along a reply.

    A last token right after a step closes the reply without a step, as in the engine.

    Yields:
        The ranks where a step begins, and the depth that it reaches in the tree.
    """
    nodes = set(tree.paths)
    place = 0
    while place < len(reply):
        ranks = reply[place]
        depth = next(depth for depth in range(len(ranks), -1, -1) if ranks[:depth] in nodes)
        yield ranks, depth
        place += 1 + depth


def places_along(tree: Tree, reply: Ranks) -> Iterator[int]:
    """The tokens of a reply at which the steps of `steps_along` begin."""
    depths = [depth for _, depth in steps_along(tree, reply)]
    return accumulate((1 + depth for depth in depths[:-1]), initial=0)


def acceptance_length(tree: Tree, replies: Sequence[Ranks]) -> float | None:
    """Acceptance length of greedy decoding with a tree over replies; None for no step."""
    tokens = [1 + depth for reply in replies for _, depth in steps_along(tree, reply)]
    return sum(tokens) / len(tokens) if tokens else None


def with_paths(accuracy: Accuracy, replies: Sequence[Ranks]) -> Accuracy:
    """Add the frequencies of the most frequent paths, counted where steps begin.

    A step begins at a token that the guesses before it missed, and guessing is harder there. A
    count at every token would make the forecast a tenth too long. The places depend on the tree,
    so those of small and large trees count together. These trees are grown from the counts at
    every token.
    """
    everywhere = [ranks for reply in replies for ranks in reply]
    rough = Accuracy(accuracy.top, _frequencies(everywhere, accuracy.widths, PRIOR_VISITS))
    trees = [grow(rough, size)[0] for size in SIZES]
    begun = [ranks for tree in trees for reply in replies for ranks, _ in steps_along(tree, reply)]
    prior = PRIOR_VISITS * len(trees)
    return Accuracy(accuracy.top, _frequencies(begun, accuracy.widths, prior))


def _frequencies(
    steps: Sequence[NodePath], widths: Sequence[int], prior: float
) -> dict[NodePath, float]:
    """The most frequent paths with their shares of the steps.

    Small counts are noise, and a large tree would be badly chosen by them. So a prior draws the
    shares towards those of independent heads.
    """
    counts = Counter(ranks[:depth] for ranks in steps for depth in range(len(ranks) + 1))
    ranked = Counter((depth, rank) for ranks in steps for depth, rank in enumerate(ranks))
    reached = Counter(depth for ranks in steps for depth in range(len(ranks) + 1))

    @cache
    def frequency(path: NodePath) -> float:
        if not path:
            return 1.0
        before = path[:-1]
        depth = len(before)
        chance = ranked[depth, path[-1]] / max(reached[depth], 1)
        share = (counts[path] + prior * chance) / (counts[before] + prior)
        return frequency(before) * share

    return dict(likeliest(frequency, widths, STORED))


@dataclass(frozen=True)
class ForecastCheck:
    """A forecast acceptance length and the measured one.

    Attributes:
        error: standard error of `measured`, over conversations.
    """

    tree: str
    nodes: int
    forecast: float
    measured: float
    error: float


def check_forecast(
    engine: Engine,
    accuracy: Accuracy,
    prompts: list[Prompt],
    max_new_tokens: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> list[ForecastCheck]:
    """Decode prompts with the best fixed and dynamic trees of SIZES that the heads can fill.

    The engine keeps the last tree, and copies are off.
    """
    trees = [tree for nodes in SIZES for tree in _best(accuracy, nodes)]
    checks = []
    sampling = Sampling(max_new_tokens=max_new_tokens)
    engine.trees.use_copies(False)
    engine.trees.use_accuracy(accuracy)
    for number, (tree, forecast) in enumerate(trees):
        engine.trees.use(tree)
        conversations: list[Stats] = []
        for prompt in prompts:
            replies = (step for _, steps in answers(engine, prompt, sampling) for step in steps)
            conversations.append(Stats.of(replies))
            if progress:
                progress(number * len(prompts) + len(conversations), len(trees) * len(prompts))
        if check := _check(tree, forecast, conversations):
            checks.append(check)
    return checks


def _check(tree: AnyTree, forecast: float, conversations: Sequence[Stats]) -> ForecastCheck | None:
    """Compare a forecast with conversations; None if they have no step."""
    steps = sum(stats.tree_steps for stats in conversations)
    if not steps:
        return None
    measured = sum(stats.tree_tokens for stats in conversations) / steps
    squares = sum((stats.tree_tokens - measured * stats.tree_steps) ** 2 for stats in conversations)
    error = float(squares**0.5 / steps)  # of a ratio of sums
    kind = "fixed" if isinstance(tree, Tree) else "dynamic"
    return ForecastCheck(kind, len(tree), forecast, measured, error)


def _best(accuracy: Accuracy, nodes: int) -> Iterator[tuple[AnyTree, float]]:
    """The fixed and the dynamic tree of so many nodes with their forecasts, if heads fill them."""
    fixed, forecast = grow(accuracy, nodes)
    if len(fixed) < nodes:
        return
    yield fixed, forecast[-1]
    if nodes in accuracy.dynamic:
        yield dynamic_tree(accuracy, nodes), accuracy.dynamic[nodes]
