"""Code that comes with a checkpoint never runs, and nobody is asked if it may."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path

import pytest

from medusa_chat.model import pretrained
from tests.helpers.complaints import complaint
from tests.helpers.tiny import random_model, save_model

PACKAGE = Path(pretrained.__file__).parents[1]
OWNER = Path(pretrained.__file__)
LOADERS = {"from_pretrained", "from_config"}
COMMANDS = {
    "chat": ["--prompt", "hi"],
    "bench": ["--prompts", "PROMPTS"],
    "verify": ["--prompts", "PROMPTS"],
    "calibrate": ["--data", "PROMPTS"],
    "distill": ["--prompts", "PROMPTS", "--out", "OUT"],
    "train": ["--data", "PROMPTS", "--out", "OUT"],
    "export": ["--layout", "v2", "--out", "OUT"],
}


def add_code(folder: Path) -> Path:
    """Let a checkpoint's config and tokenizer name a module; return the file that it writes."""
    proof = folder / "it-ran"
    body = f"open({str(proof)!r}, 'w').write('x')\n"
    for module in ("configuration_own", "modeling_own", "tokenization_own"):
        (folder / f"{module}.py").write_text(f"{body}class Own: pass\n")
    own = {
        "AutoConfig": "configuration_own.Own",
        "AutoModelForCausalLM": "modeling_own.Own",
        "AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"],
    }
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((folder / name).read_text())
        config["auto_map"] = own
        if name == "config.json":
            config["model_type"] = "its-own-type"
        else:
            config["tokenizer_class"] = "ItsOwnTokenizer"
        (folder / name).write_text(json.dumps(config))
    return proof


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_needs_its_own_code_is_refused(
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    model = tmp_path / "model"
    proof = add_code(save_model(model, random_model(vocabulary=260)))
    prompts = tmp_path / "prompts.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello"}]
    prompts.write_text(json.dumps({"messages": turns}))
    files = {"PROMPTS": str(prompts), "OUT": str(tmp_path / "out")}
    words = [files.get(word, word) for word in COMMANDS[command]]
    line = complaint(capsys, command, "--model", str(model), *words)
    assert "which medusa-chat never runs" in line
    assert not proof.exists()


def test_a_known_type_loads_without_its_code(tmp_path: Path) -> None:
    """A model whose class transformers has needs no code, whatever its files bring along."""
    folder = save_model(tmp_path / "model", random_model(vocabulary=260))
    proof = add_code(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(proof)!r}, 'w')")
    with pretrained.loading_errors("m"):
        pretrained.load_weights(folder)
        pretrained.load_tokenizer(folder)
    assert not proof.exists()


def test_an_adapter_beside_a_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path / "model", random_model(vocabulary=260))
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "nobody/nothing"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    line = complaint(capsys, "--model", folder, "--prompt", "hi")
    assert "holds an adapter (adapter_config.json)" in line


def test_one_module_loads_checkpoints_and_forbids_their_code() -> None:
    calls = [(file, call) for file in PACKAGE.rglob("*.py") for call in loads(file)]
    assert {file for file, _ in calls} == {OWNER}
    for _, call in calls:
        flags = {word.arg: word.value for word in call.keywords}
        assert ast.unparse(flags["trust_remote_code"]) == "False", ast.unparse(call)


def loads(file: Path) -> list[ast.Call]:
    """Return the calls of a file that load something of transformers."""
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    return [
        call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in LOADERS
    ]
