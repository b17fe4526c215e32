"""The static step, recorded and replayed on the CPU, against the eager step.

The text is the same in every mode, whatever changes between the replays. And: what is recorded
when, what is kept, and steps that cannot be recorded.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from medusa_chat.config import Sampling
from medusa_chat.decoding import fast, noise
from medusa_chat.decoding.acceptance import make_rule
from medusa_chat.decoding.draft.copies import CHAIN, Copied
from medusa_chat.decoding.graphs import capture, static_step
from medusa_chat.decoding.graphs.static_step import StaticStep
from medusa_chat.decoding.runner import Runner
from medusa_chat.decoding.trees.accuracy import PUBLISHED, Accuracy
from medusa_chat.decoding.trees.tree import AnyTree, DynamicTree, Tree
from medusa_chat.model.heads import LinearHeads, decoding_heads
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
    from medusa_chat.decoding.graphs.static_step import Key, Program
    from medusa_chat.model.backbone import Backbone

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


def runners(backbone: Backbone, capacity: int = 512, **settings: Any) -> list[Runner]:
    heads = random_heads(backbone)
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
        expected = reply(eager, PROMPT * 2, max_new_tokens=30, **settings)
        assert reply(fixed, PROMPT * 2, max_new_tokens=30, **settings) == expected
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
    assert any(key[0] == "forward" and key[1] == 1 + CHAIN for key in tape.made)


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


def same_step(
    both: list[Runner], root: int, tree: AnyTree, rule: Any, copied: Copied | None = None
) -> int:
    """Take a step twice and compare; returns the next root."""
    eager, fixed = (runner.step(root, tree, rule, copied) for runner in both)
    assert eager == fixed
    assert both[0].cache.length == both[1].cache.length
    return eager.next


def test_a_step_up_to_the_end_of_the_cache() -> None:
    rule, tree = make_rule(Sampling()), TREES["tree"]
    both = runners(random_backbone("llama"), 30 + len(tree))
    (root,) = {runner.prefill(prompt_ids(30), rule) for runner in both}
    same_step(both, root, tree, rule)


# ---- what is recorded ----


def families() -> dict[str, list[AnyTree]]:
    """Trees of as many nodes, of different depths, widths and supersets."""
    fixed: list[AnyTree] = [
        random_tree(seed, 11, depth, 4, spine=depth) for seed, depth in ((1, 4), (2, 2), (3, 3))
    ]
    supersets = [
        random_tree(seed, size, depth, 5, spine=depth)
        for seed, size, depth in ((4, 40, 4), (5, 25, 3))
    ]
    return {"fixed": fixed, "dynamic": [DynamicTree(superset, 12) for superset in supersets]}


@pytest.mark.parametrize("copied", [None, COPIED], ids=["heads", "copies"])
@pytest.mark.parametrize("family", ["fixed", "dynamic"])
def test_after_one_step_no_setting_and_no_tree_records_anything(
    family: str, copied: Any, tape: Recorder
) -> None:
    """Modes (vanilla too), numbers, seeds, trees of as many nodes, other accuracies; to and fro."""
    trees = families()[family]
    assert {len(tree) for tree in trees} == {12}
    both = runners(random_backbone("llama"))
    rule = make_rule(Sampling())
    for runner in both:
        runner.step(runner.prefill(PROMPT, rule), trees[0], rule, copied)
    first = dict(tape.made)
    assert tape.kinds() == {"layout": 2, "forward": 2, "acceptance": 10}
    for number, sampling in enumerate(SAMPLINGS.values()):
        for change in CHANGES:
            rule = make_rule(replace(sampling, **change))
            for runner in both:
                runner.trust(replace(PUBLISHED, calibration=((1.2 - number / 10, 0.1),) * 4))
                runner.cache.rewind(0)
            (root,) = {runner.prefill(PROMPT, rule) for runner in both}
            for tree in (*trees, trees[0]):
                root = same_step(both, root, tree, rule, copied)
                root = same_step(both, root, Tree(), rule)
    assert dict(tape.made) == first


def test_a_chat_records_for_new_node_counts_and_spans_alone(tape: Recorder) -> None:
    eager, fixed = pair("llama", tree=families()["fixed"][0])
    decode(fixed, PROMPT, max_new_tokens=5)
    first = tape.made.total()
    for tree in families()["fixed"]:
        for engine in (eager, fixed):
            engine.trees.use(tree)
        for sampling in (
            *SAMPLINGS.values(),
            Sampling(mode="vanilla", temperature=0),
            Sampling(mode="vanilla"),
        ):
            said = [
                ids_of(list(engine.generate(PROMPT, replace(sampling, max_new_tokens=8))))
                for engine in (eager, fixed)
            ]
            assert said[0] == said[1]
    assert tape.made.total() == first
    decode(fixed, PROMPT, max_new_tokens=60)  # the text outgrows its span
    assert tape.kinds()["forward"] == 4
    assert tape.made.total() == first + 2
    fixed.trees.use("chain-2")
    decode(fixed, PROMPT, max_new_tokens=5)
    assert tape.made.total() == first + 2 + 7


# ---- what is kept ----


def test_what_is_recorded_and_buffered_does_not_grow_with_a_chat(
    tape: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static_step, "MOST", {"layout": 5, "forward": 4, "acceptance": 25})
    both = runners(random_backbone("llama"), accuracy=Accuracy(PUBLISHED.top))
    rules = [make_rule(sampling) for sampling in SAMPLINGS.values()]
    step = both[1].fast
    assert isinstance(step, StaticStep)
    (root,) = {runner.prefill(PROMPT, rules[0]) for runner in both}
    sizes = set()
    for number in range(60):
        superset = random_tree(number, 20 + number, 4, 4, spine=4)
        tree = (
            DynamicTree(superset, 5 + number % 9)
            if number % 2
            else random_tree(number, 3 + number % 13, 4, 4, spine=3)
        )
        root = same_step(both, root, tree, rules[number % 5], COPIED if number % 3 else None)
        sizes.add(len(tree))
        assert len(step.programs) == len(tape.alive) <= 5 + 4 + 25
        assert set(step.drafts) == {key[1] for key in step.programs if key[0] == "layout"}
    assert len(sizes) > 12
    assert max(tape.made.values()) > 1  # some were let go, and recorded again
    assert list(step.buffers) == [32]
    before = {id(tensor) for tensor in vars(step.buffers[32]).values()}
    both[1].step(root, random_tree(1, 40, 4, 4, spine=4), rules[0])
    assert list(step.buffers) == [32, 64]
    assert {
        id(tensor) for tensor in vars(step.buffers[32]).values()
    } == before  # recorded, so they may not move


def test_what_the_noise_is_made_of_is_held_though_its_cache_lets_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fast, "not_recorded", capture.not_recorded)
    runner = runners(random_backbone("llama"))[1]
    rule = make_rule(SAMPLINGS["exact"])
    used = []
    for tree in families()["fixed"][0], TREES["dynamic"]:
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
@pytest.mark.parametrize("fine", [0, 14], ids=["at once", "when the text grows"])
def test_a_step_that_cannot_be_recorded_is_taken_eagerly(
    sort: str, fine: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Failing(sort, fine)
    monkeypatch.setattr(fast, "not_recorded", recorder)
    eager, fixed = pair("llama", tree=families()["fixed"][0])
    for number, sampling in enumerate(SAMPLINGS.values()):
        how = replace(sampling, max_new_tokens=60 if number == 0 else 10)
        said = [list(engine.generate(PROMPT, how)) for engine in (eager, fixed)]
        assert ids_of(said[0]) == ids_of(said[1])
        assert [len(step.tokens) for step in said[0]] == [len(step.tokens) for step in said[1]]
        fixed.trees.use(families()["fixed"][number % 3])
        eager.trees.use(families()["fixed"][number % 3])
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
    monkeypatch.setattr(fast, "not_recorded", Failing("acceptance", 9, error))
    both = runners(random_backbone("llama"))
    rule = make_rule(Sampling())
    (root,) = {runner.prefill(PROMPT, rule) for runner in both}
    for _ in range(5):
        root = same_step(both, root, TREES["tree"], rule)
    assert len(both[1].notices) == 1
    assert type(error).__name__ in both[1].notices[0] or str(error) in both[1].notices[0]


def test_an_interrupt_while_recording_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "not_recorded", Failing("acceptance", 3, KeyboardInterrupt()))  # type: ignore[arg-type]
    eager, fixed = pair("llama", tree=TREES["tree"])
    with pytest.raises(KeyboardInterrupt):
        decode(fixed, PROMPT, max_new_tokens=20)
    assert isinstance(fixed.runner.fast, StaticStep)
    fixed.runner.fast.record = Recorder()
    assert reply(fixed, PROMPT, max_new_tokens=20) == reply(eager, PROMPT, max_new_tokens=20)


# ---- what is known to read values on the host ----


def test_int8_in_backbone_or_heads_and_dynamic_rope_cannot_be_recorded() -> None:
    backbone = random_backbone("llama")

    def heads(quant: Any) -> Any:
        return decoding_heads(
            random_heads(backbone, own=True), quant, CPU, torch.float32, backbone.lm_head
        )

    assert not capture.reads_the_host(backbone, None)
    for quant in ("none", "nf4", "nf4-double"):
        assert not capture.reads_the_host(backbone, heads(quant))
    int8 = LinearHeads(1, Linear8bitLt(), [], [], None)
    assert capture.reads_the_host(backbone, int8)
    backbone.model.extra = Linear8bitLt()
    assert capture.reads_the_host(backbone, None)


class Linear8bitLt(nn.Module):
    """As bitsandbytes' is called, which on a CPU is laid out anew as another kind of layer."""


ROPE = {"rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("rope", "reads"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, False),
        ({"rope_type": "linear", **ROPE}, False),
        ({"rope_type": "dynamic", **ROPE}, True),
        (
            {
                "full_attention": {"rope_type": "dynamic", **ROPE},
                "sliding_attention": {"rope_type": "default"},
            },
            True,
        ),
        (
            {
                "full_attention": {"rope_type": "linear", **ROPE},
                "sliding_attention": {"rope_type": "default"},
            },
            False,
        ),
    ],
)
def test_rope_that_compares_the_position_cannot_be_recorded(rope: Any, reads: bool) -> None:
    backbone = random_backbone("llama")
    backbone.config.rope_parameters = rope
    assert capture.reads_the_host(backbone, None) is reads
    assert not capture.capturable(backbone, None)  # no CUDA here
