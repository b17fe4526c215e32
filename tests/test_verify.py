"""verify on a tiny model: a sound engine passes, and faults are found."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

import medusa_chat
from medusa_chat.bench.verification import Comparison, verify
from medusa_chat.prompts import Prompt
from medusa_chat.sampling import Sampling
from medusa_chat.terminal.reports.checks import show_checks
from tests.helpers.complaints import refusal
from tests.helpers.native_library import need_library
from tests.helpers.quiet import quiet
from tests.helpers.steps import surround_steps
from tests.helpers.tiny import save_with_heads

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from medusa_chat.decoding.engine import Engine
    from medusa_chat.decoding.report import StepReport
    from medusa_chat.decoding.runner import Runner
    from medusa_chat.decoding.trees.tree import AnyTree

PROMPTS = [Prompt("talk", ("Hi there",)), Prompt("tales", ("Bye", "So long", "Again"))]


@pytest.fixture(params=["torch", "native"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    if request.param == "native":
        need_library()
    return loaded(save_with_heads(tmp_path_factory.mktemp("model")), request.param)


def loaded(folder: Path, step: str) -> Engine:
    return medusa_chat.load(
        str(folder), tree="mc_sim_7b_63", dtype="float32", probing=False, engine=step
    )


def verified(engine: Engine) -> list[Comparison]:
    return verify(engine, PROMPTS, Sampling(max_new_tokens=10), turns=1, progress=quiet)


def test_verify_finds_no_fault_in_the_engine(engine: Engine) -> None:
    checks = verified(engine)
    names = {check.name for check in checks}
    assert {
        "vanilla, generate()",
        "greedy, auto",
        "greedy, mc_sim_7b_63",
        "greedy, dynamic-16, copies",
    } <= names
    assert {"exact, auto, T=0.7, top-p=0.9", "exact, dynamic-16, copies, T=0.7, top-p=0.9"} <= names
    assert {"vanilla, generate(), penalties", "exact, dynamic-64, copies, penalties"} <= names
    assert any(name.startswith("greedy, random") for name in names)
    assert all(check.replies == check.equal == 2 for check in checks)
    show_checks([vars(check) for check in checks])


def test_verify_finds_a_fault(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner that sometimes returns a wrong token is found out in every tree."""

    def falsify(runner: Runner, tree: AnyTree, finish: Callable[[], StepReport]) -> StepReport:
        report = finish()
        wrong = len(tree) > 1 and runner.cache.length % 3 == 0
        return replace(report, next=(report.next + 1) % 256) if wrong else report

    surround_steps(monkeypatch, falsify)
    checks = {check.name: check for check in verified(engine)}
    assert checks["greedy, mc_sim_7b_63"].faults
    assert "differs" in checks["greedy, mc_sim_7b_63"].first_fault
    assert not checks["vanilla, generate()"].faults


def test_a_near_tie_is_no_fault(tmp_path: Path) -> None:
    engine = loaded(save_with_heads(tmp_path), "torch")
    prompt = engine.encode(PROMPTS[0].opening())
    backbone = engine.backbone
    logits = backbone.logits(backbone.hidden_of_text(torch.tensor(prompt)))[-1]
    first, second = logits.topk(2).indices.tolist()
    with torch.no_grad():  # make the two likeliest tokens equal up to rounding
        gap = logits[first] - logits[second]
        check = Comparison("fault")
        check.add(engine, prompt, [first], [second], Sampling())
        assert (check.faults, check.near_ties) == (1, 0)
        assert check.largest_gap == pytest.approx(gap.item(), rel=1e-4)
        backbone.lm_head.weight[second] = backbone.lm_head.weight[first] * (1 + 1e-7)
    check = Comparison("tie")
    check.add(engine, prompt, [first], [second], Sampling())
    assert (check.faults, check.near_ties) == (0, 1)


def test_no_difference_is_a_near_tie_of_the_native_step(tmp_path: Path) -> None:
    need_library()
    check = Comparison("tie")
    check.add(loaded(save_with_heads(tmp_path), "native"), [1, 2, 3], [5], [6], Sampling())
    assert (check.faults, check.near_ties) == (1, 0)


def test_prompts_that_do_not_fit_verify_nothing(engine: Engine) -> None:
    prompt = Prompt("long", ("word " * 2000,))
    line = refusal(verify, engine, [prompt], Sampling(max_new_tokens=4), turns=1, progress=quiet)
    assert "nothing is verified: none of the 1 prompts fits" in line


def test_the_verdict_comes_last(capsys: pytest.CaptureFixture[str]) -> None:
    fine = Comparison("greedy", replies=3, equal=2, near_ties=1)
    faulty = Comparison("exact", replies=2, equal=1, faults=1, first_fault="after 'x'")
    show_checks([vars(fine)])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "verified: 3 replies in 1 checks, equal, but for 1 near-ties"
    show_checks([vars(fine), vars(faulty)])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "FAULT: 1 of 5 replies differ, in 1 of the checks"
