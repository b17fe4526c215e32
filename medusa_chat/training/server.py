"""Answers of any server with OpenAI's chat protocol (vLLM, llama.cpp, TGI). No torch here."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from typing import TYPE_CHECKING, Any

import httpx2

from medusa_chat.config import UserError
from medusa_chat.text import PASSWORD, duration_text, one_line, reason_of, size_text
from medusa_chat.training.questions import Answer, DistillJob, Question

if TYPE_CHECKING:
    from collections.abc import Sequence

PAUSES = (1.0, 4.0, 16.0)  # seconds before a failed request is sent again
# A reply comes in one piece, and a busy server queues the request first.
TIMEOUT = httpx2.Timeout(600, connect=10)
LONGEST = 1800  # seconds for a request, with all its repetitions
MOST_BYTES = 16 << 20  # of a response
CHAT = "/v1/chat/completions"
MODELS = "/v1/models"
# vLLM, SGLang and llama.cpp mention the context (OpenAI's code is context_length_exceeded), TGI
# its `inputs`. Azure refuses a prompt by its filter with the code content_filter.
_NO_TEXT = re.compile(
    r"content.?filter|context.{0,12}(length|size|window)|maximum model length"
    r"|`inputs` (tokens|must have)",
    re.I,
)
_KEPT = "; what was answered before is kept, and the same command goes on from there"
_LONGEST_COMPLAINT = 300  # characters


class Server:
    """A model on an OpenAI-compatible server. Call `close` at the end.

    Requests run in an event loop, so that Ctrl-C ends them at once.

    Attributes:
        name: the model's name on the server.
    """

    def __init__(self, url: str, name: str | None, job: DistillJob) -> None:
        """Find the model `name`, or the first one that the server at `url` lists.

        Raises:
            UserError: the address is invalid, or the server cannot be reached, refuses or lists
                no model.
        """
        self.url = _base(url)
        self._shown = PASSWORD.sub("", self.url)
        self.settings = {"max_tokens": job.max_new_tokens, "temperature": job.temperature}
        self.seed = job.seed
        self._client = _client(job.batch)
        self._loop = asyncio.Runner()
        try:
            self.name = name or self._loop.run(self._first_model())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Drop the connections, and requests that are under way after an error."""
        with self._loop:
            self._loop.run(self._client.aclose())

    def answer(self, questions: Sequence[Question]) -> list[Answer | None]:
        """Answer questions; None for one that the server gives no text for.

        That is so if the context has no space for an answer, a filter withholds it, or the model
        calls a tool.

        Raises:
            UserError: the server cannot be reached, refuses, or its response is not understood.
        """
        return self._loop.run(self._answers(questions))

    async def _answers(self, questions: Sequence[Question]) -> list[Answer | None]:
        return await asyncio.gather(*map(self._answer, questions))

    async def _answer(self, question: Question) -> Answer | None:
        seed = draw_seed(self.seed, question.index, question.turn)
        body = {"model": self.name, "messages": question.messages, **self.settings, "seed": seed}
        response = await self._send("POST", CHAT, body)
        if response.status_code in (400, 413, 422) and _NO_TEXT.search(_complaint(response)):
            return None
        document = self._document(CHAT, response)
        try:
            choice = document["choices"][0]
            text = choice["message"].get("content")
            finish = choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self._error(CHAT, "answered without 'choices' and a message") from None
        if not isinstance(text, str) or finish == "content_filter":
            return None
        return Answer(text, cut=finish == "length")

    async def _first_model(self) -> str:
        document = self._document(MODELS, await self._send("GET", MODELS))
        try:
            return str(document["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise UserError(
                f"{self._shown}{MODELS} lists no model; --server-model NAME says which to ask"
            ) from None

    def _error(self, path: str, fault: str) -> UserError:
        return UserError(f"{self._shown}{path} {fault}{_KEPT}")

    async def _send(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> httpx2.Response:
        """Send a request, up to four times. Raises UserError if no usable response comes."""
        try:
            async with asyncio.timeout(LONGEST):
                return await self._try(method, path, body)
        except TimeoutError:
            raise self._error(path, f"gave no answer in {duration_text(LONGEST)}") from None

    async def _try(self, method: str, path: str, body: dict[str, Any] | None) -> httpx2.Response:
        content = None if body is None else json.dumps(body).encode()
        for pause in (*PAUSES, None):
            try:
                response = await self._request(method, path, content)
            except httpx2.RequestError as error:
                fault = f"cannot be asked: {reason_of(error)}"
            else:
                if response.status_code != 429 and response.status_code < 500:
                    return response
                fault = f"answered with status {response.status_code}: {_complaint(response)}"
            if pause is not None:
                await asyncio.sleep(pause)
        raise self._error(path, fault)

    async def _request(self, method: str, path: str, content: bytes | None) -> httpx2.Response:
        """Return a response with its body, which may not be endless."""
        received = bytearray()
        async with self._client.stream(method, self.url + path, content=content) as response:
            async for piece in response.aiter_bytes():
                received += piece
                if len(received) > MOST_BYTES:
                    raise self._error(path, f"answered with more than {size_text(MOST_BYTES)}")
        return httpx2.Response(response.status_code, content=bytes(received))

    def _document(self, path: str, response: httpx2.Response) -> Any:
        """Read the JSON of a response. Raises UserError for a refusal and for other text."""
        status = response.status_code
        if not response.is_success:
            hint = " (the key is taken from OPENAI_API_KEY)" if status in (401, 403) else ""
            fault = f"answered with status {status}: {_complaint(response)}{hint}"
            raise self._error(path, fault)
        try:
            return response.json()
        except (ValueError, RecursionError):
            raise self._error(path, "answered with something that is not JSON") from None


def draw_seed(seed: int, index: int, turn: int) -> int:
    """Derive 31 bits from the run's seed, the number of the prompt and the turn."""
    digest = hashlib.sha256(f"{seed} {index} {turn}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


def _base(url: str) -> str:
    """The address without /v1."""
    try:
        parsed = httpx2.URL(url)
        fits = parsed.scheme in ("http", "https") and bool(parsed.host.encode("idna"))
    except (httpx2.InvalidURL, UnicodeError):
        fits = False
    if not fits:
        shown = PASSWORD.sub("", url)
        raise UserError(f"--server must be an address such as http://localhost:8000, not {shown!r}")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _client(connections: int) -> httpx2.AsyncClient:
    """Make a client with the key and the proxy of the environment."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError("OPENAI_API_KEY has characters that no key has")
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
    try:
        return httpx2.AsyncClient(headers=headers, timeout=TIMEOUT, limits=limits)
    except (ImportError, ValueError, httpx2.InvalidURL) as error:
        raise UserError(f"cannot use the proxy that the environment names: {error}") from None


def _complaint(response: httpx2.Response) -> str:
    """The server's error message and code, or the text of its response."""
    try:
        document = response.json()
        error = document.get("error", document)
        if isinstance(error, dict):
            message = error.get("message") or error.get("detail")
            parts = [message, error.get("code"), error.get("type")]
            named = [part for part in parts if isinstance(part, str)]
            error = ", ".join(named) or json.dumps(error)
        text = str(error)
    except (ValueError, AttributeError, RecursionError):
        text = response.text
    return one_line(text, _LONGEST_COMPLAINT) or response.reason_phrase
