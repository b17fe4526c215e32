"""Guesses ranked behind their parents, and with the noise of the draws: plain twins, right text."""

from __future__ import annotations

import random
from math import exp, log
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_chat.decoding.acceptance import make_rule
from medusa_chat.decoding.draft.copies import CHAIN, Copied
from medusa_chat.decoding.draft.guesses import MISSED
from medusa_chat.decoding.draft.ranking import CANDIDATES
from medusa_chat.decoding.noise import gumbel, gumbel_of
from medusa_chat.decoding.runner import Runner
from medusa_chat.decoding.trees.accuracy import PUBLISHED, Accuracy
from medusa_chat.decoding.trees.tree import DynamicTree, Tree
from medusa_chat.model.head_vocabulary import HeadVocabulary
from medusa_chat.sampling import Sampling
from medusa_chat.training.confidence import fit_coupling
from tests.helpers.tiny import (
    NEW,
    PROMPT,
    decode,
    ids_of,
    make_engine,
    random_backbone,
    random_heads,
    random_tree,
    reply,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from medusa_chat.decoding.engine import Engine
    from medusa_chat.decoding.report import StepReport
    from medusa_chat.decoding.trees.tree import AnyTree, NodePath
    from medusa_chat.model.heads import MedusaHeads

LINES = ((1.4, 0.2), (0.8, -0.1), (1.1, 0.3), (0.6, 0.0))
WEIGHTS = ((0.9, 0.5), (1.2, 0.4), (0.8, 0.8), (1.0, 1.0))
COUPLED = Accuracy(PUBLISHED.top, calibration=LINES, coupling=WEIGHTS)
FIGURES = Accuracy(PUBLISHED.top, calibration=LINES, exact=COUPLED)
NEVER = float("-inf")
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "typical": {"mode": "typical", "temperature": 0.9},
    "exact": {"mode": "exact", "temperature": 0.7, "seed": 11},
    "exact top-k": {"mode": "exact", "temperature": 1.3, "top_k": 5, "seed": 2},
    "exact top-p": {"mode": "exact", "temperature": 1.0, "top_p": 0.7, "seed": 3},
    "exact min-p": {"mode": "exact", "temperature": 1.0, "min_p": 0.2, "seed": 4},
}


# ---- a twin in plain Python ----


class PlainTwin:
    """Ranks the children of a node from the heads' logits, token by token."""

    def __init__(
        self, heads: MedusaHeads, logits: list[list[float]], sampling: Sampling, position: int
    ) -> None:
        self.bias, self.vocabulary = heads.parent_bias, heads.vocabulary
        self.logits, self.sampling, self.position = logits, sampling, position

    def children(self, depth: int, parent: int) -> list[tuple[int, float]]:
        """Tokens of head `depth` with their log p, likeliest first."""
        logits = self.logits[depth - 1]
        total = sum(map(exp, logits))
        log_p = {self._token(i): x - log(total) for i, x in enumerate(logits)}
        known = sorted(log_p, key=lambda token: -log_p[token])[:CANDIDATES]
        found = {token: log_p[token] for token in known}
        if self.bias is not None:
            found = self._biased(found, parent)
        if self.sampling.mode == "exact":
            found = self._coupled(found, depth)
        scale, shift = LINES[depth - 1]
        ranked = sorted(found.items(), key=lambda item: -item[1])
        return [(token, min(0.0, scale * value + shift)) for token, value in ranked]

    def _token(self, index: int) -> int:
        return index if self.vocabulary is None else int(self.vocabulary.tokens[index])

    def _biased(self, found: dict[int, float], parent: int) -> dict[int, float]:
        assert self.bias is not None
        rest = max(0.0, 1 - sum(map(exp, found.values())))
        added = self.bias(torch.tensor(parent)).tolist()
        index = {self._token(i): i for i in range(len(added))}
        raised = {token: value + added[index[token]] for token, value in found.items()}
        total = log(rest + sum(map(exp, raised.values())))
        return {token: value - total for token, value in raised.items()}

    def _coupled(self, found: dict[int, float], depth: int) -> dict[int, float]:
        sampling = self.sampling
        of_log_p, of_noise = WEIGHTS[depth - 1]
        noise = gumbel(sampling.seed, torch.tensor([self.position + depth]), 64)[0].tolist()
        tempered = {t: of_log_p * value / sampling.temperature for t, value in found.items()}
        kept = self._truncated(tempered)
        scores = {token: tempered[token] + of_noise * noise[token] for token in kept}
        total = log(sum(map(exp, scores.values())))
        return {token: scores.get(token, NEVER) - total for token in found}

    def _truncated(self, tempered: dict[int, float]) -> set[int]:
        order = sorted(tempered, key=lambda token: -tempered[token])
        if self.sampling.top_k:
            order = order[: self.sampling.top_k]
        total = sum(exp(tempered[token]) for token in order)
        p = {token: exp(tempered[token]) / total for token in order}
        if self.sampling.top_p < 1:
            before = {token: sum(p[other] for other in order[:i]) for i, token in enumerate(order)}
            order = [token for token in order if before[token] < self.sampling.top_p]
        return {token for token in order if p[token] >= self.sampling.min_p * p[order[0]]}


def expected_tokens(twin: PlainTwin, tree: Tree, root: int) -> list[int]:
    tokens: dict[NodePath, int] = {(): root}
    for path in tree.paths[1:]:
        tokens[path] = twin.children(len(path), tokens[path[:-1]])[path[-1]][0]
    return [tokens[path] for path in tree.paths]


def heads_of(kind: str, seed: int) -> MedusaHeads:
    backbone = random_backbone()
    vocabulary = None
    if kind.startswith("cut"):
        vocabulary = HeadVocabulary(torch.randperm(64, generator=seeded(seed))[:40], 64)
    rank = 0 if kind.endswith("plain") else 6
    return random_heads(backbone, 4, seed=seed, vocabulary=vocabulary, parent_bias=rank)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def twin_of(runner: Runner, heads: MedusaHeads, text: list[int], sampling: Sampling) -> PlainTwin:
    with torch.inference_mode():
        hidden = runner.backbone.hidden_of_text(torch.tensor(text))[-1:]
        logits = heads.logits(hidden, runner.backbone.lm_head)[:, 0].double()
    return PlainTwin(heads, logits.tolist(), sampling, len(text))


def steps_of(
    heads: MedusaHeads, sampling: Sampling, tree: AnyTree, copies: list[Copied | None]
) -> Iterator[tuple[PlainTwin, StepReport]]:
    """Take a step with each of the copies; yields the twin of its root and its report."""
    runner = Runner(random_backbone(), heads, 400, FIGURES)
    rule, text = make_rule(sampling), [*PROMPT]
    root = runner.prefill(PROMPT, rule)
    for copied in copies:
        twin = twin_of(runner, heads, text, sampling)
        report = runner.step(root, tree, rule, copied)
        yield twin, report
        text += report.tokens
        root = report.next


KINDS = ["plain", "bias", "cut plain", "cut bias"]


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_tree_is_filled_as_a_plain_twin_fills_it(kind: str, how: str) -> None:
    sampling, heads = Sampling(**SETTINGS[how]), heads_of(kind, 3)
    tree = random_tree(5, 40, 4, 6, spine=4)
    for twin, report in steps_of(heads, sampling, tree, [None] * 6):
        root = report.candidates[0]
        assert report.candidates == expected_tokens(twin, tree, root)
        if "bias" not in kind or "top" not in how:
            check_ranks(report, twin, root)


def check_ranks(report: StepReport, twin: PlainTwin, root: int) -> None:
    """The host ranks tokens that may follow as the step does."""
    draw = random.Random(root)
    followed = [draw.choice(twin.children(depth, 0))[0] for depth in range(1, 5)]
    parents = [root, *followed]
    for depth, rank in enumerate(report.guesses.ranks(followed), 1):
        found = dict(twin.children(depth, parents[depth - 1]))
        cut = found.get(followed[depth - 1], NEVER) == NEVER  # no order holds among these
        if rank != MISSED and not cut:
            assert list(found)[rank] == followed[depth - 1]


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_dynamic_tree_has_the_nodes_that_a_plain_twin_chooses(kind: str, how: str) -> None:
    sampling, heads = Sampling(**SETTINGS[how]), heads_of(kind, 7)
    superset = random_tree(4, 60, 4, 5, spine=4)
    chain = Copied(tuple(range(CHAIN)), (-0.7,) * CHAIN, 2)
    copies = [None, chain] * 3
    steps = steps_of(heads, sampling, DynamicTree(superset, 12), copies)
    for (twin, report), copied in zip(steps, copies, strict=True):
        root = report.candidates[0]
        best = likeliest_scores(twin, superset, root, copied)
        own = scores_of(twin, report, copied)
        assert sorted(own, reverse=True) == pytest.approx(best[:12], abs=1e-4)
        assert all(
            own[report.paths.index(path[:-1])] >= own[row] - 1e-6
            for row, path in enumerate(report.paths)
            if path
        )


def scored(twin: PlainTwin, superset: Tree, root: int) -> dict[tuple[int, ...], float]:
    """Log p of each of a superset's guesses, by the tokens from below the root."""
    tokens: dict[Any, tuple[int, ...]] = {(): ()}
    found = {}
    for path in superset.paths[1:]:
        before = tokens[path[:-1]]
        token, log_p = twin.children(len(path), before[-1] if before else root)[path[-1]]
        tokens[path] = (*before, token)
        found[tokens[path]] = log_p
    return found


def likeliest_scores(
    twin: PlainTwin, superset: Tree, root: int, copied: Copied | None
) -> list[float]:
    """Scores of all nodes to choose from, best first."""
    steps = scored(twin, superset, root)
    if copied:
        for length in range(1, CHAIN + 1):
            chain = copied.tokens[:length]
            steps[chain] = max(steps.get(chain, NEVER), copied.log_p[length - 1])
    known = [(), *steps]
    scores = [sum(steps[node[:n]] for n in range(1, len(node) + 1)) for node in known]
    return sorted(scores, reverse=True)


def scores_of(twin: PlainTwin, report: StepReport, copied: Copied | None) -> list[float]:
    """Scores of a step's nodes, from their tokens."""
    chain = copied.tokens if copied else ()
    found: dict[Any, tuple[float, tuple[int, ...]]] = {(): (0.0, ())}
    for path, token in zip(report.paths[1:], report.candidates[1:], strict=True):
        score, before = found[path[:-1]]
        parent = before[-1] if before else report.candidates[0]
        steps = dict(twin.children(len(path), parent)) if len(path) <= 4 else {}
        step = steps.get(token, NEVER) if path[-1] >= 0 else NEVER
        text = (*before, token)
        if copied and chain[: len(text)] == text:
            step = max(step, copied.log_p[len(text) - 1])
        found[path] = (score + step, text)
    return [found[path][0] for path in report.paths]


# ---- the text stays ----


@given(seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS), copies=st.booleans())
@settings(max_examples=16, deadline=None, derandomize=True)
def test_greedy_and_exact_text_is_vanillas(seed: int, kind: str, copies: bool) -> None:
    draw = random.Random(seed)
    backbone, heads = random_backbone(), heads_of(kind, seed)
    tree = draw.choice(["dynamic-16", "static-16", "dynamic-64", "chain-4"])
    law: dict[str, Any] = draw.choice(
        [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"repetition_penalty": 1.3}]
    )
    law |= {"temperature": draw.choice([0.3, 0.7, 1.0, 1.5]), "seed": seed}
    engine = make_engine(backbone, heads, tree, copies=copies, accuracy=FIGURES)
    for mode, plain in (("exact", law), ("greedy", {**law, "temperature": 0})):
        expected = reply(make_engine(backbone), PROMPT, mode="vanilla", max_new_tokens=NEW, **plain)
        engine.forget()
        assert reply(engine, PROMPT, mode=mode, max_new_tokens=NEW, **plain) == expected


class KnowsTheBackbone:
    """Heads that say what the backbone will: the noise then tells each draw for certain."""

    heads, vocabulary, parent_bias = 3, None, None

    def __init__(self, text: list[int], logits: torch.Tensor) -> None:
        self.text, self.table = text, logits
        self.engine: Engine | None = None

    def logits(self, _hidden: torch.Tensor, _lm_head: Any) -> torch.Tensor:
        assert self.engine is not None
        place = self.engine.runner.cache.length
        rows = [self.table[min(place + head - 1, len(self.table) - 1)] for head in (1, 2, 3)]
        return torch.stack(rows)[:, None]


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.5])
def test_heads_that_know_the_distribution_guess_every_draw(temperature: float) -> None:
    """Uncoupled, the likeliest token would be right as often as it is drawn."""
    backbone = random_backbone()
    law = {"temperature": temperature, "seed": 5, "max_new_tokens": 48}
    text = PROMPT + reply(make_engine(backbone), PROMPT, mode="vanilla", **law)
    with torch.inference_mode():
        logits = backbone.logits(backbone.hidden_of_text(torch.tensor(text)))
    heads = KnowsTheBackbone(text, logits)
    engine = make_engine(backbone, heads, "chain-3")
    heads.engine = engine
    steps = decode(engine, PROMPT, mode="exact", **law)
    assert PROMPT + ids_of(steps) == text
    # A rare token may lie beyond the candidates.
    lengths = [len(step.tokens) for step in steps[:-1] if step.kind == "tree"]
    assert sum(lengths) / len(lengths) > 3.2


def test_some_noise_is_part_of_all_noise() -> None:
    positions, tokens = torch.tensor([3, 70, 4096]), torch.tensor([[5, 0], [63, 1], [9, 9]])
    assert gumbel_of(7, positions, tokens, 64).equal(gumbel(7, positions, 64).gather(1, tokens))


def test_weights_of_a_coupling_are_found() -> None:
    draw = seeded(1)
    log_p, noise = 3 * torch.randn(6000, 8, generator=draw), torch.randn(6000, 8, generator=draw)
    p = (0.8 * log_p + 0.3 * noise).softmax(-1)
    right = torch.multinomial(p, 1, generator=draw)[:, 0]
    assert fit_coupling(log_p, noise, right) == pytest.approx((0.8, 0.3), abs=0.05)
    nothing = torch.full((6000,), -1)
    assert fit_coupling(log_p, noise, nothing) == (1.0, 1.0)


def test_modes_keep_figures_and_trees_of_their_own() -> None:
    heads = heads_of("plain", 2)
    exact = Accuracy(tuple((0.1, 0.2, 0.9) for _ in range(4)))
    engine = make_engine(
        random_backbone(), heads, "static-8", accuracy=Accuracy(PUBLISHED.top, exact=exact)
    )
    shapes = {}
    for mode in ("greedy", "typical", "exact", "vanilla"):
        decode(engine, PROMPT, mode=mode, temperature=0.8, max_new_tokens=12)
        tree = engine.trees.current
        assert isinstance(tree, Tree)
        shapes[mode] = tree.paths
    assert shapes["greedy"] == shapes["typical"] != shapes["exact"] == shapes["vanilla"]
    assert (2,) in shapes["exact"]
