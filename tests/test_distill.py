"""Distillation with tiny models and real HTTP servers: the output, and resuming after any end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from medusa_chat.cli import main
from medusa_chat.config import UserError
from medusa_chat.locks import only_writer
from medusa_chat.training import server as module
from medusa_chat.training.distillation import distill
from medusa_chat.training.questions import DistillJob
from tests.helpers.complaints import refusal
from tests.helpers.full_disk import full_disk
from tests.helpers.local_server import local_server
from tests.helpers.tiny import CHAT_TEMPLATE, random_model, save_model, tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

VOCABULARY = 320
ENDS = [*range(3, 250, 16), 259]  # a random model says one of them every few tokens
TALKS = [[f"Say {n}", "More", "And?"][: 1 + n % 3] for n in range(7)]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@dataclass
class FakeServer:
    """A server whose `respond` gives status and body of a chat request; None hangs up."""

    url: str
    respond: Callable[[dict[str, Any]], tuple[int, Any] | None]
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


def said(text: Any, finish: str = "stop") -> tuple[int, Any]:
    return 200, {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]
    }


def echo(body: dict[str, Any]) -> tuple[int, Any]:
    """A reply that depends on the whole request, and is cut now and then."""
    what = json.dumps([body["messages"], body["seed"], body["max_tokens"], body["temperature"]])
    return said(f"{sum(what.encode())} é", "length" if body["seed"] % 5 == 0 else "stop")


@contextmanager
def serving(
    respond: Callable[[dict[str, Any]], tuple[int, Any] | None] = echo,
) -> Iterator[FakeServer]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # it waits 40 ms between the head and the body

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            known = self.path == "/v1/models"
            self.reply(
                200 if known else 404,
                {"data": [{"id": "first"}, {"id": "second"}]} if known else {},
            )

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.asked.append(body)
            served.headers.append(dict(self.headers))
            answer = served.respond(body) if self.path == "/v1/chat/completions" else (404, {})
            if answer is None:
                self.close_connection = True
            else:
                self.reply(*answer)

        def reply(self, status: int, document: Any) -> None:
            content = document if isinstance(document, bytes) else json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with local_server(Handler) as url:
        served = FakeServer(url, respond)
        yield served


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving() as started:
        yield started


def write_prompts(file: Path, talks: list[list[str]] = TALKS) -> Path:
    file.write_text(
        "".join(json.dumps({"category": "c", "turns": turns}) + "\n" for turns in talks)
    )
    return file


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl")


def run(
    prompts: Path, out: Path, model: Path | None = None, **changes: Any
) -> list[dict[str, Any]]:
    job: dict[str, Any] = {"turns": 3, "batch": 3, "max_new_tokens": 8, "temperature": 0.7}
    job |= {"seed": 3}
    job |= {name: changes.pop(name) for name in (*job, "system") if name in changes}
    options = {"progress": lambda *_: None} | changes
    distill(str(model) if model else None, [prompts], out, DistillJob(**job), **options)
    return [json.loads(line) for line in out.read_text().splitlines()]


def command(capsys: pytest.CaptureFixture[str], prompts: Path, out: Path, *words: Any) -> str:
    """The one line of a `medusa-chat distill` that fails."""
    assert main(["distill", "--prompts", str(prompts), "--out", str(out), *map(str, words)]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert complaint.startswith("medusa-chat: error: ")
    return complaint


def save(folder: Path, ends: Any = None, template: str = CHAT_TEMPLATE, **changes: Any) -> Path:
    model = random_model("llama", VOCABULARY, **changes)
    model.generation_config.eos_token_id = ends
    return save_model(folder, model, template)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), ENDS)


# The model here


def alone(folder: Path, messages: list[dict[str, Any]], count: int) -> list[int]:
    """Greedy ids of a reply, one conversation at a time and past every end."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    encoded: Any = tokenizer()
    text = encoded.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    ids: list[int] = encoded(text).input_ids
    for _ in range(count):
        with torch.inference_mode():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


def test_replies_are_the_models_own_up_to_an_end_and_cut_ones_say_so(
    folder: Path, prompts: Path, tmp_path: Path
) -> None:
    lines = run(prompts, tmp_path / "o.jsonl", folder, temperature=0.0)
    kinds = set()
    for line in lines:
        assert (line["source"], line["category"]) == ("self", "c")
        for i, message in enumerate(line["messages"]):
            if message["role"] == "user":
                assert message["content"] == TALKS[line["index"]][i // 2]
                continue
            ids = alone(folder, line["messages"][:i], 8)
            stop = next((n for n, token in enumerate(ids) if token in ENDS), None)
            text = str(tokenizer().decode(ids[:stop], skip_special_tokens=True))
            assert message["content"] == (text.rstrip("\ufffd") if stop is None else text)
            assert message.get("cut", False) == (stop is None)
            kinds.add((stop is None, i))
            assert stop is not None or message is line["messages"][-1]
    assert {cut for cut, _ in kinds} == {True, False}
    assert max(i for _, i in kinds) > 1  # some went on


def test_a_single_end_of_the_tokenizer_counts_and_without_any_all_is_cut(
    prompts: Path, tmp_path: Path
) -> None:
    free = save(tmp_path / "free")
    lines = run(prompts, tmp_path / "free.jsonl", free, temperature=0.0)
    assert all([m.get("cut") for m in line["messages"]] == [None, True] for line in lines)
    ids = alone(free, lines[0]["messages"][:1], 8)
    end = next(token for token in ids[1:] if token < 256 and token != ids[0])
    told = tokenizer()
    told.eos_token = told.convert_ids_to_tokens(end)
    told.save_pretrained(free)
    first = run(prompts, tmp_path / "told.jsonl", free, temperature=0.0)[0]["messages"]
    assert first[1]["content"] == tokenizer().decode(
        ids[: ids.index(end)], skip_special_tokens=True
    )
    assert "cut" not in first[1]


def cut_at_every_place(whole: Path, again: Callable[[Path], Any], places: int) -> None:
    """Cut a finished file at many places. Another run must restore it, byte for byte."""
    content = whole.read_bytes()
    for place in range(0, len(content), len(content) // places):
        cut = whole.with_name("cut.jsonl")
        cut.write_bytes(content[:place])
        again(cut)
        assert cut.read_bytes() == content, place


def test_a_local_run_goes_on_to_the_same_bytes_and_the_seed_matters(
    folder: Path, prompts: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.jsonl"
    seen: list[tuple[int, int, int]] = []  # progress, and lines in the file at that time
    run(
        prompts,
        whole,
        folder,
        progress=lambda *at: seen.append((*at, len(whole.open().readlines() if at[0] else []))),
    )
    assert [at[:2] for at in seen] == [(0, 7), (3, 7), (6, 7), (7, 7)]
    kept = [json.loads(line)["index"] for line in whole.open()]
    assert [at[2] for at in seen] == [sum(index < at[0] for index in kept) for at in seen]
    cut_at_every_place(whole, lambda out: run(prompts, out, folder), 5)
    other = tmp_path / "other.jsonl"
    run(prompts, other, folder, seed=4)
    assert [json.loads(a)["messages"] for a in other.open()] != [
        json.loads(a)["messages"] for a in whole.open()
    ]
    same = write_prompts(tmp_path / "same.jsonl", [["Moon"]] * 4)
    replies = [
        line["messages"][1]["content"] for line in run(same, tmp_path / "same", folder, batch=1)
    ]
    assert len(set(replies)) > 1  # each batch draws anew


def test_what_does_not_fit_the_context_ends_and_shortens_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = save(tmp_path / "small", ENDS, max_position_embeddings=64)
    fits, grows, long = (
        ["What", "Yo"],
        ["Moon", "x" * 50],
        ["x" * 54],
    )  # 54 and 3 of the template and 8: one too many
    plain = run(
        write_prompts(tmp_path / "a", [fits, grows[:1]]),
        tmp_path / "a.jsonl",
        small,
        temperature=0.0,
    )
    talks = write_prompts(tmp_path / "b", [long, fits, grows, long])
    out = tmp_path / "b.jsonl"
    mixed = run(talks, out, small, temperature=0.0, batch=2)
    assert [line["index"] for line in mixed] == [1, 2]
    assert [line["messages"] for line in mixed] == [line["messages"] for line in plain]
    assert "cut" not in mixed[1]["messages"][-1]
    cut_at_every_place(out, lambda again: run(talks, again, small, temperature=0.0, batch=2), 4)
    one_less = run(
        write_prompts(tmp_path / "c", [["x" * 53]]), tmp_path / "c.jsonl", small, temperature=0.0
    )
    assert len(one_less[0]["messages"]) == 2
    flags = ("--model", small, "--max-new-tokens")
    assert "must be below the 64 of the context" in command(
        capsys, talks, tmp_path / "d", *flags, 64
    )
    assert "none of the 4 prompts got an answer" in command(
        capsys, talks, tmp_path / "e", *flags, 63
    )


def test_a_model_that_ends_at_once_leaves_the_turn_out(prompts: Path, tmp_path: Path) -> None:
    first = {
        alone(save(tmp_path / "m"), [{"role": "user", "content": talk[0]}], 1)[0] for talk in TALKS
    }
    mute = save(tmp_path / "mute", sorted(first))
    with pytest.raises(UserError, match="none of the 7 prompts"):
        run(prompts, tmp_path / "o.jsonl", mute, temperature=0.0)
    assert (tmp_path / "o.jsonl").read_bytes() == b""


def test_a_template_without_system_and_other_mistakes_are_one_line(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    model = save(tmp_path / "strict", template=strict)
    out = tmp_path / "o.jsonl"
    assert "no system here" in command(
        capsys, prompts, out, "--model", model, "--system", "Be brief."
    )
    assert "temperature must be" in command(
        capsys, prompts, out, "--model", folder, "--temperature", "nan"
    )
    assert "temperature must be" in command(
        capsys, prompts, out, "--model", folder, "--temperature", "inf"
    )
    assert "seed must be" in command(capsys, prompts, out, "--model", folder, "--seed", "-1")
    assert "unknown model" in command(capsys, prompts, out, "--model", tmp_path / "none")
    assert "needs --server" in command(
        capsys, prompts, out, "--model", folder, "--server-model", "x"
    )
    assert "No such file" in command(
        capsys, prompts, tmp_path / "no" / "o.jsonl", "--model", folder
    )
    assert "is not a file" in command(capsys, prompts, tmp_path, "--model", folder)


# A server


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/"])
def test_the_protocol(
    fake: FakeServer, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " secret\n")
    lines = run(prompts, tmp_path / "o.jsonl", server=fake.url + tail)
    assert all(headers["Authorization"] == "Bearer secret" for headers in fake.headers)
    assert all(
        set(b) == {"model", "messages", "max_tokens", "temperature", "seed"} for b in fake.asked
    )
    assert {(b["model"], b["max_tokens"], b["temperature"]) for b in fake.asked} == {
        ("first", 8, 0.7)
    }
    assert all(set(message) == {"role", "content"} for b in fake.asked for message in b["messages"])
    assert len({b["seed"] for b in fake.asked}) == len(fake.asked)
    replies = [
        message for line in lines for message in line["messages"] if message["role"] == "assistant"
    ]
    assert len(replies) == len(fake.asked)
    assert all(message["content"].endswith("é") for message in replies)
    assert {line["settings"]["model"] for line in lines} == {"first"}


def test_no_key_no_header_and_the_models_name_can_be_given(
    fake: FakeServer, prompts: Path, tmp_path: Path
) -> None:
    run(prompts, tmp_path / "o.jsonl", server=fake.url, server_model="mine")
    assert not any("Authorization" in headers for headers in fake.headers)
    assert {body["model"] for body in fake.asked} == {"mine"}


def test_a_batch_is_asked_at_once_and_the_batch_makes_no_difference(
    fake: FakeServer, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o.jsonl"
    meeting = threading.Barrier(4, timeout=20)

    def together(body: dict[str, Any]) -> tuple[int, Any]:
        if len(body["messages"]) == 1:
            meeting.wait()
        return echo(body)

    run(prompts, tmp_path / "one.jsonl", server=fake.url, batch=1)
    fake.respond = together
    run(prompts, out, server=fake.url, batch=4, limit=4)
    assert not meeting.broken
    fake.respond = echo
    run(prompts, out, server=fake.url, batch=5)  # with more prompts, and goes on
    assert out.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    cut_at_every_place(out, lambda again: run(prompts, again, server=fake.url, batch=2), 5)
    fake.asked.clear()
    run(prompts, out, server=fake.url)
    assert fake.asked == []  # all was there
    run(prompts, tmp_path / "two.jsonl", server=fake.url, seed=4)
    seeds = {body["seed"] for body in fake.asked}
    fake.asked.clear()
    run(prompts, tmp_path / "three.jsonl", server=fake.url)
    assert not seeds & {body["seed"] for body in fake.asked}


def test_a_cut_reply_ends_its_conversation(fake: FakeServer, prompts: Path, tmp_path: Path) -> None:
    fake.respond = lambda body: said(
        "So\ufffd", "length" if "Say 2" in body["messages"][0]["content"] else "stop"
    )
    lines = run(prompts, tmp_path / "o.jsonl", server=fake.url)
    assert lines[2]["messages"] == [
        {"role": "user", "content": "Say 2"},
        {"role": "assistant", "content": "So", "cut": True},
    ]
    assert len(lines[5]["messages"]) == 6
    assert [line["index"] for line in lines if "cut" in line["messages"][-1]] == [2]


@pytest.mark.parametrize(
    "end",
    [
        (
            400,
            {
                "object": "error",
                "message": "This model's maximum context length is 64 tokens.",
                "code": 400,
            },
        ),
        (
            400,
            {
                "error": {
                    "code": 400,
                    "message": "exceeds the available context size (64)",
                    "type": "exceed",
                }
            },
        ),
        (400, {"error": {"message": "too much", "code": "context_length_exceeded"}}),
        (
            422,
            {
                "error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 64",
                "type": "v",
            },
        ),
        (400, {"error": {"message": "filtered", "code": "content_filter"}}),
        said(""),
        said(" \n", "length"),
        said(None),
        said(None, "tool_calls"),
        said("withh", "content_filter"),
        (200, {"choices": [{"message": {"tool_calls": []}, "finish_reason": "tool_calls"}]}),
    ],
    ids=[
        *("vllm", "llama.cpp", "openai", "tgi", "azure", "empty", "blank"),
        *("null", "tool call", "filtered", "no content"),
    ],
)
def test_a_full_context_or_an_empty_reply_ends_the_conversation_alone(
    fake: FakeServer, prompts: Path, tmp_path: Path, end: tuple[int, Any]
) -> None:
    def respond(body: dict[str, Any]) -> tuple[int, Any]:
        first = body["messages"][0]["content"]
        return (
            end
            if first == "Say 3" or (len(body["messages"]) == 3 and first == "Say 5")
            else said("ok")
        )

    fake.respond = respond
    lines = run(prompts, tmp_path / "o.jsonl", server=fake.url)
    assert [(line["index"], len(line["messages"])) for line in lines] == [
        (0, 2),
        (1, 4),
        (2, 6),
        (4, 4),
        (5, 2),
        (6, 2),
    ]
    assert lines[4]["messages"][-1] == {"role": "assistant", "content": "ok"}
    cut_at_every_place(tmp_path / "o.jsonl", lambda again: run(prompts, again, server=fake.url), 3)


def test_a_second_run_into_the_same_file(fake: FakeServer, prompts: Path, tmp_path: Path) -> None:
    with only_writer(tmp_path / "o.jsonl", "another run"):
        line = refusal(run, prompts, tmp_path / "o.jsonl", server=fake.url)
    assert line.startswith("another run is writing to ")
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize("after", [0, 5])
def test_a_server_that_hangs_is_left_in_time(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """It answers nothing, or a byte now and then, without an end."""
    monkeypatch.setattr(module, "LONGEST", 0.5)
    with hanging(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" if after else b"") as url:
        line = refusal(run, prompts, tmp_path / "o.jsonl", server=url, server_model="m")
    assert "gave no answer in" in line


def test_ctrl_c_ends_a_run_that_waits_for_a_server(prompts: Path, tmp_path: Path) -> None:
    with hanging(b"") as url:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run(prompts, tmp_path / "o.jsonl", server=url, server_model="m")
    assert time.monotonic() - started < 20


def test_an_endless_answer_is_cut(
    fake: FakeServer, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    fake.respond = lambda _: (200, b" " * 5000)
    line = refusal(run, prompts, tmp_path / "o.jsonl", server=fake.url)
    assert "answered with more than 1.0 kB" in line


@contextmanager
def hanging(answer: bytes) -> Iterator[str]:
    """A server that takes requests, begins the same answer to each and never ends it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        opened = []

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection = listener.accept()[0]
                    opened.append(connection)
                    connection.sendall(answer)

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for connection in opened:
            connection.close()


FLEETING: dict[str, tuple[int, Any] | None] = {
    "500": (500, {"error": {"message": "boom"}}),
    "429": (429, {"error": {"message": "slow down"}}),
    "503, not JSON": (503, b"<html>boom</html>"),
    "hangs up": None,
}


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The output of a run without a fault."""
    place = tmp_path_factory.mktemp("smooth")
    with serving() as started:
        run(write_prompts(place / "p.jsonl"), place / "o.jsonl", server=started.url)
    return (place / "o.jsonl").read_bytes()


@pytest.mark.parametrize("fault", FLEETING)
def test_a_fleeting_fault_makes_no_difference(
    fake: FakeServer, prompts: Path, tmp_path: Path, smooth: bytes, fault: str
) -> None:
    tries: dict[int, int] = {}

    def respond(body: dict[str, Any]) -> tuple[int, Any] | None:
        tries[body["seed"]] = tries.get(body["seed"], 0) + 1
        return echo(body) if tries[body["seed"]] > 3 else FLEETING[fault]

    fake.respond = respond
    run(prompts, tmp_path / "rough.jsonl", server=fake.url)
    assert (tmp_path / "rough.jsonl").read_bytes() == smooth


FATAL: dict[str, tuple[tuple[int, Any] | None, int, str]] = {
    "500": (
        (500, {"error": {"message": "bo\nom\x1b[1m"}}),
        4,
        "status 500: bo om; what was answered",
    ),
    "429": ((429, b""), 4, "status 429: Too Many Requests"),
    "hangs up": (None, 4, "cannot be asked: Server disconnected"),
    "401": (
        (401, {"error": {"message": "bad key"}}),
        1,
        "status 401: bad key (the key is taken from OPENAI_API_KEY)",
    ),
    "404": ((404, {"detail": "Not Found"}), 1, "status 404: Not Found"),
    "400": ((400, {"error": "odd"}), 1, "status 400: odd"),
    "not JSON": ((200, b"<html>"), 1, "something that is not JSON"),
    "not text": ((200, b"\xff\xfe\xfd"), 1, "something that is not JSON"),
    "a list": ((200, []), 1, "without 'choices'"),
    "no choices": ((200, {"choices": []}), 1, "without 'choices'"),
    "no message": ((200, {"choices": [{"message": None}]}), 1, "without 'choices'"),
    "nested": ((200, b"[" * 100_000), 1, "something that is not JSON"),
}


@pytest.mark.parametrize("case", FATAL)
def test_a_lasting_fault_is_one_line_and_what_was_answered_is_kept(
    fake: FakeServer,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    smooth: bytes,
    case: str,
) -> None:
    fault, tries, words = FATAL[case]
    out = tmp_path / "o.jsonl"
    flags = (
        "--server",
        fake.url,
        "--batch",
        1,
        "--seed",
        3,
        "--max-new-tokens",
        8,
        "--temperature",
        0.7,
    )
    fake.respond = lambda body: fault if body["messages"][0]["content"] == "Say 4" else echo(body)
    complaint = command(capsys, prompts, out, *flags)
    assert words in complaint
    assert f"{fake.url}/v1/chat/completions" in complaint
    assert "the same command goes on" in complaint
    assert sum(body["messages"][0]["content"] == "Say 4" for body in fake.asked) == tries
    assert out.read_bytes() == b"".join(smooth.splitlines(keepends=True)[:4])
    fake.respond = echo
    assert main(["distill", "--prompts", str(prompts), "--out", str(out), *map(str, flags)]) == 0
    assert out.read_bytes() == smooth
    assert capsys.readouterr().out == f"wrote {out}: 7 conversations\n"


def test_addresses_that_lead_nowhere(
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fake: FakeServer,
) -> None:
    out = tmp_path / "o.jsonl"
    for address in (
        "localhost:8000",
        "ftp://here",
        "http://",
        "http://a..b",
        "http://here:port",
        "",
    ):
        assert "--server must be an address" in command(capsys, prompts, out, "--server", address)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert "/v1/models cannot be asked: " in command(
        capsys, prompts, out, "--server", f"http://127.0.0.1:{port}"
    )
    assert "status 404" in command(capsys, prompts, out, "--server", fake.url + "/elsewhere")
    monkeypatch.setattr(module, "MODELS", "/v1/nothing")
    assert "status 404" in command(capsys, prompts, out, "--server", fake.url)
    monkeypatch.setenv("OPENAI_API_KEY", "ключ")
    assert "OPENAI_API_KEY" in command(capsys, prompts, out, "--server", fake.url)
    assert not out.exists()


def test_with_a_server_no_model_and_no_torch_is_loaded(
    fake: FakeServer, prompts: Path, tmp_path: Path
) -> None:
    code = "import sys; from medusa_chat.cli import main; main(sys.argv[1:])"
    code += "; assert 'torch' not in sys.modules"
    words = [
        "distill",
        "--server",
        fake.url,
        "--prompts",
        str(prompts),
        "--out",
        str(tmp_path / "o.jsonl"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"wrote {tmp_path / 'o.jsonl'}: 7 conversations\n"


def test_halves_of_surrogate_pairs_are_no_text(
    fake: FakeServer, folder: Path, tmp_path: Path
) -> None:
    file = write_prompts(tmp_path / "p.jsonl", [["Moon\ud800"]])
    fake.respond = lambda _: said("So\udc00")
    assert run(file, tmp_path / "o", folder)[0]["messages"][0]["content"] == "Moon?"
    messages = run(file, tmp_path / "s", server=fake.url)[0]["messages"]
    assert [message["content"] for message in messages] == ["Moon?", "So?"]


def test_system_prompts_are_kept_and_given(fake: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "Hi"}]
    file.write_text(json.dumps({"messages": own}) + "\n" + json.dumps({"turns": ["Hi"]}) + "\n")
    bare = run(file, tmp_path / "bare.jsonl", server=fake.url)
    given = run(file, tmp_path / "given.jsonl", server=fake.url, system="Given.")
    starts = [[m["content"] for m in line["messages"][:-1]] for line in bare + given]
    assert starts == [["Own.", "Hi"], ["Hi"], ["Own.", "Hi"], ["Given.", "Hi"]]
    assert {
        m["content"] for body in fake.asked for m in body["messages"] if m["role"] == "system"
    } == {
        "Own.",
        "Given.",
    }
    with pytest.raises(UserError, match="line 2 answers another prompt"):
        run(file, tmp_path / "bare.jsonl", server=fake.url, system="Given.")


# Going on in a file


def test_a_file_of_another_run_is_left_as_it_is(
    fake: FakeServer, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o.jsonl"
    run(prompts, out, server=fake.url)
    content = out.read_bytes()
    first, second, *_ = content.splitlines(keepends=True)
    other = write_prompts(tmp_path / "other.jsonl", [*TALKS[:5], ["Say 5", "Else"], TALKS[6]])
    attempts: list[tuple[str, bytes, Path, dict[str, Any]]] = [
        ("line 6 answers another prompt", content, other, {}),
        ("line 5 answers prompt 5, but this run has 4", content, prompts, {"limit": 4}),
        ("line 1 was made with turns 3, but this run has 2", content, prompts, {"turns": 2}),
        (
            "line 1 was made with model first, but this run has mine",
            content,
            prompts,
            {"server_model": "mine"},
        ),
        ("line 3 answers prompt 2 again", first + second + second, prompts, {}),
        ("line 1 was not written by distill", b"A prompt\n", prompts, {}),
        ("line 2 was not written by distill", first + b"[1]\n", prompts, {}),
        ("line 1 was not written by distill", b"A prompt", prompts, {}),
    ]
    for words, there, file, changes in attempts:
        out.write_bytes(there)
        with pytest.raises(UserError, match=words):
            run(file, out, server=fake.url, **changes)
        assert out.read_bytes() == there


def test_local_batches_are_part_of_the_run(folder: Path, prompts: Path, tmp_path: Path) -> None:
    run(prompts, tmp_path / "o.jsonl", folder, batch=3)
    with pytest.raises(
        UserError, match="line 1 was made with batch 3, but this run has 2; choose another --out"
    ):
        run(prompts, tmp_path / "o.jsonl", folder, batch=2)


def test_a_full_disk_is_one_line_and_the_run_goes_on(
    fake: FakeServer, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "o.jsonl"
    flags = ["--server", fake.url, "--batch", "2", "--prompts", str(prompts), "--out"]
    assert main(["distill", *flags, str(whole)]) == 0
    capsys.readouterr()
    size = len(b"".join(whole.read_bytes().splitlines(keepends=True)[:3])) + 20
    with full_disk() as limit:
        limit(size)
        assert main(["distill", *flags, str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert out.read_bytes() == whole.read_bytes()[:size]  # within the fourth line
    assert main(["distill", *flags, str(out)]) == 0
    assert out.read_bytes() == whole.read_bytes()
