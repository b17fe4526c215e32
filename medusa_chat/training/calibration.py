"""`medusa-chat calibrate`: accuracy of the heads' guesses along the model's own greedy text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from medusa_chat.config import UserError
from medusa_chat.decoding.trees.accuracy import Accuracy
from medusa_chat.decoding.trees.growth import dynamic_tree, grow, likeliest
from medusa_chat.decoding.trees.tree import AnyTree, NodePath, Tree
from medusa_chat.sampling import Sampling
from medusa_chat.stats import Stats
from medusa_chat.training.confidence import calibrated, coupling_weights
from medusa_chat.training.observations import (
    PAST_END,
    Guessed,
    Observed,
    Ranks,
    answers,
    guessed,
    observe_all,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from medusa_chat.decoding.acceptance import Coupling
    from medusa_chat.decoding.engine import Engine
    from medusa_chat.prompts import Prompt

RANKED_GUESSES = 20  # of each head whose accuracy is kept
SIZES = (8, 16, 32, 64)  # nodes of the trees to count steps of, and to check the forecast with
STORED = 256  # most frequent paths to keep
PRIOR_VISITS = 10  # visits of each path that are added to its count, with independent heads


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
    """Measure the heads over replies to the prompts' first two turns, greedy and in mode exact.

    Returns:
        The accuracy of each head, of their most frequent joint guesses, and their calibration;
        `exact` has the same for guesses that are coupled to the noise of the draws.

    Raises:
        UserError: no reply has a second token, so no guess was tested.
    """

    def report(done: int) -> None:
        if progress:
            progress(done, 2 * len(prompts))

    plain = Sampling(max_new_tokens=max_new_tokens)
    greedy = observe_all(engine, prompts, lambda _: plain, report)
    if not greedy:
        raise UserError(
            "no reply has a second token, which a head would guess: nothing is measured; try other"
            " prompts"
        )
    drawn = observe_all(
        engine,
        prompts,
        lambda number: replace(plain, mode="exact", seed=number),
        lambda done: report(len(prompts) + done),
    )
    figures = figures_of(engine, greedy, "none")
    if not drawn:
        return figures
    return replace(figures, exact=figures_of(engine, drawn, "noise"))


def figures_of(engine: Engine, observed: Sequence[Observed], coupling: Coupling) -> Accuracy:
    """Measure the heads over replies, with their guesses in the order of a coupling."""

    def in_order(accuracy: Accuracy) -> list[Guessed]:
        ranker = engine.runner.guessing(coupling, accuracy).ranker()
        return [guessed(each, ranker, engine.backbone.vocabulary) for each in observed]

    bare = Accuracy(())
    if coupling != "none":
        ranker = engine.runner.guessing(coupling, bare).ranker()
        weights = coupling_weights(observed, ranker, engine.backbone.vocabulary)
        bare = replace(bare, coupling=weights)
    replies = in_order(bare)
    ranks = [reply.ranks for reply in replies]
    joint = with_paths(replace(bare, top=_top(replies)), ranks)
    return calibrated(
        joint,
        replies,
        _step_starts(joint, ranks),
        SIZES,
        lambda accuracy: engine.runner.guessing(coupling, accuracy),
    )


def _top(replies: Sequence[Guessed]) -> tuple[tuple[float, ...], ...]:
    """Accuracy of each head's 1, 2, ... likeliest guesses."""
    table = torch.cat([reply.table for reply in replies], dim=1)
    width = min(RANKED_GUESSES, replies[0].log_p.shape[-1])
    hits = torch.stack([row[row >= 0].bincount(minlength=width)[:width] for row in table])
    tested = (table != PAST_END).sum(1, keepdim=True).clamp(min=1)
    return tuple(tuple(row) for row in (hits.cumsum(1) / tested).tolist())


def _step_starts(accuracy: Accuracy, replies: Sequence[Ranks]) -> list[list[int]]:
    """The tokens of each reply at which a step begins with the best tree of any of SIZES."""
    trees = [grow(accuracy, size)[0] for size in SIZES]
    return [
        sorted({place for tree in trees for place in places_along(tree, ranks)})
        for ranks in replies
    ]


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
    return replace(accuracy, paths=_frequencies(begun, accuracy.widths, prior))


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
