"""bench and verify on a tiny model: the figures are those of the steps, and faults are found."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import END, make_engine, random_heads, random_model, save_model

import medusa_chat
from medusa_chat import bench, verify
from medusa_chat.config import Sampling
from medusa_chat.decoding.engine import Engine
from medusa_chat.decoding.runner import Outcome, Runner
from medusa_chat.events import Step
from medusa_chat.model.layouts import write_heads
from medusa_chat.prompts import Prompt
from medusa_chat.terminal import report

PROMPTS = [Prompt("t", ("Hi there",)), Prompt("t", ("Bye", "So long"))]


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = save_model(tmp_path_factory.mktemp("model"), random_model("llama", 320, pad_token_id=0, eos_token_id=END))
    write_heads(random_heads(make_engine_backbone(), own=False), place)
    return place


def make_engine_backbone() -> object:
    from tiny import random_backbone

    return random_backbone("llama", 320)


@pytest.fixture
def engine(folder: Path) -> Engine:
    return medusa_chat.load(str(folder), tree="mc_sim_7b_63", dtype="float32", probing=False)


def test_bench_measures_every_way_and_its_figures_hold_together(engine: Engine) -> None:
    drawn: list[Step] = []

    def view(steps: Iterable[Step]) -> None:
        drawn.extend(steps)

    plan = bench.Plan(PROMPTS, ["greedy", "typical"], Sampling(max_new_tokens=12), 2, True, view)
    result = bench.bench(engine, plan, quiet)
    json.dumps(result)
    assert set(result["modes"]) == {"greedy", "typical"}
    for mode in result["modes"].values():
        assert 1 <= mode["acceptance_length"] <= 5
        assert mode["overhead"] == pytest.approx(mode["step_ms"] / mode["vanilla_step_ms"], rel=0.5)
        assert mode["speedup"] == pytest.approx(
            mode["tokens_per_second"] / mode["vanilla_tokens_per_second"], rel=0.5
        )  # medians of two rounds
    assert result["peers"]["transformers"]["tokens_per_second"] > 0
    assert sum(len(step.tokens) for step in drawn) > 0
    assert result["prompts"] == 2
    assert result["device"]
    report.show_bench(result)


def test_each_baseline_samples_as_its_mode_does(engine: Engine) -> None:
    plan = bench.Plan(PROMPTS, ["greedy", "exact"], Sampling(max_new_tokens=8, temperature=1.0))
    ways = bench._ways(engine, plan)
    assert set(ways) == {"greedy", "exact", "vanilla", "vanilla-sampled"}
    counts = {name: way(PROMPTS[0]).stats.new_tokens for name, way in ways.items()}
    assert counts["greedy"] == counts["vanilla"]
    assert counts["exact"] == counts["vanilla-sampled"]


def test_verify_finds_no_fault_in_the_engine(engine: Engine) -> None:
    checks = verify.verify(engine, PROMPTS, Sampling(max_new_tokens=10), turns=1, progress=quiet)
    names = {check.name for check in checks}
    assert {"vanilla, generate()", "greedy, auto", "greedy, mc_sim_7b_63", "greedy, dynamic-16, copies"} <= names
    assert {"exact, auto, T=0.7, top-p=0.9", "exact, dynamic-16, copies, T=0.7, top-p=0.9"} <= names
    assert any(name.startswith("greedy, random") for name in names)
    assert all(check.replies == check.equal == 2 for check in checks)
    report.show_checks([vars(check) for check in checks])


def test_verify_tells_a_fault(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner that now and then passes off the wrong token is found out, whatever the tree."""
    honest = Runner.step

    def lying(self: Runner, root: int, tree: object, rule: object, copied: object = None) -> Outcome:
        outcome = honest(self, root, tree, rule, copied)  # type: ignore[arg-type]
        wrong = len(tree) > 1 and self.cache.length % 3 == 0  # type: ignore[arg-type]
        return replace(outcome, next=(outcome.next + 1) % 256) if wrong else outcome

    monkeypatch.setattr(Runner, "step", lying)
    checks = {c.name: c for c in verify.verify(engine, PROMPTS, Sampling(max_new_tokens=10), turns=1, progress=quiet)}
    assert checks["greedy, mc_sim_7b_63"].faults
    assert "differs" in checks["greedy, mc_sim_7b_63"].first_fault
    assert not checks["vanilla, generate()"].faults


def test_a_near_tie_is_told_from_a_fault(engine: Engine) -> None:
    import torch

    prompt = engine.encode(PROMPTS[0].opening())
    backbone = engine.backbone
    logits = backbone.logits(backbone.hidden_of_text(torch.tensor(prompt)))[-1]
    first, second = logits.topk(2).indices.tolist()
    with torch.no_grad():  # make the two likeliest tokens equal up to rounding
        gap = logits[first] - logits[second]
        check = verify.Check("tie")
        verify._compare(check, engine, prompt, [first], [second], Sampling())
        assert (check.faults, check.near_ties) == (1, 0)
        assert check.largest_gap == pytest.approx(gap.item(), rel=1e-4)
        backbone.lm_head.weight[second] = backbone.lm_head.weight[first] * (1 + 1e-7)
    check = verify.Check("tie")
    verify._compare(check, engine, prompt, [first], [second], Sampling())
    assert (check.faults, check.near_ties) == (0, 1)
    make_engine(backbone)
