"""`medusa-chat calibrate`: how often the heads' guesses are right along the model's own greedy text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.config import Message, Sampling, UserError
from medusa_chat.decoding.trees.accuracy import Accuracy
from medusa_chat.decoding.trees.growth import dynamic_tree, grow, likeliest
from medusa_chat.decoding.trees.tree import AnyTree, NodePath, Tree
from medusa_chat.stats import Stats
from medusa_chat.training.confidence import Guessed, calibrated

if TYPE_CHECKING:
    from medusa_chat.decoding.engine import Engine
    from medusa_chat.events import Step
    from medusa_chat.prompts import Prompt

WIDTH = 20  # guesses of a head that are ranked
SIZES = (
    8,
    16,
    32,
    64,
)  # nodes of the trees whose steps are counted, and that the forecast is checked with
STORED = 256  # most frequent paths that are kept
PRIOR = 10  # a path counts as if it had been reached so many times more, with the heads independent there
MISSED, BEYOND = (
    -1,
    -2,
)  # ranks of a token that is not among the guesses, and of one behind the reply's end

Progress = Callable[[int, int], None]
Ranks = list[
    NodePath
]  # of a reply: for each token but its last, the ranks at which heads 1, 2, ... hold what follows


def held_aside(prompts: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to count, and a fifth of every category for the check; of fewer than five none are held aside."""
    by_category = sorted(range(len(prompts)), key=lambda place: prompts[place].category)
    aside = set(by_category[4::5])
    parts: tuple[list[Prompt], list[Prompt]] = ([], [])
    for place, prompt in enumerate(prompts):
        parts[place in aside].append(prompt)
    return parts


def calibrate(
    engine: Engine,
    prompts: list[Prompt],
    max_new_tokens: int = 128,
    progress: Progress | None = None,
) -> Accuracy:
    """Accuracy of every head, of their most frequent joint guesses, and of how sure they are of them.

    Measured over replies to the prompts' first two turns.

    Raises:
        UserError: no reply has a second token, so that no guess was put to the test.
    """
    width = min(WIDTH, engine.backbone.vocabulary)
    hits = torch.zeros(engine.heads, width, dtype=torch.long)
    tested = torch.zeros(engine.heads, dtype=torch.long)
    replies: list[Guessed] = []
    for done, prompt in enumerate(prompts, 1):
        for ids, steps in answers(engine, prompt, Sampling(max_new_tokens=max_new_tokens)):
            ranks, log_p = guess_reply(
                engine, ids, [token.id for step in steps for token in step.tokens]
            )
            tested += (ranks != BEYOND).sum(1)
            hits += torch.stack([row[row >= 0].bincount(minlength=width) for row in ranks])
            replies.append(Guessed(joint_ranks(ranks), log_p))
        if progress:
            progress(done, len(prompts))
    if not tested[0]:
        raise UserError(
            "no reply has a second token, which a head would guess: nothing is measured; try other prompts"
        )
    top = hits.cumsum(1) / tested[:, None].clamp(min=1)
    joint = with_paths(
        Accuracy(tuple(tuple(row) for row in top.tolist())), [reply.ranks for reply in replies]
    )
    trees = [grow(joint, size)[0] for size in SIZES]
    begun = [
        sorted({place for tree in trees for place in places_along(tree, reply.ranks)})
        for reply in replies
    ]
    return calibrated(joint, replies, begun, SIZES)


def answers(
    engine: Engine, prompt: Prompt, sampling: Sampling
) -> Iterator[tuple[list[int], list[Step]]]:
    """The replies to a prompt's first two turns: the ids before each, and its steps."""
    messages: list[Message] = []
    for turn in prompt.turns[:2]:
        messages.append({"role": "user", "content": turn})
        ids = engine.encode(messages)
        if len(ids) + 2 >= engine.context:
            return
        steps = list(engine.generate(ids, sampling))
        yield ids, steps
        messages.append({"role": "assistant", "content": "".join(step.text for step in steps)})


def rank_reply(engine: Engine, prompt: list[int], reply: list[int]) -> Tensor:
    """[K, n]: where the reply's token i was chosen, the rank at which head k held token i + k, or MISSED or BEYOND."""
    return guess_reply(engine, prompt, reply)[0]


@torch.inference_mode()
def guess_reply(engine: Engine, prompt: list[int], reply: list[int]) -> tuple[Tensor, Tensor]:
    """The ranks [K, n] of `rank_reply`, and [n - 1, K, WIDTH], the log p that the heads gave their guesses there."""
    assert engine.runner.heads is not None
    backbone = engine.backbone
    text = torch.tensor(prompt + reply, device=backbone.device)
    hidden = backbone.hidden_of_text(text)[
        len(prompt) - 1 : -1
    ]  # from where the reply's first token is chosen
    logits = engine.runner.heads.logits(hidden, backbone.lm_head)
    likeliest_guesses = logits.float().log_softmax(-1).topk(min(WIDTH, backbone.vocabulary))
    guesses, log_p = (
        likeliest_guesses.indices.cpu(),
        likeliest_guesses.values.transpose(0, 1)[:-1].cpu(),
    )
    ranks = torch.full(guesses.shape[:2], BEYOND)
    for head in range(1, engine.heads + 1):
        answers = torch.tensor(reply[head:])
        found = guesses[head - 1, : len(answers)] == answers[:, None]
        ranks[head - 1, : len(answers)] = torch.where(found.any(1), found.int().argmax(1), MISSED)
    return ranks, log_p


def joint_ranks(ranks: Tensor) -> Ranks:
    """From what `rank_reply` gives: at each token but the last, ranks up to the first head that missed or the end."""
    return [tuple(takewhile(lambda rank: rank >= 0, column)) for column in ranks.T.tolist()[:-1]]


def steps_along(tree: Tree, reply: Ranks) -> Iterator[tuple[NodePath, int]]:
    """The steps in which greedy decoding with a tree goes along a reply.

    Yields:
        for each step the ranks that hold where it begins, and the depth that it reaches in the tree. A last token
        right behind a step closes the reply without one, as in the engine.
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
    return accumulate((1 + depth for _, depth in list(steps_along(tree, reply))[:-1]), initial=0)


def acceptance_length(tree: Tree, replies: Sequence[Ranks]) -> float | None:
    """Tokens a step that greedy decoding with a tree has over these replies, as Stats counts them; None for no step."""
    tokens = [1 + depth for reply in replies for _, depth in steps_along(tree, reply)]
    return sum(tokens) / len(tokens) if tokens else None


def with_paths(accuracy: Accuracy, replies: Sequence[Ranks]) -> Accuracy:
    """Add the frequencies of the most frequent paths, counted where steps begin.

    A step begins at a token that the guesses before it missed, and there guessing is harder: counted at every
    token, the forecast comes out a tenth too long. Where steps begin depends on the tree, so those of small and
    large trees are counted together, each tree grown from the counts at every token.
    """
    everywhere = [ranks for reply in replies for ranks in reply]
    rough = Accuracy(accuracy.top, _frequencies(everywhere, accuracy.widths, PRIOR))
    trees = [grow(rough, size)[0] for size in SIZES]
    begun = [ranks for tree in trees for reply in replies for ranks, _ in steps_along(tree, reply)]
    return Accuracy(accuracy.top, _frequencies(begun, accuracy.widths, PRIOR * len(trees)))


def _frequencies(
    steps: Sequence[NodePath], widths: Sequence[int], prior: float
) -> dict[NodePath, float]:
    """The most frequent paths with their shares of the steps, drawn towards independence of the heads by a prior.

    Few counts are noise, by which a large tree would be chosen badly.
    """
    counts = Counter(ranks[:depth] for ranks in steps for depth in range(len(ranks) + 1))
    held = Counter((depth, rank) for ranks in steps for depth, rank in enumerate(ranks))
    reached = Counter(depth for ranks in steps for depth in range(len(ranks) + 1))

    @cache
    def frequency(path: NodePath) -> float:
        if not path:
            return 1.0
        *prefix, rank = path
        before = counts[tuple(prefix)]
        chance = held[len(prefix), rank] / max(reached[len(prefix)], 1)
        return frequency(tuple(prefix)) * (counts[path] + prior * chance) / (before + prior)

    return dict(likeliest(frequency, widths, STORED))


@dataclass(frozen=True)
class ForecastCheck:
    """A forecast beside what decoding gave, both tokens a step.

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
    progress: Progress | None = None,
) -> list[ForecastCheck]:
    """Decode prompts with the best tree of each of SIZES that the heads can fill, the fixed and the dynamic one.

    The engine keeps the last one; nothing is copied.
    """
    trees = [tree for nodes in SIZES for tree in _best(accuracy, nodes)]
    checks = []
    engine.trees.use_copies(False)
    engine.trees.use_accuracy(accuracy)
    for number, (tree, forecast) in enumerate(trees):
        engine.trees.use(tree)
        conversations: list[Stats] = []
        for prompt in prompts:
            sampling = Sampling(max_new_tokens=max_new_tokens)
            replies = (step for _, steps in answers(engine, prompt, sampling) for step in steps)
            conversations.append(Stats.of(replies))
            if progress:
                progress(number * len(prompts) + len(conversations), len(trees) * len(prompts))
        steps = sum(stats.tree_steps for stats in conversations)
        if steps:
            measured = sum(stats.tree_tokens for stats in conversations) / steps
            kind = "fixed" if isinstance(tree, Tree) else "dynamic"
            checks.append(
                ForecastCheck(kind, len(tree), forecast, measured, _error(conversations, measured))
            )
    return checks


def _best(accuracy: Accuracy, nodes: int) -> Iterator[tuple[AnyTree, float]]:
    """The fixed and the dynamic tree of so many nodes with their forecasts; none where the heads cannot fill them."""
    fixed, forecast = grow(accuracy, nodes)
    if len(fixed) < nodes:
        return
    yield fixed, forecast[-1]
    if nodes in accuracy.dynamic:
        yield dynamic_tree(accuracy, nodes), accuracy.dynamic[nodes]


def _error(conversations: Sequence[Stats], ratio: float) -> float:
    """Standard error of tokens a step, a ratio of sums over conversations."""
    squares = sum((stats.tree_tokens - ratio * stats.tree_steps) ** 2 for stats in conversations)
    return float(squares**0.5 / sum(stats.tree_steps for stats in conversations))
