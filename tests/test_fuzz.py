"""Random files, arguments, commands and damage: a result or one line, never a traceback or a hang.

FUZZ_CASES sets how many cases of each kind are tried; failures name the seed.
"""

from __future__ import annotations

import os
import random
import sys
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import pytest

import medusa_chat
from medusa_chat.cli import main
from medusa_chat.config import Message, UserError
from medusa_chat.decoding.trees.accuracy import read_accuracy
from medusa_chat.decoding.trees.tree import named_tree
from medusa_chat.hub.model_list import read_models
from medusa_chat.model.layouts import find_heads, read_heads
from medusa_chat.model.layouts.config import read_config
from medusa_chat.model.layouts.tensors import TensorFiles
from medusa_chat.prompts import read_prompts
from medusa_chat.sampling import Sampling
from medusa_chat.terminal.chat.command import Chat, Stream
from medusa_chat.terminal.chat.commands import dispatch
from medusa_chat.terminal.chat.conversation import read_conversation
from medusa_chat.terminal.chat.session import Session
from medusa_chat.text import one_line as shortened
from medusa_chat.training.data import read_documents
from tests.helpers import nasty
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.public_layouts import put, tensors_of
from tests.helpers.tiny import random_backbone, random_heads, save_with_heads

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.slow

READERS: dict[str, Callable[[Path], Any]] = {
    "prompts": lambda file: read_prompts([file]),
    "documents": lambda file: list(read_documents(file)),
    "conversation": read_conversation,
    "models": read_models,
    "tree": lambda file: named_tree(str(file)),
    "accuracy": read_accuracy,
    "config": read_config,
    "index": TensorFiles,
}
LAYOUTS = ("official", "v1.0", "vllm", "modelopt", "tensorrt-llm engine")


def refused(case: object, call: Callable[..., object], *arguments: Any) -> bool:
    """Call in time; tell if a UserError of one line came of it."""
    line = ""
    with nasty.no_hang(case):
        try:
            call(*arguments)
        except UserError as error:
            line = shortened(str(error))
    assert not line or nasty.one_line(line), case
    return bool(line)


@pytest.mark.parametrize("reader", READERS)
def test_random_text_files(reader: str, tmp_path: Path) -> None:
    file = tmp_path / ("x.safetensors.index.json" if reader == "index" else "any")
    for seed in range(5 * nasty.CASES):
        file.write_bytes(nasty.text_file(random.Random(seed)))
        refused(seed, READERS[reader], file)


def test_random_argument_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing_loads(*_: object, **__: object) -> None:
        raise UserError("this would load")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(medusa_chat, "load", nothing_loads)
    monkeypatch.setattr("medusa_chat.training.trainer._train", nothing_loads)
    monkeypatch.setattr("medusa_chat.bench.measure.measure", nothing_loads)
    monkeypatch.setattr("medusa_chat.commands.doctor.examine", nothing_loads)
    flags = nasty.flags_by_command()
    for seed in range(3 * nasty.CASES):
        words = nasty.arguments(random.Random(seed), flags)
        monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
        status = run(words)
        printed = capsys.readouterr().err
        assert status in (0, 2), (words, printed)
        if status == 2:
            assert nasty.one_line(printed.removesuffix("\n")), (words, printed)
        assert "secret" not in printed, words


def run(words: list[str]) -> Any:
    """The exit status of a command line."""
    with nasty.no_hang(words):
        try:
            return main(words)
        except SystemExit as ending:  # --help
            return ending.code


def test_random_slash_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("medusa_chat.terminal.chat.commands.talk.copy", str)
    chat = Chat(Session(FakeEngine(), Sampling()))
    for seed in range(5 * nasty.CASES):
        chance = random.Random(seed)
        if not chat.session.messages:
            list(chat.session.ask("hello"))
        refused(seed, take, chat, nasty.slash_line(chance))


def take(chat: Chat, line: str) -> None:
    """Run a slash-command, and two steps of the reply that it may begin."""
    with suppress(EOFError):
        result = dispatch(chat, line)
        if isinstance(result, Stream):
            with closing(result.steps) as steps, suppress(StopIteration):
                next(steps)
                next(steps)


# ---- damaged checkpoints ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_with_heads(tmp_path_factory.mktemp("model"))
    (made / "head_accuracy.json").write_text('{"accuracy": [[0.5, 0.6], [0.3, 0.4]]}')
    return made


def answer(folder: Path) -> None:
    """Load a folder and decode a few tokens."""
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "engine": "torch"}
    engine = medusa_chat.load(str(folder), tree="chain-2", probing=False, context=64, **options)
    question: Message = {"role": "user", "content": "Hi"}
    list(engine.generate([question], Sampling(max_new_tokens=4)))


@pytest.mark.parametrize("kind", ["truncation", "bit flip"])
def test_a_damaged_checkpoint(folder: Path, kind: str) -> None:
    """Every file of a tiny checkpoint, again and again."""
    for file in nasty.files_of(folder):
        whole = file.read_bytes()
        try:
            for seed in range(nasty.CASES):
                file.write_bytes(nasty.damaged(whole, kind, random.Random(seed)))
                refused((file.name, kind, seed), answer, folder)
        finally:
            file.write_bytes(whole)
    assert not refused("whole", answer, folder)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_heads_in_other_layouts(layout: str, suffix: str, tmp_path: Path) -> None:
    heads = random_heads(random_backbone(), 2)
    name = f"medusa_lm_head{suffix.replace('.bin', '.pt')}"
    if layout != "official":
        name = f"{'model' if suffix == '.safetensors' else 'pytorch_model'}{suffix}"
    file = put(tensors_of(heads, layout), tmp_path / name)
    whole = file.read_bytes()

    def read() -> None:
        found = find_heads(tmp_path)
        if found:
            read_heads(found, 32, 64)

    for kind in ("truncation", "bit flip"):
        for seed in range(nasty.CASES):
            file.write_bytes(nasty.damaged(whole, kind, random.Random(seed)))
            refused((layout, suffix, kind, seed), read)
