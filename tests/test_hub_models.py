"""Every entry of models.yaml: downloaded from a local hub by its real name, and asked once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from medusa_chat.config import ModelSpec
from medusa_chat.hub.model_list import packaged_file, read_models
from tests.helpers.hub_checkpoints import serve
from tests.helpers.hub_server import HubServer, hub_server

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
REGISTERED = [
    spec for spec in read_models(packaged_file()).values() if "/" in spec.backbone and spec.tried
]
UNREGISTERED = [
    ModelSpec("by id", "FasterDecoding/medusa-1.0-zephyr-7b-beta"),
    ModelSpec("by id", "FasterDecoding/medusa-1.0-vicuna-33b-v1.3"),
    ModelSpec("by id", "lmsys/vicuna-13b-v1.3", heads="FasterDecoding/medusa-vicuna-13b-v1.3"),
    ModelSpec(
        "by id", "lmsys/vicuna-7b-v1.3", heads="FasterDecoding/medusa-vicuna-7b-v1.3@refs/pr/1"
    ),
    ModelSpec(
        "by id",
        "mistralai/Mistral-7B-Instruct-v0.2",
        heads="text-generation-inference/Mistral-7B-Instruct-v0.2-medusa",
    ),
]
SETTINGS = (
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--max-new-tokens",
    "8",
    "--ignore-eos",
    "--prompt",
    "Hi",
    "--json",
    "--ignore-memory",  # models.yaml has the real models' sizes
)
# One process for all, because importing torch takes longer than everything else.
CHAT = """
import json, sys, io, contextlib
from medusa_chat import cli
for words in json.load(sys.stdin):
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = cli.main(words)
    lines = output.getvalue().splitlines()
    summary = json.loads(lines[-1]) if lines else {}
    print(json.dumps({"status": status, "summary": summary, "errors": errors.getvalue()}))
"""


def chat(
    server: HubServer, home: Path, runs: list[list[str]], **environment: str
) -> list[dict[str, Any]]:
    """Run `medusa-chat` with each list of words; returns status, summary and errors."""
    settings = server.environment(home, PYTHONWARNINGS="ignore", **environment)
    done = subprocess.run(
        [sys.executable, "-c", CHAT],
        input=json.dumps(runs),
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def words(spec: ModelSpec) -> list[str]:
    if spec in REGISTERED:
        return ["--model", spec.name, *SETTINGS]
    return ["--model", spec.backbone, *(["--heads", spec.heads] if spec.heads else []), *SETTINGS]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with hub_server() as made:
        for spec in REGISTERED + UNREGISTERED:
            serve(made, spec, tmp_path_factory.mktemp("hub"))
        yield made


def test_every_model_is_downloaded_loaded_and_asked(server: HubServer, tmp_path: Path) -> None:
    specs = REGISTERED + UNREGISTERED
    answers = chat(server, tmp_path, [words(spec) for spec in specs])
    for spec, answer in zip(specs, answers, strict=True):
        assert answer["status"] == 0, f"{spec.backbone}: {answer['errors']}"
        assert answer["summary"]["new_tokens"] == 8
        assert answer["summary"]["acceptance_length"] >= 1, spec.backbone
    asked = server.fetched()
    assert not {"consolidated.safetensors", "pytorch_model-00001-of-00001.bin"} & set(asked)
    again = chat(server, tmp_path, [words(specs[0]), words(specs[-1])], HF_HUB_OFFLINE="1")
    assert [answer["summary"]["ids"] for answer in again] == [
        answers[0]["summary"]["ids"],
        answers[-1]["summary"]["ids"],
    ]


def test_a_refusal_of_the_hub_is_one_line_and_status_2(server: HubServer, tmp_path: Path) -> None:
    server.fault("/api/models/lmsys", status=401, error="GatedRepo")
    gated, absent = chat(
        server, tmp_path, [words(UNREGISTERED[3]), ["--model", "no/such", *SETTINGS]]
    )
    server.faults.clear()
    assert (gated["status"], absent["status"]) == (2, 2)
    assert gated["errors"].startswith("medusa-chat: error: lmsys/vicuna-7b-v1.3 is gated")
    assert "has no repository no/such" in absent["errors"]
    assert gated["errors"].count("\n") == absent["errors"].count("\n") == 1
