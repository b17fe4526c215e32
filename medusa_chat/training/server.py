"""Replies from any server that speaks OpenAI's chat protocol (vLLM, llama.cpp, TGI). No torch here."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx2

from medusa_chat.config import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

PAUSES = (1.0, 4.0, 16.0)  # seconds before a request that failed is sent again
# A reply is one piece, and a busy server queues the request first.
TIMEOUT = httpx2.Timeout(600, connect=10)
CHAT = "/v1/chat/completions"
MODELS = "/v1/models"
# vLLM, SGLang and llama.cpp speak of the context (OpenAI's code is context_length_exceeded), TGI of its `inputs`.
_TOO_LONG = re.compile(
    r"context.{0,12}(length|size|window)|maximum model length|`inputs` (tokens|must have)", re.I
)
_KEPT = "; what was answered before is kept, and the same command goes on from there"


@dataclass(frozen=True)
class Question:
    """A conversation that waits for the assistant, with its place in the run."""

    index: int
    turn: int
    messages: list[dict[str, Any]]


@dataclass(frozen=True)
class Reply:
    """What a model said; `cut` if it was stopped before it had ended."""

    text: str
    cut: bool


class Server:
    """A model behind an OpenAI-compatible server; close it in the end.

    Attributes:
        name: the model's name on the server.
    """

    def __init__(
        self,
        url: str,
        name: str | None,
        *,
        batch: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> None:
        """Find the model: `name`, or the first one that the server lists.

        Args:
            url: the server's address, with or without /v1.
            batch: requests at once.

        Raises:
            UserError: the address is none, or the server cannot be reached, refuses or lists no model.
        """
        self.url = _base(url)
        self.settings = {"max_tokens": max_new_tokens, "temperature": temperature}
        self.seed = seed
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(batch)
        self._client = _client(batch)
        try:
            self.name = name or self._first_model()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Send nothing more; requests on their way are waited for, pauses are not."""
        self._closing.set()
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def answer(self, asked: Sequence[Question]) -> list[Reply | None]:
        """A reply to each question, None where the context has no room for one.

        Raises UserError where the server cannot be reached, refuses, or answers something else.
        """
        return list(self._pool.map(self._reply, asked))

    def _reply(self, question: Question) -> Reply | None:
        body = {"model": self.name, "messages": question.messages, **self.settings}
        response = self._send(
            "POST", CHAT, body | {"seed": draw_seed(self.seed, question.index, question.turn)}
        )
        if response.status_code in (400, 413, 422) and _TOO_LONG.search(_complaint(response)):
            return None
        document = self._document(CHAT, response)
        try:
            choice = document["choices"][0]
            text, finish = choice["message"]["content"], choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise UserError(
                f"{self.url}{CHAT} answered without 'choices' and a message{_KEPT}"
            ) from None
        if not isinstance(text, str):
            raise UserError(
                f"{self.url}{CHAT} answered without text (finish_reason {finish!r}){_KEPT}"
            )
        return Reply(text, finish == "length")

    def _first_model(self) -> str:
        document = self._document(MODELS, self._send("GET", MODELS))
        try:
            return str(document["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise UserError(
                f"{self.url}{MODELS} lists no model; --server-model NAME says which to ask"
            ) from None

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx2.Response:
        """The server's response, after some tries if need be; raises UserError if none came or it is not able to."""
        content = None if body is None else json.dumps(body).encode()
        for pause in (*PAUSES, None):
            try:
                response = self._client.request(method, self.url + path, content=content)
            except httpx2.RequestError as error:
                fault = f"cannot be asked: {_one_line(str(error)) or type(error).__name__}"
            else:
                if response.status_code != 429 and response.status_code < 500:
                    return response
                fault = f"answered with status {response.status_code}: {_complaint(response)}"
            if pause is None or self._closing.wait(pause):
                break
        raise UserError(f"{self.url}{path} {fault}{_KEPT}")

    def _document(self, path: str, response: httpx2.Response) -> Any:
        """The JSON of a response; raises UserError for a refusal and for what is no JSON."""
        if not response.is_success:
            hint = (
                " (the key is taken from OPENAI_API_KEY)"
                if response.status_code in (401, 403)
                else ""
            )
            fault = f"answered with status {response.status_code}: {_complaint(response)}{hint}"
            raise UserError(f"{self.url}{path} {fault}{_KEPT}")
        try:
            return response.json()
        except ValueError:
            raise UserError(
                f"{self.url}{path} answered with something that is not JSON{_KEPT}"
            ) from None


def draw_seed(seed: int, index: int, turn: int) -> int:
    """The seed of one reply: 31 bits of the run's seed, the conversation's index and the turn, and of nothing else."""
    digest = hashlib.sha256(f"{seed} {index} {turn}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


def _base(url: str) -> str:
    """The address before /v1."""
    try:
        parsed = httpx2.URL(url)
        fits = parsed.scheme in ("http", "https") and bool(parsed.host.encode("idna"))
    except (httpx2.InvalidURL, UnicodeError):
        fits = False
    if not fits:
        raise UserError(f"--server must be an address such as http://localhost:8000, not {url!r}")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _client(connections: int) -> httpx2.Client:
    """A client with the key and the proxy of the environment."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError("OPENAI_API_KEY has characters that no key has")
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )
    limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
    try:
        return httpx2.Client(headers=headers, timeout=TIMEOUT, limits=limits)
    except (ImportError, ValueError, httpx2.InvalidURL) as error:
        raise UserError(f"cannot use the proxy that the environment names: {error}") from None


def _complaint(response: httpx2.Response) -> str:
    """What the server says is wrong: its error's message and code, or the text as it is."""
    try:
        document = response.json()
        error = document.get("error", document)
        if isinstance(error, dict):
            parts = [
                error.get("message") or error.get("detail"),
                error.get("code"),
                error.get("type"),
            ]
            named = [part for part in parts if isinstance(part, str)]
            error = ", ".join(named) or json.dumps(error)
        text = str(error)
    except (ValueError, AttributeError):
        text = response.text
    return _one_line(text) or response.reason_phrase


def _one_line(text: str) -> str:
    """Printable, on one line, and not longer than one reads."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return plain if len(plain) <= 300 else plain[:299] + "…"
