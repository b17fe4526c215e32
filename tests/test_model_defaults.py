"""A model's own generation config: defaults that flags replace, and bad values in one line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

import medusa_chat
from medusa_chat.cli import main
from medusa_chat.sampling import Sampling, defaults_of, describe_defaults
from medusa_chat.settings import make
from tests.helpers.complaints import complaint
from tests.helpers.tiny import save_with_heads

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "pad_token_id": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_with_heads(tmp_path_factory.mktemp("model"))
    (folder / "generation_config.json").write_text(json.dumps(CONFIG))
    return folder


def test_the_models_settings_hold_where_the_user_gave_none(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(folder), "--prompt", "Hi", "--json", "--tree", "chain-2"]

    def answer(*more: str) -> tuple[Any, list[str]]:
        assert main([*words, "--max-new-tokens", "12", *more]) == 0
        output = capsys.readouterr()
        return json.loads(output.out.splitlines()[-1]), output.err.splitlines()

    first, notices = answer()
    assert first["mode"] == "exact"
    said = "defaults of the model: mode exact, temperature 0.6, top-p 0.95, top-k 20"
    assert notices == [f"medusa-chat: {said}"]
    given = ("--mode", "exact", "--temperature", "0.6", "--top-p", "0.95", "--top-k", "20")
    second, notices = answer(*given)
    assert (second["ids"], notices) == (first["ids"], [])
    third, notices = answer("--mode", "greedy", "--temperature", "0.3")
    assert third["mode"] == "greedy"
    assert notices[0] == "medusa-chat: defaults of the model: top-p 0.95, top-k 20"
    assert notices[1].startswith("medusa-chat: greedy mode does not use temperature")
    cold, _ = answer("--temperature", "0", "--mode", "vanilla")
    assert cold["ids"] == third["ids"]


def test_a_race_has_the_models_settings_too(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["race", "--model", str(folder), "--tree", "chain-2", "--max-new-tokens", "8", "Hi"]
    assert main(words) == 0
    output = capsys.readouterr()
    assert "defaults of the model: mode exact, temperature 0.6" in output.err
    assert main([*words, "--temperature", "0.3"]) == 0
    assert "defaults of the model: mode exact, top-p 0.95" in capsys.readouterr().err


def test_the_engine_tells_the_models_settings(folder: Path) -> None:
    engine = medusa_chat.load(str(folder), tree="chain-2", dtype="float32", engine="torch")
    expected = Sampling(mode="exact", temperature=0.6, top_p=0.95, top_k=20)
    assert make(Sampling, engine.defaults) == expected
    assert medusa_chat.load(tree="chain-2").defaults == {}


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"temperature": -1}, "temperature must be 0 or more, not -1.0; temperature stays 0.7"),
        ({"temperature": "warm"}, "temperature must be a number, not 'warm'"),
        ({"top_p": float("nan")}, "top_p must be a number, not nan; top_p stays 1"),
        ({"top_k": float("inf")}, "top_k must be a whole number, not inf"),
        ({"top_k": 1.5}, "top_k must be a whole number, not 1.5; top_k stays 0"),
        ({"top_k": -1}, "top_k must be 0 or more, not -1"),
        ({"min_p": True}, "min_p must be a number, not True"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0, not 0.0"),
        ({"do_sample": "yes"}, "do_sample must be true or false, not 'yes'"),
    ],
    ids=str,
)
def test_a_bad_value_is_one_line_and_spoils_no_other(config: dict[str, Any], line: str) -> None:
    name = next(iter(config))
    good = {"temperature": 0.5, "min_p": 0.1}
    found, complaints = defaults_of(good | config)
    assert len(complaints) == 1
    assert complaints[0].startswith(f"the model's generation_config.json: {line}")
    assert found == {key: value for key, value in good.items() if key != name}


def test_only_do_sample_chooses_a_mode_and_nothing_is_said_of_nothing() -> None:
    assert defaults_of({"temperature": 0.9, "do_sample": None}) == ({"temperature": 0.9}, [])
    assert defaults_of({"do_sample": False, "top_k": None}) == ({}, [])
    assert describe_defaults({"top_k": 20}, ["top_k"]) == describe_defaults({}, []) == ""


def test_bench_and_verify_have_no_loop_guard(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("bench", "verify"):
        assert "--loop-guard" in complaint(capsys, command, "--loop-guard", "on")
