"""The static step, recorded and replayed on the CPU, against the eager step.

The text is the same in every mode, whatever changes between the replays. And: what is recorded
when, what is kept, and steps that cannot be recorded.
"""

from __future__ import annotations

import gc
import random
import weakref
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medusa_chat.decoding import fast, noise
from medusa_chat.decoding.acceptance import make_rule
from medusa_chat.decoding.draft.base import bucket_of
from medusa_chat.decoding.draft.copies import CHAIN, Copied
from medusa_chat.decoding.graphs import capture, static_step
from medusa_chat.decoding.graphs.static_step import StaticStep
from medusa_chat.decoding.runner import Runner
from medusa_chat.decoding.trees.accuracy import PUBLISHED
from medusa_chat.decoding.trees.tree import AnyTree, DynamicTree, Tree
from medusa_chat.model.attention.tree_attention import chain_mask
from medusa_chat.model.head_vocabulary import HeadVocabulary
from medusa_chat.sampling import Sampling
from tests.helpers.recording import Recorder
from tests.helpers.tiny import (
    decode,
    ids_of,
    make_engine,
    prompt_ids,
    random_backbone,
    random_heads,
    random_tree,
    reply,
)

if TYPE_CHECKING:
    from medusa_chat.decoding.engine import Engine
    from medusa_chat.decoding.graphs.capture import Key, Program
    from medusa_chat.model.backbone import Backbone
    from medusa_chat.model.heads import MedusaHeads

CPU = torch.device("cpu")
PROMPT = prompt_ids(20)
COPIED = Copied(tuple(prompt_ids(CHAIN)), (-0.5,) * CHAIN, 1)
TREES: dict[str, AnyTree] = {
    "root": Tree(),
    "tree": random_tree(3, 20, 4, 4, spine=4),
    "wide": random_tree(4, 6, 2, 30, spine=2),
    "dynamic": DynamicTree(random_tree(5, 40, 4, 4, spine=4), 12),
}
SAMPLINGS = {
    "greedy": Sampling(),
    "typical": Sampling(mode="typical", seed=3),
    "exact": Sampling(mode="exact", seed=4),
    "typical cut": Sampling(mode="typical", top_p=0.8, seed=5),
    "exact cut": Sampling(mode="exact", top_k=7, min_p=0.05, temperature=1.3, seed=6),
}
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"seed": 9},
    {"temperature": 0.3},
    {"epsilon": 0.2, "delta": 0.6},
)


@pytest.fixture(autouse=True)
def tape(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Record steps that are not eager, with spans so short that texts outgrow several."""
    recorder = Recorder()
    monkeypatch.setattr(fast, "not_recorded", recorder)
    monkeypatch.setattr(static_step, "SHORTEST_SPAN", 16)
    monkeypatch.setattr(static_step, "ROWS", 32)
    return recorder


def pair(kind: str, **settings: Any) -> tuple[Engine, Engine]:
    """An eager engine and a static one over the same model."""
    backbone = random_backbone(kind)
    heads = random_heads(backbone)
    return tuple(make_engine(backbone, heads, eager=eager, **settings) for eager in (True, False))  # type: ignore


def runners(
    backbone: Backbone, capacity: int = 512, heads: MedusaHeads | None = None, **settings: Any
) -> list[Runner]:
    heads = heads or random_heads(backbone)
    return [Runner(backbone, heads, capacity, eager=eager, **settings) for eager in (True, False)]


# ---- the same text ----


KINDS = ["llama", "qwen2", "mistral", "qwen3-mixed", "gemma2", "gemma3", "phi3-sliding"]


@pytest.mark.parametrize(
    ("kind", "tree"),
    [
        *((kind, TREES["tree"]) for kind in KINDS),
        ("llama", TREES["dynamic"]),
        ("gemma3", TREES["dynamic"]),
    ],
)
def test_the_text_is_that_of_the_eager_step(kind: str, tree: Any, tape: Recorder) -> None:
    """One engine each for all modes, with copies and rewinds between them."""
    eager, fixed = pair(kind, tree=tree, copies=True)
    for sampling in (*SAMPLINGS.values(), Sampling(mode="vanilla", temperature=0), Sampling()):
        settings = {
            "mode": sampling.mode,
            "seed": sampling.seed,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
        expected = reply(eager, PROMPT * 2, max_new_tokens=24, **settings)
        assert reply(fixed, PROMPT * 2, max_new_tokens=24, **settings) == expected
    assert any(key[0] == "layout" and CHAIN in key[1] for key in tape.made)  # type: ignore[operator]
    assert set(tape.made.values()) == {1}


def test_copies_alone_without_heads(tape: Recorder) -> None:
    backbone = random_backbone("llama")
    eager, fixed = (make_engine(backbone, None, eager=how, copies=True) for how in (True, False))
    for sampling in SAMPLINGS.values():
        how = replace(sampling, max_new_tokens=30)
        said = [list(engine.generate(PROMPT * 3, how)) for engine in (eager, fixed)]
        assert ids_of(said[0]) == ids_of(said[1])
        assert [step.nodes for step in said[0]] == [step.nodes for step in said[1]]
    assert any(key[0] == "forward" and key[1] == bucket_of(1 + CHAIN) for key in tape.made)


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("how", SAMPLINGS)
def test_a_report_is_that_of_the_eager_step(name: str, how: str) -> None:
    """Step by step, down to the buffers; the static step goes through every span on the way."""
    rule = make_rule(SAMPLINGS[how])
    both = runners(random_backbone("gemma2"))
    roots = {runner.prefill(PROMPT, rule) for runner in both}
    root = roots.pop()
    assert not roots
    for _ in range(20):
        root = same_step(both, root, TREES[name], rule)
        length = both[0].cache.length
        buffers = [runner.cache.buffer[:, :, :, :length] for runner in both]
        torch.testing.assert_close(*buffers, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(both[0].state.hidden, both[1].state.hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cut", [False, True], ids=["all tokens", "some tokens"])
@pytest.mark.parametrize("how", ["greedy", "exact", "exact cut"])
def test_a_parent_bias_is_recorded_too(how: str, cut: bool, tape: Recorder) -> None:
    """And trees of one size share the recording."""
    backbone = random_backbone("llama")
    vocabulary = HeadVocabulary(torch.arange(20, 60), 64) if cut else None
    heads = random_heads(backbone, vocabulary=vocabulary, parent_bias=6)
    rule, both = make_rule(SAMPLINGS[how]), runners(backbone, heads=heads)
    (root,) = {runner.prefill(PROMPT, rule) for runner in both}
    for number in range(3):
        for tree in trees_of(9, 16):
            root = same_step(both, root, tree.pruned(4, 10), rule, COPIED if number else None)
    assert set(tape.made.values()) == {1}
    assert tape.kinds()["layout"] <= 4


def same_step(
    both: list[Runner], root: int, tree: AnyTree, rule: Any, copied: Copied | None = None
) -> int:
    """Take a step twice and compare; returns the next root."""
    eager, fixed = (runner.step(root, tree, rule, copied) for runner in both)
    assert (eager, eager.guesses) == (fixed, fixed.guesses)
    assert both[0].cache.length == both[1].cache.length
    return eager.next


def test_a_step_up_to_the_end_of_the_cache() -> None:
    rule, tree = make_rule(Sampling()), TREES["tree"]
    both = runners(random_backbone("llama"), 30 + bucket_of(len(tree)))
    (root,) = {runner.prefill(prompt_ids(30), rule) for runner in both}
    same_step(both, root, tree, rule)


# ---- what is recorded ----


def trees_of(least: int, most: int) -> list[AnyTree]:
    """Trees of between so many nodes: of different depths, widths and supersets, of both kinds."""
    shapes = [(1, 4, 4), (2, 2, 4), (3, 3, 9), (4, 4, 5), (5, 3, 3), (6, 1, 10)]
    fixed = [random_tree(seed, least - 1, depth, width) for seed, depth, width in shapes]
    supersets = [random_tree(seed, 12 * seed, 4, 5, spine=4) for seed in (3, 4, 5)]
    drawn = [DynamicTree(superset, least + n) for n, superset in enumerate(supersets)]
    trees: list[AnyTree] = [*fixed, *drawn]
    return [tree for tree in trees if least <= len(tree) <= most]


def test_after_the_first_use_of_each_kind_nothing_is_recorded_in_200_replies(
    tape: Recorder,
) -> None:
    """Modes, settings, seeds, trees, copies and accuracies change, and the steps stay the eager's.

    The first eight replies use each kind of rule and of tree once.
    """
    chance = random.Random(0)
    trees = trees_of(9, 16)
    assert len({len(tree) for tree in trees}) > 2
    both = runners(random_backbone("llama"))
    kinds = [trees[0], trees[-1]]
    samplings = list(SAMPLINGS.values())
    firsts = [(tree, rule, copy) for tree in kinds for rule in samplings for copy in (None, COPIED)]
    for number in range(200 + len(firsts)):
        tree, sampling, copied = (
            firsts[number]
            if number < len(firsts)
            else (chance.choice(trees), chance.choice(samplings), chance.choice([None, COPIED]))
        )
        if number == len(firsts):
            known = tape.made.total()
        rule = make_rule(replace(sampling, **chance.choice(CHANGES)))
        if number % 20 == 0:
            for runner in both:
                runner.trust(replace(PUBLISHED, calibration=((1.2 - number / 400, 0.1),) * 4))
        compared = both if number % 5 == 0 else both[1:]
        for runner in compared:
            runner.cache.rewind(0)
        (root,) = {runner.prefill(PROMPT, rule) for runner in compared}
        for verified, copies in ((tree, copied), (Tree(), None)):
            report, *others = (runner.step(root, verified, rule, copies) for runner in compared)
            for other in others:
                assert (report, report.guesses) == (other, other.guesses)
            root = report.next
    assert tape.made.total() == known
    assert set(tape.made.values()) == {1}
    # Vanilla steps, then steps of 16 rows: fixed and dynamic ones, each with copies and without.
    # Guesses that noise ranks, with truncation and without, are laid out by others.
    assert tape.kinds() == {"layout": 1 + 12, "forward": 2, "acceptance": 5 + 10}


def test_a_chat_records_for_new_rows_and_spans_alone(tape: Recorder) -> None:
    eager, fixed = pair("llama", tree=trees_of(9, 16)[0])
    decode(fixed, PROMPT, max_new_tokens=5)
    assert tape.kinds() == {"layout": 1, "forward": 1, "acceptance": 1}
    decode(fixed, PROMPT, max_new_tokens=60)  # the text outgrows its span
    assert tape.kinds() == {"layout": 1, "forward": 2, "acceptance": 1}
    for tree in ("static-10", "static-13", "chain-2"):
        for engine in (eager, fixed):
            engine.trees.use(tree)
        assert reply(fixed, PROMPT, max_new_tokens=8) == reply(eager, PROMPT, max_new_tokens=8)
    assert tape.kinds() == {"layout": 2, "forward": 3, "acceptance": 2}


def test_penalties_are_recorded_once_and_count_what_was_kept(tape: Recorder) -> None:
    eager, fixed = pair("llama", tree=TREES["tree"])
    for penalty in (1.3, 1.7):
        settings = {"repetition_penalty": penalty, "max_new_tokens": 12}
        assert reply(fixed, PROMPT, **settings) == reply(eager, PROMPT, **settings)
    assert tape.kinds()["acceptance"] == 1
    assert reply(fixed, PROMPT, max_new_tokens=12) == reply(eager, PROMPT, max_new_tokens=12)
    assert tape.kinds()["acceptance"] == 2


def test_python_collects_nothing_while_a_step_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph that the collector frees spoils a recording."""
    enabled = []

    def record(_key: Key, program: Program) -> Program:
        enabled.append(gc.isenabled())
        return program

    monkeypatch.setattr(fast, "not_recorded", record)
    decode(pair("llama")[1], PROMPT, max_new_tokens=3)
    assert set(enabled) == {False}
    assert gc.isenabled()


def test_a_rule_recorded_later_sees_the_depths_of_its_own_step() -> None:
    """Its warm-up may not index by those that a deeper step left behind."""
    both = runners(random_backbone("llama"))
    greedy, exact = make_rule(SAMPLINGS["greedy"]), make_rule(SAMPLINGS["exact"])
    (root,) = {runner.prefill(PROMPT, greedy) for runner in both}
    flat, superset = random_tree(1, 11, 1, 16), random_tree(2, 11, 1, 16)
    root = same_step(both, root, flat, greedy)
    certain = Copied(COPIED.tokens, (-1e-3,) * CHAIN, 8)
    root = same_step(both, root, superset, greedy, certain)  # a chain of ten nodes
    same_step(both, root, flat, exact)


def test_a_runner_is_freed_without_the_collector(tape: Recorder) -> None:
    """Or a graph would be freed at some later time, maybe in the middle of a recording."""
    runner = runners(random_backbone("llama"))[1]
    rule = make_rule(Sampling())
    runner.step(runner.prefill(PROMPT, rule), TREES["tree"], rule)
    assert len(tape.alive) == 3
    gc.disable()
    try:
        del runner
        assert len(tape.alive) == 0
    finally:
        gc.enable()


# ---- what is kept ----


def test_what_the_noise_is_made_of_is_held_though_its_cache_lets_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fast, "not_recorded", capture.not_recorded)
    runner = runners(random_backbone("llama"))[1]
    rule = make_rule(SAMPLINGS["exact"])
    used = []
    for tree in TREES["tree"], TREES["dynamic"]:
        noise.token_keys.cache_clear()
        runner.step(runner.prefill(PROMPT, rule), tree, rule)
        used.append(weakref.ref(noise.token_keys(64, CPU)))
    noise.token_keys.cache_clear()
    assert [keys() is None for keys in used] == [False, False]
    assert used[0]() is not used[1]()


# ---- steps that cannot be recorded ----


class Failing(Recorder):
    """Cannot record one sort of program, or only so many programs."""

    def __init__(self, sort: str, fine: int = 0, error: Exception | None = None) -> None:
        super().__init__()
        self.sort, self.fine = sort, fine
        self.error = error or RuntimeError(
            "operation not permitted when stream is capturing\nCompile with `...`"
        )

    def __call__(self, key: Key, program: Program) -> Program:
        if key[0] == self.sort and self.made.total() >= self.fine:
            program()  # what a warm-up leaves behind may not be seen
            raise type(self.error)(*self.error.args)  # a kept one would keep what its traceback saw
        return super().__call__(key, program)


@pytest.mark.parametrize("sort", ["layout", "forward", "acceptance"])
@pytest.mark.parametrize("fine", [0, 9], ids=["at once", "when the text grows"])
def test_a_step_that_cannot_be_recorded_is_taken_eagerly(
    sort: str, fine: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Failing(sort, fine)
    monkeypatch.setattr(fast, "not_recorded", recorder)
    trees = trees_of(9, 16)
    eager, fixed = pair("llama", tree=trees[0])
    for sampling in SAMPLINGS.values():
        how = replace(sampling, max_new_tokens=10)
        said = [ids_of(list(engine.generate(PROMPT, how))) for engine in (eager, fixed)]
        assert said[0] == said[1]
    for number, sampling in enumerate(SAMPLINGS.values()):
        how = replace(sampling, max_new_tokens=60 if number == 0 else 10)
        steps = [list(engine.generate(PROMPT, how)) for engine in (eager, fixed)]
        assert ids_of(steps[0]) == ids_of(steps[1])
        assert [len(step.tokens) for step in steps[0]] == [len(step.tokens) for step in steps[1]]
        fixed.trees.use(trees[number % 3])
        eager.trees.use(trees[number % 3])
    fails = fine == 0 or sort == "forward"
    assert (fixed.runner.fast is None) is fails
    assert len(fixed.notices) == fails
    if fails:
        notice = fixed.notices[0]
        assert "operation not permitted when stream is capturing)" in notice
        assert "--eager" in notice
        assert "\n" not in notice
        assert not recorder.alive


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried"), NotImplementedError(), KeyError("x")],
)
def test_whatever_it_is_that_cannot_be_recorded(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "not_recorded", Failing("acceptance", 2, error))
    both = runners(random_backbone("llama"))
    rule = make_rule(Sampling())
    (root,) = {runner.prefill(PROMPT, rule) for runner in both}
    for _ in range(5):
        root = same_step(both, root, TREES["tree"], rule)
    assert len(both[1].notices) == 1
    assert type(error).__name__ in both[1].notices[0] or str(error) in both[1].notices[0]


def test_an_interrupt_while_recording_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "not_recorded", Failing("acceptance", 2, KeyboardInterrupt()))  # type: ignore[arg-type]
    eager, fixed = pair("llama", tree=TREES["tree"])
    with pytest.raises(KeyboardInterrupt):
        decode(fixed, PROMPT, max_new_tokens=20)
    assert isinstance(fixed.runner.fast, StaticStep)
    fixed.runner.fast.record = Recorder()
    assert reply(fixed, PROMPT, max_new_tokens=20) == reply(eager, PROMPT, max_new_tokens=20)


# ---- what is known to read values on the host ----


class Linear8bitLt(nn.Module):
    """As bitsandbytes' is called, which on a CPU is laid out anew as another kind of layer."""


def test_int8_and_tensors_elsewhere_cannot_be_recorded() -> None:
    assert capture.stays_on(CPU, nn.Linear(2, 2))
    assert not capture.stays_on(CPU, Linear8bitLt())
    assert not capture.stays_on(CPU, nn.Linear(2, 2, device="meta"))
    constants = nn.Module()
    constants.register_buffer("table", torch.zeros(2, device="meta"))
    assert not capture.stays_on(CPU, constants)
    assert not capture.capturable(random_backbone("llama"), None)  # no CUDA here


LONG = {"short_factor": [1.1] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 99}


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic"}, {"rope_type": "longrope", **LONG}])
def test_rope_looks_at_no_position_in_a_step(rope: dict[str, Any]) -> None:
    """The recorder refuses to. Contexts end where these kinds would change their frequencies."""
    rope = {"rope_theta": 1e4, "factor": 2.0} | rope
    backbone = random_backbone("llama", rope_parameters=rope)
    heads = random_heads(backbone)
    eager, fixed = (make_engine(backbone, heads, eager=how, context=90) for how in (True, False))
    assert reply(fixed, PROMPT, max_new_tokens=30) == reply(eager, PROMPT, max_new_tokens=30)
    assert not fixed.notices


# ---- steps that run while the one before is shown ----


class Launches(Recorder):
    """Counts the forwards that were replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = 0

    def __call__(self, key: Key, program: Program) -> Program:
        replay = super().__call__(key, program)

        def counted() -> None:
            self.forwards += key[0] == "forward"
            replay()

        return counted


def test_the_next_step_runs_before_this_one_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Launches()
    monkeypatch.setattr(fast, "not_recorded", recorder)
    engine = pair("llama", tree=TREES["tree"])[1]
    shown = 0
    for shown, step in enumerate(engine.generate(PROMPT, Sampling(max_new_tokens=12)), 1):
        assert recorder.forwards == shown + (not step.finish)
    assert recorder.forwards == shown > 3


@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_reply_ends_anywhere_and_the_cache_is_right(data: st.DataObject) -> None:
    """Closed after any step, or by a stop string or a limit, with the next step on its way."""
    backbone = random_backbone("llama")
    heads, tree = random_heads(backbone), TREES["tree"]
    engine = make_engine(backbone, heads, tree=tree, eager=False, copies=True)
    for _ in range(3):
        how = data.draw(st.sampled_from(list(SAMPLINGS.values())))
        stop = data.draw(st.sampled_from([(), ("a",), ("#", "7")]))
        how = replace(how, max_new_tokens=data.draw(st.integers(1, 14)), stop=stop)
        with closing(engine.generate(PROMPT, how)) as steps:
            list(islice(steps, data.draw(st.integers(1, 5))))
        length = engine.runner.cache.length
        assert engine.text[:length] == engine.text
        fresh = backbone.new_cache(length + 1)
        ids = torch.tensor(engine.text)
        mask = chain_mask(len(ids), torch.float32, CPU)
        with torch.inference_mode():
            backbone.hidden(ids, torch.arange(len(ids)), mask, fresh)
        kept = engine.runner.cache.buffer[:, :, :, :length]
        torch.testing.assert_close(kept, fresh.buffer[:, :, :, : len(ids)], rtol=1e-4, atol=1e-4)
    expected = reply(make_engine(backbone, heads, tree=tree, eager=True), PROMPT, max_new_tokens=9)
    assert reply(engine, PROMPT, max_new_tokens=9) == expected
