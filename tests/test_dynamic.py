"""Dynamic trees: the choice against a plain twin, right replies, calibration, forecasts."""

from __future__ import annotations

import heapq
import random
from functools import partial
from math import exp
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import medusa_chat
from medusa_chat.config import Message, UserError
from medusa_chat.decoding.acceptance import make_rule
from medusa_chat.decoding.draft.copies import CHAIN, Copied
from medusa_chat.decoding.draft.guesses import Guesses
from medusa_chat.decoding.draft.ranking import CANDIDATES
from medusa_chat.decoding.draft.selection import Selector
from medusa_chat.decoding.trees import copy_gain
from medusa_chat.decoding.trees.accuracy import PUBLISHED, Accuracy
from medusa_chat.decoding.trees.copy_gain import CopyGain
from medusa_chat.decoding.trees.growth import SUPERSET, dynamic_tree, grow, shaped_tree
from medusa_chat.decoding.trees.tree import DynamicTree, NodePath, Tree
from medusa_chat.events import COPIED, proposer
from medusa_chat.sampling import Sampling
from medusa_chat.stats import Stats
from medusa_chat.training.confidence import dynamic_length, fit
from medusa_chat.training.observations import Observed, observe
from tests.helpers.tiny import (
    NEW,
    PROMPT,
    OracleHeads,
    decode,
    ids_of,
    make_engine,
    random_heads,
    random_tree,
    reply,
)

CPU = torch.device("cpu")
NEVER = float("-inf")


# ---- the choice against a twin with a heap ----


def chosen_by_heap(
    superset: Tree, nodes: int, guesses: Any, log_p: Any, chain: Any, chain_log_p: Any
) -> list[tuple[float, tuple[int, ...], NodePath]]:
    """The likeliest nodes as (log p, tokens of the path, path), in plain Python."""
    text = {
        path: tuple(guesses[depth][rank] for depth, rank in enumerate(path))
        for path in superset.paths
    }
    paths = {tokens: path for path, tokens in text.items()}
    steps = {tokens: log_p[len(path) - 1][path[-1]] for path, tokens in text.items() if path}
    for length in range(1, len(chain) + 1):
        tokens = tuple(chain[:length])
        steps[tokens] = max(steps.get(tokens, NEVER), chain_log_p[length - 1])
        paths.setdefault(tokens, (*paths[tokens[:-1]], COPIED))
    found: list[tuple[float, tuple[int, ...], NodePath]] = []
    frontier: list[tuple[float, int, tuple[int, ...]]] = [(0.0, 0, ())]
    while frontier and len(found) < nodes:
        negative, _, tokens = heapq.heappop(frontier)
        found.append((-negative, tokens, paths[tokens]))
        for child in (
            other for other in steps if other[:-1] == tokens and len(other) == len(tokens) + 1
        ):
            heapq.heappush(frontier, (negative - steps[child], len(frontier), child))
    return found


def drawn(seed: int, ties: bool) -> Any:
    """A superset, guesses without doubles, a chain that often agrees, and how likely all are."""
    draw = random.Random(seed)
    depth, width = draw.randint(1, 4), draw.randint(1, 5)
    superset = random_tree(seed, draw.randint(4, 40), depth, width)
    depth, width = superset.depth, superset.width

    def likely() -> float:
        return float(draw.choice((0, -0.25, -0.5))) if ties else -draw.expovariate(1)

    guesses = [draw.sample(range(12), width) for _ in range(depth)]
    log_p = [[likely() for _ in range(width)] for _ in range(depth)]
    chain = [
        draw.choice(guesses[d]) if d < depth and draw.random() < 0.8 else draw.randrange(12)
        for d in range(CHAIN)
    ]
    return (
        superset,
        draw.randint(1, len(superset)),
        guesses,
        log_p,
        chain,
        [likely() for _ in range(CHAIN)],
    )


def filled(superset: Tree, guesses: Any, log_p: Any, rows: int | None = None) -> Any:
    """Token and log p of each node of the superset, as the step fills it; 99 is the root's."""
    places = [(len(path) - 1, path[-1]) for path in superset.paths[1:]]
    more = (rows or len(superset)) - len(superset)
    tokens = [99, *(guesses[depth][rank] for depth, rank in places), *[11] * more]
    steps = [0.0, *(float(log_p[depth][rank]) for depth, rank in places), *[0.0] * more]
    return torch.tensor(tokens), torch.tensor(steps)


@given(seed=st.integers(0, 10**6), ties=st.booleans(), copies=st.booleans())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_choice_is_that_of_a_heap(seed: Any, ties: Any, copies: Any) -> None:
    superset, nodes, guesses, log_p, chain, chain_log_p = drawn(seed, ties)
    chain, chain_log_p = (chain, chain_log_p) if copies else ([], [])
    selector = Selector(superset, nodes, len(chain), CPU)
    tokens, steps = filled(superset, guesses, log_p)
    drawn_chain = torch.tensor(chain, dtype=torch.long), torch.tensor(chain_log_p)
    selection = selector.choose(tokens, steps, *drawn_chain)
    paths, tokens = (
        selector.paths(selection.rows.tolist(), int(selection.joint)),
        selection.candidates.tolist(),
    )
    expected = chosen_by_heap(superset, nodes, guesses, log_p, chain, chain_log_p)
    branches = assert_is_a_tree(selection.tensors, paths, tokens)
    assert len(set(branches)) == nodes  # no doubles among siblings
    everything = chosen_by_heap(superset, 10**6, guesses, log_p, chain, chain_log_p)
    scores = {branch: score for score, branch, _ in everything}
    assert sorted(scores[branch] for branch in branches) == pytest.approx(
        sorted(score for score, _, _ in expected)
    )
    if not ties:
        assert set(zip(branches, paths, strict=True)) == {
            (branch, path) for _, branch, path in expected
        }


@given(
    seed=st.integers(0, 10**6),
    ties=st.booleans(),
    copies=st.booleans(),
    more=st.tuples(*[st.integers(0, 9)] * 2),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_buffers_for_other_supersets_change_no_choice(
    seed: Any, ties: Any, copies: Any, more: Any
) -> None:
    """More paths and depth than the superset has."""
    superset, nodes, guesses, log_p, chain, chain_log_p = drawn(seed, ties)
    chain, chain_log_p = (chain, chain_log_p) if copies else ([], [])
    size, depth = (a + b for a, b in zip((len(superset), superset.depth), more, strict=True))
    tight = Selector(superset, nodes, len(chain), CPU)
    shared = Selector(superset, nodes, len(chain), CPU, (size, depth))
    found = []
    for selector in (tight, shared):
        drawn_chain = torch.tensor(chain, dtype=torch.long), torch.tensor(chain_log_p)
        tokens, steps = filled(superset, guesses, log_p, selector.size)
        chosen = selector.choose(tokens, steps, *drawn_chain)
        tensors = [
            getattr(chosen.tensors, name).tolist() for name in ("parents", "depths", "ancestors")
        ]
        paths = selector.paths(chosen.rows.tolist(), int(chosen.joint))
        found.append((chosen.candidates.tolist(), tensors, paths))
    assert found[0] == found[1]


@given(seed=st.integers(0, 10**6))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_what_copies_add_is_judged_for_trees_of_every_size_at_once(seed: Any) -> None:
    superset, _, guesses, log_p, chain, chain_log_p = drawn(seed, ties=False)
    draw = random.Random(seed)
    agreed = draw.randint(0, CHAIN)
    other = [draw.choice(row) for row in guesses] + [12] * (CHAIN - len(guesses))
    followed = (chain[:agreed] + other[agreed:])[:CHAIN]
    likely = {
        path: exp(sum(log_p[depth][rank] for depth, rank in enumerate(path)))
        for path in superset.paths[1:]
    }
    gain = CopyGain()
    gain.set_paths(sorted(likely.items(), key=lambda known: -known[1]))
    gain.add(Guesses(guesses), Copied(tuple(chain), tuple(chain_log_p), 1), followed)
    for nodes in range(1, len(superset) + CHAIN + 1):
        heap = partial(chosen_by_heap, superset, nodes, guesses, log_p)
        with_copies = {branch for _, branch, _ in heap(chain, chain_log_p)}
        without = {branch for _, branch, _ in heap([], [])}
        lengths = [
            sum(tuple(followed[:n]) in kept for n in range(1, CHAIN + 1))
            for kept in (with_copies, without)
        ]
        gained = (lengths[0] - lengths[1]) / (1 + copy_gain.GAIN_PRIOR)
        assert gain.of(nodes) == pytest.approx(gained)


def test_what_copies_add_fades(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_gain, "GAIN_MEMORY", 4)
    gain, copied = CopyGain(), Copied(tuple(range(CHAIN)), (-0.1,) * CHAIN, 8)
    gain.add(Guesses([[99]]), copied, copied.tokens)
    assert gain.of(CHAIN + 2) == 0  # nothing was known of the heads
    gain.set_paths([((0,), 0.5)])
    for _ in range(400):  # enough for counts in units of now to be taken anew
        gain.add(Guesses([[99]]), copied, copied.tokens)
    held = 4  # steps that count
    assert gain.of(CHAIN + 2) == pytest.approx(CHAIN * held / (held + copy_gain.GAIN_PRIOR))
    assert gain.of(4) == pytest.approx(3 * held / (held + copy_gain.GAIN_PRIOR))
    for _ in range(40):
        gain.add(Guesses([[99]]), None, [])
    assert 0 < gain.of(CHAIN + 2) < 1e-3


def assert_is_a_tree(tensors: Any, paths: Any, tokens: Any) -> list[tuple[int, ...]]:
    """Check order and topology; returns each node's tokens from below the root."""
    where = {path: row for row, path in enumerate(paths)}
    assert paths[0] == ()
    assert tokens[0] == 99
    parents, depths = tensors.parents.tolist(), tensors.depths.tolist()
    branches: list[tuple[int, ...]] = [()]
    for row, path in enumerate(paths[1:], 1):
        assert parents[row] == where[path[:-1]] < row
        branches.append((*branches[parents[row]], tokens[row]))
    assert parents[0] == 0
    assert depths == [len(path) for path in paths]
    assert max(depths) <= tensors.depth
    for row, path in enumerate(paths):
        above = [other for other in range(len(paths)) if path[: len(paths[other])] == paths[other]]
        assert tensors.ancestors[row].nonzero().flatten().tolist() == above
    return branches


def test_rounding_puts_no_child_before_its_parent() -> None:
    """Steps that are nearly certain change a float32 sum by nothing at all."""
    superset = Tree.of([(0,) * n for n in range(1, 9)] + [(1,), (1, 0)])
    log_p = [[-9.0, -1e-8], *[[-1e-8, -1e-8]] * 7]
    guesses = [[1, 2]] * 8
    for nodes in range(1, len(superset) + 1):
        selector = Selector(superset, nodes, CHAIN, CPU)
        chain = torch.full((CHAIN,), 1), torch.full((CHAIN,), -1e-8)
        tokens, steps = filled(superset, guesses, log_p)
        selection = selector.choose(tokens, steps, *chain)
        paths = selector.paths(selection.rows.tolist(), int(selection.joint))
        assert_is_a_tree(selection.tensors, paths, selection.candidates.tolist())


# ---- in the engine ----


@given(
    seed=st.integers(0, 10**6),
    size=st.integers(2, 80),
    share=st.floats(0.1, 1),
    copies=st.booleans(),
    ranks=st.lists(st.integers(-1, 5), min_size=1, max_size=3),
    scale=st.floats(0.3, 3),
    shift=st.floats(-1, 1),
)
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_greedy_equals_vanilla_with_any_superset_and_calibration(
    backbone: Any,
    greedy_text: Any,
    seed: Any,
    size: Any,
    share: Any,
    copies: Any,
    ranks: Any,
    scale: Any,
    shift: Any,
) -> None:
    superset = random_tree(seed, size, 4, 6)
    tree = DynamicTree(superset, max(2, int(share * len(superset))))
    accuracy = Accuracy(PUBLISHED.top, calibration=((scale, shift),) * 4)
    for heads in (
        random_heads(backbone, 4, seed=seed),
        OracleHeads(4, 64, greedy_text, ranks, seed),
    ):
        engine = make_engine(
            backbone, heads, tree, copies=copies, accuracy=accuracy, probing=seed % 2 == 0
        )
        assert PROMPT + reply(engine, PROMPT, max_new_tokens=NEW) == greedy_text


@pytest.mark.parametrize("tree", ["dynamic-8", "dynamic-64", "static-16"])
@pytest.mark.parametrize("law", [{"temperature": 0.7}, {"temperature": 1.2, "top_p": 0.8}])
def test_exact_gives_the_text_of_vanilla_sampling(backbone: Any, tree: Any, law: Any) -> None:
    settings = {"seed": 3, "max_new_tokens": NEW, **law}
    expected = reply(make_engine(backbone), PROMPT, mode="vanilla", **settings)
    heads = OracleHeads(4, 64, PROMPT + expected, (0, 0, 1, -1))
    steps = decode(
        make_engine(backbone, heads, tree, copies=True), PROMPT, mode="exact", **settings
    )
    assert ids_of(steps) == expected
    assert max(step.accepted for step in steps) >= 3


def test_typical_settles_a_token_each_step_and_repeats_itself_for_a_seed(backbone: Any) -> None:
    settings = {"mode": "typical", "temperature": 0.9, "seed": 5, "max_new_tokens": NEW}
    engines = [
        make_engine(backbone, random_heads(backbone), "dynamic-16", copies=True) for _ in range(2)
    ]
    first, second = (decode(engine, PROMPT, **settings) for engine in engines)
    assert ids_of(first) == ids_of(second)
    assert all(step.tokens[0].head == 0 for step in first)
    engines[0].forget()
    assert reply(engines[0], PROMPT, **(settings | {"temperature": 0})) == reply(
        make_engine(backbone), PROMPT, mode="vanilla", temperature=0, max_new_tokens=NEW
    )


def test_the_nodes_are_what_the_heads_are_surest_of(backbone: Any) -> None:
    """The runner's choice at real steps, from the heads' logits, calibrated by hand."""
    lines = ((1.4, 0.2), (0.8, -0.1), (1.1, 0.3), (0.6, 0.0))
    heads, superset = random_heads(backbone), random_tree(4, 60, 4, 5, spine=4)
    accuracy = Accuracy(PUBLISHED.top, calibration=lines)
    runner = make_engine(backbone, heads, DynamicTree(superset, 12), accuracy=accuracy).runner
    rule = make_rule(Sampling())
    root, text, seen = runner.prefill(PROMPT, rule), [*PROMPT], set()
    for step in range(10):
        with torch.inference_mode():
            hidden = backbone.hidden_of_text(torch.tensor(text))[-1:]
            likeliest = (
                heads.logits(hidden, backbone.lm_head)[:, 0].log_softmax(-1).topk(superset.width)
            )
        guesses = likeliest.indices.tolist()
        calibrated = zip(lines, likeliest.values.tolist(), strict=True)
        said = [
            [min(0.0, scale * value + shift) for value in row] for (scale, shift), row in calibrated
        ]
        copied = Copied(tuple(range(CHAIN)), (-0.7,) * CHAIN, 2) if step % 2 else None
        report = runner.step(root, DynamicTree(superset, 12), rule, copied)
        chain = (list(copied.tokens), list(copied.log_p)) if copied else ([], [])
        expected = chosen_by_heap(superset, 12, guesses, said, *chain)
        assert set(report.paths) == {path for _, _, path in expected}
        assert [row[: superset.width] for row in report.guesses.rows] == guesses
        assert report.candidates[0] == root
        seen.add(report.paths)
        text += [report.candidates[row] for row in report.rows]
        root = report.next
        assert text == PROMPT + text[12:]
        assert runner.cache.length == len(text)
    assert len(seen) > 5


def test_the_last_tree_shows_its_proposers(backbone: Any, greedy_text: Any) -> None:
    engine = make_engine(
        backbone, OracleHeads(4, 64, greedy_text, (0, 1)), "dynamic-16", copies=True
    )
    for step in engine.generate(PROMPT, Sampling(max_new_tokens=NEW)):
        shown = engine.candidates()
        assert shown is not None
        assert len(shown.paths) == len(shown.texts) == step.nodes == 16
        heads = [proposer(shown.paths[row]) for row in shown.accepted]
        assert heads[: len(step.tokens)] == [token.head for token in step.tokens][: len(heads)]


# ---- names, forecasts, calibration ----


def test_trees_by_name(backbone: Any) -> None:
    accuracy = PUBLISHED.pruned(3, 64)
    tree = shaped_tree("dynamic-16", accuracy)
    assert (len(tree), tree.depth, tree.origin) == (16, 3, "dynamic-16")
    assert isinstance(tree, DynamicTree)
    assert len(tree.superset) == min(SUPERSET, 1 + 5 + 25 + 125)
    static = shaped_tree("static-16", accuracy)
    assert isinstance(static, Tree)
    assert (static.paths, static.origin) == (grow(accuracy, 16)[0].paths, "static-16")
    assert shaped_tree("chain-2", accuracy).origin == "chain of 2"
    for name in ("dynamic-1", "static-0", "dynamic-257", "static-99999999999"):
        with pytest.raises(UserError, match="2 to 256 nodes"):
            shaped_tree(name, accuracy)
    for name in ("dynamic-", "dynamic", "static-x", "chain-²"):
        with pytest.raises(UserError, match="unknown tree"):
            shaped_tree(name, accuracy)
    engine = make_engine(backbone, random_heads(backbone, 1), "dynamic-64")
    assert (
        engine.trees.describe() == "dynamic-6: 6 nodes, depth 1"
    )  # one head whose best 5 guesses were measured
    assert {"dynamic-16", "static-64", "chain-1"} <= set(engine.trees.names())
    engine.trees.use(DynamicTree(random_tree(1, 30, 4, 4), 20))
    assert engine.trees.current.depth == 1
    assert "pruned from 20 nodes" in engine.notices.pop()
    with pytest.raises(ValueError, match="cannot choose 9 nodes of 3"):
        DynamicTree(Tree.of([[0], [1]]), 9)


def test_forecasts_of_dynamic_trees_lie_between_what_was_measured() -> None:
    accuracy = Accuracy(((0.5, 0.6),), dynamic={8: 2.0, 32: 3.0})
    lengths = [accuracy.forecast_dynamic(nodes) for nodes in (1, 8, 16, 32, 64)]
    assert lengths == pytest.approx([1.0, 2.0, 2.5, 3.0, 3.0])
    assert accuracy.pruned(1, 1).forecast_dynamic(8) == 2.0
    assert accuracy.pruned(0, 1).forecast_dynamic(8) is None
    tree = dynamic_tree(accuracy, 3)
    assert accuracy.forecast(tree) == accuracy.forecast_dynamic(3)
    assert Accuracy(((0.5,),)).forecast(tree) is None


def test_a_calibration_is_found_again() -> None:
    draw = torch.Generator().manual_seed(1)
    log_p = -4 * torch.rand(6000, generator=draw)
    chance = (1.5 * log_p + 0.4).clamp(max=-1e-3).exp()
    right = (torch.rand(6000, generator=draw) < chance).float()
    assert fit(log_p, right) == pytest.approx((1.5, 0.4), abs=0.1)
    assert fit(log_p, torch.zeros(6000)) == fit(log_p[:0], right[:0]) == (1.0, 0.0)


def test_the_walk_of_a_dynamic_tree_is_the_decoding_of_the_bundled_model() -> None:
    """And more is accepted than with the fixed tree of as many nodes."""
    engine = medusa_chat.load(
        dtype="float32", tree="chain-1", probing=False, copies=False, engine="torch"
    )
    said = [
        "Hello!",
        "Tell me a short fairy tale.",
        "What is the capital of France?",
        "I need a cheap hotel, please.",
    ]
    accuracy = engine.runner.accuracy
    replies: list[Observed] = []
    lengths: dict[str, float] = {}
    assert len(accuracy.calibration) == engine.heads
    for name in ("static-12", "dynamic-12"):
        engine.trees.use(name)
        stats = Stats()
        for text in said:
            asked: list[Message] = [{"role": "user", "content": text}]
            ids = engine.encode(asked)
            steps = list(engine.generate(ids, Sampling(max_new_tokens=96)))
            for step in steps:
                stats.add(step)
            if name == "dynamic-12":
                replies.append(observe(engine, ids, ids_of(steps), Sampling()))
        lengths[name] = stats.acceptance_length or 0.0
    tree = engine.trees.current
    assert isinstance(tree, DynamicTree)
    guessing = engine.runner.guessing("none", accuracy)
    assert dynamic_length(tree, guessing, replies) == pytest.approx(lengths["dynamic-12"], rel=0.02)
    assert lengths["dynamic-12"] > lengths["static-12"] - 0.1
    assert "expected" in engine.trees.describe()


def test_log_p_of_a_reply_are_the_heads_own(backbone: Any) -> None:
    engine = make_engine(backbone, random_heads(backbone, 2), "chain-2")
    answer = reply(engine, PROMPT, max_new_tokens=9)
    observed = observe(engine, PROMPT, answer, Sampling())
    log_p = observed.candidates.log_p
    assert log_p is not None
    assert log_p.shape == (8, 2, CANDIDATES)
    assert (log_p.diff(dim=-1) <= 0).all()
    assert float(log_p.exp().sum(-1).max()) <= 1 + 1e-5
    assert exp(float(log_p.max())) <= 1
