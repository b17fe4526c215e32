"""bench on a tiny model: its figures are those of the steps."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console

import medusa_chat
from medusa_chat.bench.figures import mode_figures, peer_figures
from medusa_chat.bench.job import BenchJob
from medusa_chat.bench.parts import Stopwatch, step_parts, watching
from medusa_chat.bench.replies import (
    Transcript,
    Turn,
    converse,
    fitting,
    ways_of,
)
from medusa_chat.bench.run import bench
from medusa_chat.cli import main
from medusa_chat.config import SHIPPED_PROMPTS, UserError
from medusa_chat.decoding.trees import costs
from medusa_chat.decoding.trees.accuracy import Accuracy
from medusa_chat.events import Step, Token
from medusa_chat.prompts import Prompt, read_prompts
from medusa_chat.sampling import Sampling
from medusa_chat.stats import Stats
from medusa_chat.terminal.reports import bench as bench_report
from medusa_chat.terminal.reports import bench_charts
from tests.helpers.complaints import complaint
from tests.helpers.native_library import need_library
from tests.helpers.quiet import silent
from tests.helpers.tiny import save_with_heads

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from medusa_chat.decoding.engine import Engine

PROMPTS = [Prompt("talk", ("Hi there",)), Prompt("tales", ("Bye", "So long", "Again"))]
MODE_KEYS = {
    "acceptance_length",
    "overhead",
    "speedup",
    "throughput_ratio",
    "tokens_per_second",
    "vanilla_tokens_per_second",
    "wall_tokens_per_second",
    "step_ms",
    "vanilla_step_ms",
    "time_to_first_token_ms",
    "head_acceptance",
    "new_tokens",
    "prompts",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_heads(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["native", "torch"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Engine:
    if request.param == "native":
        need_library()
    return loaded(folder, request.param)


@pytest.fixture
def torch_engine(folder: Path) -> Engine:
    return loaded(folder, "torch")


def loaded(folder: Path, step: str) -> Engine:
    return medusa_chat.load(
        str(folder), tree="mc_sim_7b_63", dtype="float32", probing=False, engine=step
    )


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "REPEATS", 1)
    monkeypatch.setattr("medusa_chat.bench.bandwidth.BUFFER", 2**20)


def test_bench_measures_every_way(engine: Engine) -> None:
    drawn: list[Step] = []

    def view(steps: Iterable[Step]) -> None:
        drawn.extend(steps)

    job = BenchJob(
        PROMPTS,
        ["greedy", "typical"],
        Sampling(max_new_tokens=12),
        rounds=2,
        turns=2,
        peers=("transformers",),
        view=view,
        contexts=(32, 64),
        histories=(40,),
    )
    result = bench(engine, job, silent)
    json.dumps(result, allow_nan=False)
    assert set(result["modes"]) == {"greedy", "typical"}
    for mode in result["modes"].values():
        assert set(mode) == MODE_KEYS | {"categories", "turns"}
        assert set(mode["categories"]) == {"talk", "tales"}
        assert all(set(figures) == MODE_KEYS for figures in mode["categories"].values())
        assert [turn["conversations"] for turn in mode["turns"]] == [2, 1]
        assert 1 <= mode["acceptance_length"] <= 5
    assert set(result["peers"]) == {"transformers", "transformers-lookup"}
    assert all(peer["tokens_per_second"] > 0 for peer in result["peers"].values())
    assert sum(len(step.tokens) for step in drawn) > 0
    assert (result["prompts"], result["left_out"], result["turns"]) == (2, 0, 2)
    assert [step["context"] for step in result["steps"]] == [32, 64]
    assert set(result["steps"][0]["nodes"]) == {str(nodes) for nodes in costs.LADDER}
    assert set(result["parts"]) == {"vanilla", "greedy", "typical"}
    assert result["history"][0]["prefilled"] == result["history"][0]["new_tokens"]
    assert result["peak_memory_bytes"]["host"] > 2**20


def step(depth: int, seconds: float, kind: str = "tree") -> Step:
    tokens = tuple(Token(1, "a", head) for head in range(depth + 1))
    if kind == "vanilla":
        return Step(tokens, 1, seconds, "vanilla")
    return Step(tokens, 8, seconds, "tree", 3, tested=tuple(range(1, min(3, depth + 1) + 1)))


def conversation(category: str, steps: list[Step], first: float) -> Transcript:
    return Transcript(category, [Turn(Stats.of(steps), first, 2.0, 5, "text")])


def test_figures_of_a_round_hold_together(engine: Engine) -> None:
    """However long its steps took; medians over rounds are of a round each, and need not."""
    job = BenchJob(PROMPTS, ["greedy", "typical"], Sampling(max_new_tokens=12), rounds=1)
    for mode in bench(engine, job, silent)["modes"].values():
        assert mode["overhead"] == pytest.approx(
            mode["step_ms"] / mode["vanilla_step_ms"], rel=0.01
        )
        length_over_cost = mode["acceptance_length"] / mode["overhead"]
        assert mode["speedup"] == pytest.approx(length_over_cost, rel=0.01)
        rates = mode["tokens_per_second"] / mode["vanilla_tokens_per_second"]
        assert mode["throughput_ratio"] == pytest.approx(rates, rel=0.01)


def test_figures_are_those_of_the_steps() -> None:
    slow = {
        "greedy": [
            conversation("a", [step(2, 0.02), step(1, 0.02)], 0.5),
            conversation("b", [step(0, 0.02)], 0.1),
        ],
        "vanilla": [
            conversation("a", [step(0, 0.01, "vanilla")] * 5, 0.1),
            conversation("b", [step(0, 0.01, "vanilla")], 0.1),
        ],
    }
    fast = slow | {
        "greedy": [
            conversation("a", [step(2, 0.01), step(1, 0.01)], 0.3),
            conversation("b", [step(0, 0.01)], 0.1),
        ]
    }
    figures = mode_figures([slow, fast, fast], "greedy", "vanilla")
    assert figures["acceptance_length"] == pytest.approx(2.0)
    assert figures["overhead"] == pytest.approx(1.0)  # that of the median round
    assert figures["speedup"] == pytest.approx(2.0)
    assert figures["throughput_ratio"] == pytest.approx(2.0)
    assert figures["tokens_per_second"] == pytest.approx(200)
    assert figures["wall_tokens_per_second"] == pytest.approx(6 / 4)
    assert figures["time_to_first_token_ms"] == pytest.approx(200)
    assert figures["head_acceptance"] == {"1": 0.6667, "2": 0.5, "3": 0.0}
    a, b = figures["categories"]["a"], figures["categories"]["b"]
    assert (a["acceptance_length"], a["prompts"], a["time_to_first_token_ms"]) == (2.5, 1, 300)
    assert (b["acceptance_length"], b["head_acceptance"]) == (1.0, {"1": 0.0})
    assert mode_figures([slow], "greedy", "vanilla")["overhead"] == pytest.approx(2.0)


def test_a_reply_without_a_step_has_no_figures_but_is_counted() -> None:
    ended = conversation("a", [Step((Token(1, "", 0),), 0, 0.0, "vanilla", finish="eos")], 0.1)
    figures = mode_figures([{"greedy": [ended], "vanilla": [ended]}], "greedy", "vanilla")
    for key in ("acceptance_length", "overhead", "speedup", "throughput_ratio"):
        assert figures[key] is None
    assert figures["new_tokens"] == 1
    json.dumps(figures, allow_nan=False)


def test_peers_are_compared_with_prefill_on_both_sides() -> None:
    conversations = {"transformers": [conversation("a", [step(0, 0.1)], 0.1)]} | {
        "greedy": [conversation("a", [step(2, 0.1)], 0.1)],
        "baseline": [conversation("a", [step(1, 0.1)], 0.1)],
    }
    found = peer_figures([conversations], BenchJob([], ["greedy"], Sampling()))
    assert set(found) == {"transformers"}
    expected = {"tokens_per_second": 0.5, "ratio": {"greedy": 3.0}, "vanilla_ratio": 2.0}
    assert found["transformers"].items() >= expected.items()


def test_each_baseline_samples_like_its_mode(engine: Engine) -> None:
    job = BenchJob(
        PROMPTS,
        ["greedy", "exact", "vanilla"],
        Sampling(max_new_tokens=8, temperature=1.0),
        peers=("transformers",),
    )
    ways = ways_of(engine, job)
    assert set(ways) == {
        "greedy",
        "exact",
        "vanilla",
        "baseline",
        "baseline-sampled",
        "transformers",
        "transformers-lookup",
    }
    texts = {
        name: [turn.text for turn in converse(engine, PROMPTS[1], 3, way).turns]
        for name, way in ways.items()
    }
    assert texts["greedy"] == texts["baseline"]
    assert texts["transformers"] == texts["transformers-lookup"]
    assert texts["transformers"][0].startswith(
        texts["greedy"][0]
    )  # a character cut short shows there alone
    assert texts["exact"] == texts["vanilla"] == texts["baseline-sampled"] != texts["greedy"]
    assert len(texts["greedy"]) == 3


def test_later_turns_keep_the_cache_and_the_models_own_answers(engine: Engine) -> None:
    seen: list[int] = []
    ours = ways_of(engine, BenchJob(PROMPTS, ["greedy"], Sampling(max_new_tokens=8)))["greedy"]

    def answer(ids: list[int]) -> Turn:
        seen.append(len(ids))
        return ours(ids)

    first, second, third = converse(engine, PROMPTS[1], 3, answer).turns
    assert first.prefilled == seen[0]
    assert second.prefilled < seen[1] - seen[0] + 1
    assert third.prefilled < seen[2] - seen[1] + 1
    assert seen == sorted(seen)
    assert 0 < second.first <= second.wall


def test_prompts_that_do_not_fit_are_left_out(engine: Engine) -> None:
    long = Prompt("talk", ("x" * 600,))
    assert fitting(engine, [*PROMPTS, long]) == PROMPTS
    with pytest.raises(UserError, match="none of the 1 prompts fits into the 512 tokens"):
        fitting(engine, [long])
    late = Prompt("talk", ("Hi", "x" * 600))
    way = ways_of(engine, BenchJob([late], ["greedy"], Sampling(max_new_tokens=4)))["greedy"]
    assert len(converse(engine, late, 2, way).turns) == 1


def test_the_shipped_prompts_have_categories_and_follow_ups() -> None:
    prompts = read_prompts([SHIPPED_PROMPTS])
    categories = [prompt.category for prompt in prompts]
    assert min(categories.count(name) for name in set(categories)) >= 2
    assert "repeat" in categories
    assert all(len(prompt.turns) > 1 for prompt in prompts)


# ---- the parts of a step ----


def test_a_stopwatch_gives_each_part_the_time_since_the_last_mark() -> None:
    times = iter([1.0, 1.5, 3.5, 10.0, 11.0, 11.25])
    stopwatch = Stopwatch(torch.device("cpu"), lambda: next(times))
    for part in ("begin", "heads", "forward", "begin", "heads", "heads"):
        stopwatch(part)
    assert stopwatch.steps() == [{"heads": 0.5, "forward": 2.0}, {"heads": 1.25}]


def test_the_runner_marks_its_parts_in_order_and_only_while_watched(
    torch_engine: Engine,
) -> None:
    engine = torch_engine
    before = engine.runner.eager.mark
    with watching(engine.runner) as stopwatch:
        list(engine.generate([1, 2, 3], Sampling(max_new_tokens=5, ignore_eos=True)))
    assert isinstance(stopwatch, Stopwatch)
    assert stopwatch.marks[:5] == ["begin", "heads", "forward", "acceptance", "commit"]
    assert len(stopwatch.marks) % 5 == 0
    assert engine.runner.eager.mark is before


@pytest.mark.parametrize("mode", ["vanilla", "greedy", "typical", "exact"])
def test_parts_add_up_to_the_step(engine: Engine, mode: Any) -> None:
    found = step_parts(
        engine, [[1, 2, 3], [4, 5]], Sampling(mode=mode, max_new_tokens=8, ignore_eos=True)
    )
    assert found is not None
    assert list(found["ms"]) == ["forward", "heads", "acceptance", "commit", "rest"]
    assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert found["outside_forward"] == pytest.approx(1 - found["shares"]["forward"])
    assert min(found["ms"].values()) >= 0


def test_a_runner_without_marks_is_no_fault(
    torch_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stopwatch, "steps", lambda _: [])
    assert (
        step_parts(torch_engine, [[1, 2, 3]], Sampling(max_new_tokens=4, ignore_eos=True)) is None
    )


# ---- the command ----


@pytest.fixture
def result(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> tuple[dict[str, Any], str, Path]:
    words = f"bench --model {folder} --dtype float32 --tree chain-2 --max-new-tokens 6"
    words += " --limit 5 --rounds 1 --turns 2 --modes greedy,exact --context 16 --history 20,40"
    words += f" --plot {tmp_path / 'plots'} --json {tmp_path / 'out.json'}"
    assert main(words.split()) == 0
    *text, line = capsys.readouterr().out.splitlines()
    return json.loads(line), "\n".join(text), tmp_path


def test_the_command_prints_tables_json_and_plots(result: tuple[dict[str, Any], str, Path]) -> None:
    printed, text, place = result
    assert json.loads((place / "out.json").read_text()) == printed
    assert printed["command"].startswith("medusa-chat bench --model")
    assert {
        "date",
        "device",
        "threads",
        "versions",
        "model",
        "prompts",
        "modes",
        "peers",
        "dtype",
    } <= set(printed)
    assert {"torch", "transformers", "python"} <= set(printed["versions"])
    assert printed["load_seconds"] > 0
    assert printed["steps"][0]["tree"]["simulated"]  # these heads are not calibrated
    names = {file.name for file in (place / "plots").iterdir()}
    assert names == {"replies.png", "step_cost.png", "step_parts.png"}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (place / "plots").iterdir())
    assert "time to first token" in text
    assert "SIMULATED" in text


def shown(result: dict[str, Any], width: int) -> str:
    printed = io.StringIO()
    bench_report.show_bench(result, Console(width=width, file=printed))
    return printed.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_and_cut_nothing(result: tuple[dict[str, Any], str, Path], width: int) -> None:
    lines = shown(result[0], width).splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in "\n".join(lines)


def test_an_interrupt_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("medusa_chat.bench.measure.measure", interrupted)
    assert main(["bench"]) == 130
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "interrupted" in printed.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--json", "/nonesuch/out.json"], "there is no folder /nonesuch"),
        (["--plot", "/nonesuch/plots"], "there is no folder /nonesuch"),
        (["--plot", __file__], "that is a file"),
        (["--shape", "vicuna-8b"], "unknown shape 'vicuna-8b'"),
        (
            ["--shape", "llama-1b:int3"],
            "'int3' is none of none, nf4, nf4-double, int8",
        ),
        (["--shape", "llama-1b", "--peer", "transformers"], "--peer and --view compare replies"),
        (["--context", "0"], "must be at least 1"),
        (["--history", "many"], "--history"),
        (
            ["--history", "4096", "--tree", "chain-1", "--dtype", "float32"],
            "a history of 4096 tokens",
        ),
        (
            ["--context", "4096", "--tree", "chain-1", "--dtype", "float32"],
            "steps after 4096 positions",
        ),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in complaint(capsys, "bench", *words)


def test_without_matplotlib_plot_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(UserError, match=r"pip install 'medusa-chat\[plots\]'"):
        bench_charts.check_folder(tmp_path)


def test_figures_of_calibrated_heads_are_not_called_simulated(engine: Engine) -> None:
    engine.trees.use_accuracy(Accuracy(((0.5, 0.6), (0.3, 0.4))))
    job = BenchJob(PROMPTS[:1], ["greedy"], Sampling(max_new_tokens=4), 1, contexts=(16,))
    measured = bench(engine, job, silent) | {"load_seconds": 1.0, "device": "d"}
    assert measured["steps"][0]["tree"]["simulated"] is None
    assert "simulated" not in shown(measured, 100).lower()
