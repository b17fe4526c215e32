"""Other decoders in bench: the flag, and llama.cpp behind a stand-in of llama-cpp-python."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from medusa_chat.bench.job import BenchJob
from medusa_chat.bench.peers import check_peers, load_peers
from medusa_chat.bench.replies import measure_replies
from medusa_chat.bench.run import bench
from medusa_chat.prompts import Prompt
from medusa_chat.sampling import Sampling
from medusa_chat.terminal.reports.bench import show_bench
from tests.helpers.complaints import refusal
from tests.helpers.quiet import quiet
from tests.helpers.tiny import make_engine, random_backbone, random_heads

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from medusa_chat.decoding.engine import Engine

END = 7


class FakeLlama:
    """Counts up from the last id of the prompt, and ends at END."""

    made: dict[str, Any]

    def __init__(self, **settings: Any) -> None:
        FakeLlama.made = settings
        self.asked: list[list[int]] = []

    def n_vocab(self) -> int:
        return 320

    def token_eos(self) -> int:
        return END

    def reset(self) -> None:
        pass

    def generate(
        self, tokens: list[int], *, temp: float, repeat_penalty: float, reset: bool
    ) -> Iterator[int]:
        assert (temp, repeat_penalty, reset) == (0.0, 1.0, True)
        self.asked.append(tokens)
        yield from range(1, 100)

    def tokenize(self, text: bytes, *, add_bos: bool, special: bool) -> list[int]:
        assert (add_bos, special) == (False, True)
        return list(text)

    def detokenize(self, tokens: list[int]) -> bytes:
        return bytes(64 + token for token in tokens)


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=FakeLlama))
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    return tmp_path / "small.gguf"


def tiny(vocabulary: int) -> Engine:
    backbone = random_backbone(vocabulary=vocabulary)
    return make_engine(backbone, random_heads(backbone), "chain-3")


def test_a_peer_of_the_same_vocabulary_gets_the_ids(file: Path) -> None:
    engine = tiny(320)
    ((name, peer),) = load_peers(engine, [f"llama.cpp={file}"]).items()
    assert name == "llama.cpp small.gguf"
    threads = engine.backbone.threads
    assert FakeLlama.made["n_threads"] == FakeLlama.made["n_threads_batch"] == threads
    assert FakeLlama.made["n_ctx"] == engine.context
    found = peer.reply([70, 71], 50)
    assert (found.text, found.tokens) == ("ABCDEFG", 7)  # EOS included
    assert 0 < found.first <= found.seconds
    assert peer.reply([70, 71], 3).tokens == 3
    assert vars(peer)["_llama"].asked == [[70, 71], [70, 71]]


def test_a_peer_of_another_vocabulary_gets_the_text(file: Path) -> None:
    engine = tiny(300)
    (peer,) = load_peers(engine, [f"llama.cpp={file}"]).values()
    ids = engine.tokenizer("Hi")["input_ids"]
    peer.reply(ids, 2)
    assert vars(peer)["_llama"].asked == [list(b"Hi")]


def test_bench_shows_tokens_a_second_before_ratios(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [Prompt("talk", ("Hi",))]
    peers = (f"llama.cpp={file}",)
    job = BenchJob(prompts, ["greedy"], Sampling(max_new_tokens=8), rounds=1, peers=peers)
    engine = tiny(320)
    (round_,) = measure_replies(engine, job, quiet)
    assert set(round_) == {"greedy", "baseline", "llama.cpp small.gguf"}
    result = bench(engine, job, lambda _: _Silent()) | {"load_seconds": 1.0, "device": "here"}
    figures = result["peers"]["llama.cpp small.gguf"]
    assert figures["tokens_per_second"] > 0
    assert figures["ratio"]["greedy"] > 0
    assert figures["decode_vanilla_ratio"] > 0
    show_bench(result)
    shown = capsys.readouterr().out
    order = ["tokens/s", "llama.cpp small.gguf, tokens/s", "speedup", "over llama.cpp small.gguf"]
    assert sorted(order, key=shown.index) == order
    assert engine.backbone.step_name in " ".join(shown.split())


class _Silent:
    def __enter__(self) -> Any:
        return quiet

    def __exit__(self, *_: object) -> None:
        pass


def test_mistakes_are_found_before_anything_is_loaded(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_peers(["transformers", f"llama.cpp={file}"])
    for wrong in ("vllm", "llama.cpp", "llama.cpp=", "transformers=x"):
        assert f"not {wrong!r}" in refusal(check_peers, [wrong])
    assert "there is no file /absent.gguf" in refusal(check_peers, ["llama.cpp=/absent.gguf"])
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert refusal(check_peers, [f"llama.cpp={file}"]).endswith("pip install llama-cpp-python")
