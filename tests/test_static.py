"""The static step, run on the CPU, against the eager step: same text in every mode, and nothing read on the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import make_engine, prompt_ids, random_backbone, random_heads, random_tree, reply
from torch.utils._python_dispatch import TorchDispatchMode

from medusa_chat.config import Sampling
from medusa_chat.decoding import runner as runner_module
from medusa_chat.decoding import static
from medusa_chat.decoding.acceptance import make_rule
from medusa_chat.decoding.engine import Engine
from medusa_chat.decoding.runner import Runner
from medusa_chat.decoding.tree import DynamicTree, Tree

PROMPT = prompt_ids(20)
TREES = {
    "root": Tree(), "tree": random_tree(3, 20, 4, 4, spine=4), "wide": random_tree(4, 6, 2, 30, spine=2),
    "dynamic": DynamicTree(random_tree(5, 40, 4, 4, spine=4), 12),
}  # fmt: skip
SAMPLINGS = {
    "greedy": Sampling(), "typical": Sampling(mode="typical", seed=3), "exact": Sampling(mode="exact", seed=4),
    "typical cut": Sampling(mode="typical", top_p=0.8, seed=5),
    "exact cut": Sampling(mode="exact", top_k=7, min_p=0.05, temperature=1.3, seed=6),
}  # fmt: skip


class NoHostReads(TorchDispatchMode):
    """Refuses what a CUDA graph cannot record: a tensor's value or a shape that depends on it, or data of the host."""

    refused = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "item", "equal")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().split("::")[1].split(".")[0]
        assert name not in self.refused, f"{name} reads or needs the host"
        return function(*args, **(kwargs or {}))


def recorded(key: Any, program: static.Program) -> None:
    """A program as it stands the first time, then as a recording could run it."""
    with NoHostReads() if key in SEEN else torch.inference_mode():
        program()
    SEEN.add(key)


SEEN: set[Any] = set()


@pytest.fixture(autouse=True)
def _recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Steps are static ones that may not look, with spans short enough that texts outgrow several."""
    SEEN.clear()
    monkeypatch.setattr(runner_module, "at_once", recorded)
    monkeypatch.setattr(static, "SHORTEST_SPAN", 16)
    yield


def pair(kind: str, **settings: Any) -> tuple[Engine, Engine]:
    """An eager engine and a static one over the same model."""
    backbone = random_backbone(kind)
    heads = random_heads(backbone)
    return tuple(make_engine(backbone, heads, eager=eager, **settings) for eager in (True, False))  # type: ignore


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "qwen3-mixed", "gemma2", "gemma3", "phi3-sliding"])
@pytest.mark.parametrize("tree", [TREES["tree"], TREES["dynamic"]], ids=["tree", "dynamic"])
def test_the_text_is_that_of_the_eager_step(kind: str, tree: Any) -> None:
    """One engine each for all modes, with copies and rewinds between them."""
    eager, fixed = pair(kind, tree=tree, copies=True)
    for sampling in (*SAMPLINGS.values(), Sampling(mode="vanilla"), Sampling()):
        settings = {"mode": sampling.mode, "seed": sampling.seed, "top_p": sampling.top_p, "top_k": sampling.top_k}
        expected = reply(eager, PROMPT * 2, max_new_tokens=40, **settings)
        assert reply(fixed, PROMPT * 2, max_new_tokens=40, **settings) == expected
    assert any(key[0] == "nodes" and getattr(key[1], "selector", None) and key[1].selector.chain for key in SEEN)


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("how", SAMPLINGS)
def test_an_outcome_is_that_of_the_eager_step(name: str, how: str) -> None:
    """Step by step, down to the buffers; the static step goes through every span on the way."""
    backbone = random_backbone("gemma2")
    heads = random_heads(backbone)
    rule = make_rule(SAMPLINGS[how])
    runners = [Runner(backbone, heads, 512, eager=eager) for eager in (True, False)]
    roots = {runner.prefill(PROMPT, rule) for runner in runners}
    root = roots.pop()
    assert not roots
    for _ in range(30):
        eager, fixed = (runner.step(root, TREES[name], rule) for runner in runners)
        assert eager == fixed
        root, length = eager.next, runners[0].cache.length
        assert runners[1].cache.length == length
        buffers = [runner.cache.buffer[:, :, :, :length] for runner in runners]
        torch.testing.assert_close(*buffers, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(runners[0]._hidden, runners[1]._hidden, rtol=1e-4, atol=1e-4)


def test_other_samplings_and_trees_run_no_forward_of_their_own() -> None:
    """The forward is keyed by nodes and span alone, the settling by what differs in its operations."""
    backbone = random_backbone("llama")
    runner = Runner(backbone, random_heads(backbone), 512, eager=False)
    trees = [random_tree(seed, 11, 4, 4, spine=4) for seed in (1, 2)]
    assert len({len(tree) for tree in trees}) == 1
    for sampling in SAMPLINGS.values():
        for change in ({}, {"seed": 9}, {"temperature": 0.3}, {"epsilon": 0.2, "delta": 0.6}):
            rule = make_rule(replace(sampling, **change))
            for tree in trees:
                runner.cache.rewind(0)
                runner.step(runner.prefill([1, 2, 3], rule), tree, rule)
    kinds = [key[0] for key in SEEN]
    assert (kinds.count("nodes"), kinds.count("forward"), kinds.count("settle")) == (2, 1, 5)


def test_a_step_up_to_the_end_of_the_cache() -> None:
    backbone = random_backbone("llama")
    rule, tree = make_rule(Sampling()), TREES["tree"]
    runner = Runner(backbone, random_heads(backbone), 30 + len(tree), eager=False)
    root = runner.prefill(prompt_ids(30), rule)
    plain = Runner(backbone, runner.heads, 512, eager=True)
    assert plain.prefill(prompt_ids(30), rule) == root
    assert runner.step(root, tree, rule) == plain.step(root, tree, rule)
