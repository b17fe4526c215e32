"""`medusa-chat calibrate`: its files, mistakes, tables and figure; `models` shows the result."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from medusa_chat.cli import main
from medusa_chat.decoding.trees.accuracy import Accuracy, write_accuracy
from medusa_chat.terminal.reports import accuracy
from medusa_chat.training.calibration import STORED
from tests.helpers.complaints import complaint
from tests.helpers.tiny import save_with_heads

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = save_with_heads(tmp_path_factory.mktemp("model"))
    (place / "prompts.txt").write_text("".join(f"Say {number}\n" for number in range(10)))
    return place


def words(folder: Path, *more: str) -> list[str]:
    shared = [
        "calibrate",
        "--model",
        str(folder),
        "--dtype",
        "float32",
        "--prompts",
        str(folder / "prompts.txt"),
    ]
    return [*shared, "--max-new-tokens", "12", *more]


def test_calibrate_counts_checks_draws_and_writes(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, file: Any) -> None:
        figures.append(figure)
        save(figure, file)

    monkeypatch.setattr(Figure, "savefig", keep)
    (folder / "head_accuracy.json").write_text("{")  # a damaged file is replaced by a good one
    assert main(words(folder, "--plot", str(tmp_path / "figure.png"))) == 0
    printed = capsys.readouterr().out
    for text in ("■ 1 (+1)", "■ 4 (+4)", "set aside", "difference", "wrote"):
        assert text in printed
    document = json.loads((folder / "head_accuracy.json").read_text())
    assert document["source"] == "8 conversations of prompts.txt"
    assert len(document["paths"]) == STORED
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    heads, forecast = figures[0].axes
    assert [line.get_ydata()[0] for line in heads.lines] == pytest.approx(  # type: ignore[index]
        [100 * row[0] for row in document["accuracy"]], abs=1e-2
    )
    assert len(forecast.lines[0].get_ydata()) == 64  # type: ignore[arg-type]
    bars: Any = forecast.containers[0]
    assert list(bars.lines[0].get_xdata()) == [8, 16, 32, 64]


def test_all_prompts_are_counted_without_a_check(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(folder, "--no-check")) == 0
    assert (
        json.loads((folder / "head_accuracy.json").read_text())["source"]
        == "10 conversations of prompts.txt"
    )
    printed = capsys.readouterr().out
    assert "forecast" not in printed
    assert main(words(folder, "--limit", "3")) == 0
    assert "the forecast was not checked: that takes 5 prompts" in capsys.readouterr().out


def test_mistakes_are_one_line_and_write_nothing(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = folder / "head_accuracy.json"
    file.write_text('{"accuracy": [[0.5]]}')
    assert "no reply has a second token" in complaint(
        capsys, *words(folder), "--max-new-tokens", "1"
    )
    assert "figure.xyz is none of these" in complaint(
        capsys, *words(folder, "--plot", "figure.xyz")
    )
    assert "there is no folder" in complaint(
        capsys, *words(folder, "--plot", str(tmp_path / "no" / "figure.png"))
    )
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert "pip install 'medusa-chat[plots]'" in complaint(
        capsys, *words(folder, "--plot", "figure.png")
    )
    blocked = folder / f"head_accuracy.{os.getpid()}.tmp"
    blocked.mkdir()
    with monkeypatch.context() as patch:  # before anything is loaded
        patch.setattr("medusa_chat.load", None)
        assert blocked.name in complaint(capsys, *words(folder, "--no-check"))
    blocked.rmdir()
    assert file.read_text() == '{"accuracy": [[0.5]]}'


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "head_accuracy.json").mkdir()
    with pytest.raises(OSError, match="head_accuracy"):
        write_accuracy(Accuracy(((0.5,),)), tmp_path / "head_accuracy.json", "test")
    assert [each.name for each in tmp_path.iterdir()] == ["head_accuracy.json"]


# ---- the report ----


def shown(monkeypatch: pytest.MonkeyPatch, width: int, *arguments: Any) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"), color_system=None)  # noqa: SIM115
    monkeypatch.setattr(accuracy, "SafeConsole", lambda: console)
    accuracy.show_accuracy(*arguments)
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_bars_fit_the_screen_and_show_ranks_without_colour(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = [[0.5] * 4 + [0.75] * 5 + [1.0], [0.25] * 10, [0.0] * 4]
    lines = shown(
        monkeypatch,
        width,
        top,
        [],
        [{"tree": "fixed", "nodes": 16, "forecast": 2.0, "measured": 1.9, "error": 0.04}],
    )
    assert max(map(len, lines)) <= width
    bars = [lines[3 + head].split("│")[5].strip() for head in range(3)]
    whole = len(bars[0])
    assert whole >= 10
    assert [bars[0].count(block) / whole for block in "█▒░"] == pytest.approx(
        [0.5, 0.25, 0.25], abs=1 / whole
    )
    assert bars[1] == "█" * round(0.25 * whole)
    assert bars[2] == ""
    row = next(line for line in lines if "1.90 ± 0.04" in line)
    assert "-5.0%" in row
    assert "16" in row
    both = shown(monkeypatch, width, top, top[:1], [])
    title = next(number for number, line in enumerate(both) if line.startswith("exact mode"))
    assert both[title + 1 : title + 5] == [*both[:4]]


def test_models_shows_how_good_the_heads_are(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = tmp_path / "models.yaml"
    entries = {
        "mine": {"backbone": str(folder)},
        "theirs": {"backbone": "nobody/nothing"},
        "new": {"backbone": "."},
    }
    entries["apart"] = {
        "backbone": "nobody/nothing",
        "heads": str(folder / "medusa_heads" / "medusa_lm_head.safetensors"),
    }
    models.write_text(json.dumps({"models": entries}))
    monkeypatch.setattr("medusa_chat.hub.model_list.packaged_file", lambda: models)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    (folder / "head_accuracy.json").write_text(json.dumps({"accuracy": [[0.714, 0.8], [0.5, 0.6]]}))
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    blocks = {
        name: shown.split(f"\n{name} ")[1].split("\n", 1)[1].splitlines()[:2] for name in entries
    }
    assert "are right: 71% 50%" in blocks["mine"][1]
    assert "are right: 71% 50%" in blocks["apart"][1]
    assert "are right" not in "".join(blocks["theirs"] + blocks["new"][:1])
