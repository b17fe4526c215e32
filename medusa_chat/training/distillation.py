"""`medusa-chat distill`: the model answers seed prompts, so that its heads learn from its own words."""

from __future__ import annotations

import json
import os
from contextlib import closing
from dataclasses import asdict, dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, Protocol, cast

from medusa_chat.config import COLD, Message, ModelSpec, Sampling, UserError
from medusa_chat.hub.model_list import resolve_model
from medusa_chat.prompts import Prompt, read_prompts
from medusa_chat.training.memory import check_answers
from medusa_chat.training.server import Question, Reply, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_BEGINNING = (
    b'{"source": "self", "index": '  # of every line: what begins otherwise is not ours to cut off
)
_OTHERWISE = "choose another --out or delete it"


@dataclass(frozen=True)
class Plan:
    """How replies are drawn: what the result depends on besides the model and the prompts.

    Attributes:
        turns: user turns to answer of each conversation.
        batch: conversations that are answered at once.
        system: put in front of conversations that have no system message; "" for none.
        template: a conversation template of fastchat, in place of the model's own here.
    """

    turns: int
    batch: int
    max_new_tokens: int
    temperature: float
    seed: int
    system: str = ""
    template: str = ""

    def __post_init__(self) -> None:
        Sampling(
            temperature=self.temperature, max_new_tokens=self.max_new_tokens, seed=self.seed
        )  # checks them
        if not isfinite(self.temperature):
            raise UserError(f"temperature must be a finite number, not {self.temperature}")


class Answerer(Protocol):
    """Whoever answers: the model here (Local) or a server's (server.py)."""

    name: str

    def answer(self, asked: Sequence[Question]) -> list[Reply | None]:
        """A reply to each of the questions, which are all of one turn; None where the context has no room."""


@dataclass
class Talk:
    """A conversation while it is being answered."""

    index: int
    category: str
    turns: tuple[str, ...]
    messages: list[dict[str, Any]]
    ended: bool = False

    @classmethod
    def begin(cls, index: int, prompt: Prompt, system: str) -> Talk:
        """The conversation before its first user turn: its own system message, or else `system`."""
        first = [
            message["content"] for message in prompt.reference[:1] if message["role"] == "system"
        ]
        texts = first or ([system] if system else [])
        turns = tuple(_encodable(text) for text in prompt.turns)
        return cls(
            index,
            prompt.category,
            turns,
            [{"role": "system", "content": _encodable(text)} for text in texts],
        )

    def asks(self, turns: int) -> list[dict[str, Any]]:
        """What it holds besides replies: the system message and the first `turns` user turns."""
        users = [{"role": "user", "content": text} for text in self.turns[:turns]]
        return [message for message in self.messages if message["role"] == "system"] + users

    def take(self, reply: Reply | None) -> None:
        """Take up a reply to the last message; without one the conversation ended before that message."""
        self.ended = reply is None or reply.cut
        # The bytes of a character that was cut through are no character.
        text = (
            ""
            if reply is None
            else _encodable(reply.text.rstrip("\ufffd") if reply.cut else reply.text)
        )
        if not text.strip():
            self.messages.pop()
            self.ended = True
        else:
            self.messages.append(
                {"role": "assistant", "content": text} | ({"cut": True} if self.ended else {})
            )

    def line(self, settings: dict[str, Any]) -> bytes:
        """The conversation as a line of the output, empty if nothing in it was answered."""
        if not any(message["role"] == "assistant" for message in self.messages):
            return b""
        place = {"source": "self", "index": self.index, "category": self.category}
        return (
            json.dumps(place | {"settings": settings, "messages": self.messages}).encode() + b"\n"
        )


def _encodable(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can hold but no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def distill(
    model: str | None,
    prompts: list[Path],
    out: Path,
    plan: Plan,
    *,
    limit: int | None = None,
    server: str | None = None,
    server_model: str | None = None,
    device: str = "auto",
    models: Path | None = None,
    ignore_memory: bool = False,
    progress: Callable[[int, int], None],
) -> tuple[int, int]:
    """Write conversations with the user's turns of `prompts` and a model's own answers to `out`, a line each.

    A run that was cut off goes on behind the last whole batch that `out` holds; the result is the same. A last
    reply with `"cut": true` was stopped by `max_new_tokens`.

    Args:
        model: name, folder or hub id; not loaded where a server answers.
        models: the user's own list of models.
        ignore_memory: load the model even where less memory is free than it should need.
        server: address of an OpenAI-compatible server; `server_model` is its name for the model.
        progress: called with the prompts done and all prompts.

    Returns:
        Conversations in `out`, and prompts. A prompt whose first turn got no answer has no conversation.

    Raises:
        UserError: something cannot be read or loaded, `out` is of another run, or the server fails.
    """
    if server_model and not server:
        raise UserError("--server-model NAME needs --server URL")
    talks = [
        Talk.begin(i, prompt, plan.system) for i, prompt in enumerate(read_prompts(prompts, limit))
    ]
    if server is None:
        local = Local(
            resolve_model(model, models=models, template=plan.template), plan, device, ignore_memory
        )
        return _run(local, talks, out, plan, progress)
    remote = Server(
        server,
        server_model,
        batch=plan.batch,
        max_new_tokens=plan.max_new_tokens,
        temperature=plan.temperature,
        seed=plan.seed,
    )
    with closing(remote):
        return _run(remote, talks, out, plan, progress)


def _run(
    answerer: Answerer,
    talks: list[Talk],
    out: Path,
    plan: Plan,
    progress: Callable[[int, int], None],
) -> tuple[int, int]:
    settings = {"model": answerer.name} | asdict(plan)
    del settings["system"]  # the messages tell
    if not plan.template or isinstance(answerer, Server):
        del settings["template"]
    if isinstance(answerer, Server):
        del settings["batch"]  # each reply has its own seed there
    done, kept = _resume(out, talks, plan.batch, settings)
    progress(done, len(talks))
    with out.open("ab") as file:
        for start in range(done, len(talks), plan.batch):
            group = talks[start : start + plan.batch]
            _converse(answerer, group, plan.turns)
            lines = [line for line in (talk.line(settings) for talk in group) if line]
            file.write(b"".join(lines))
            file.flush()
            kept += len(lines)
            progress(start + len(group), len(talks))
    if not kept:
        reason = "no reply fits the context, or all replies are empty"
        raise UserError(
            f"none of the {len(talks)} prompts got an answer: {reason}; try a smaller --max-new-tokens"
        )
    return kept, len(talks)


def _converse(answerer: Answerer, talks: list[Talk], turns: int) -> None:
    """Have the first `turns` user turns of each conversation answered, all conversations at once."""
    for turn in range(turns):
        asked = [talk for talk in talks if not talk.ended and turn < len(talk.turns)]
        for talk in asked:
            talk.messages.append({"role": "user", "content": talk.turns[turn]})
        replies = (
            answerer.answer([Question(talk.index, turn, talk.messages) for talk in asked])
            if asked
            else []
        )
        for talk, reply in zip(asked, replies, strict=True):
            talk.take(reply)


def _resume(out: Path, talks: list[Talk], batch: int, settings: dict[str, Any]) -> tuple[int, int]:
    """Cut off what follows the last whole batch in `out`; returns how many prompts are done, and their lines.

    A conversation without an answer has no line, so a batch is known to be whole if its last conversation is there,
    or one of a later batch. Nothing is cut off from a file that another run, or no run, has written.
    """
    if not out.exists():
        return 0, 0
    if not out.is_file():
        raise UserError(f"{out} is not a file that can be gone on with; choose another --out")
    indices: list[int] = []
    ends = [0]
    with out.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.endswith(b"\n"):
                indices.append(_check(line, f"{out}, line {number}", talks, indices[-1:], settings))
                ends.append(ends[-1] + len(line))
            elif not (line.startswith(_BEGINNING) or _BEGINNING.startswith(line)):
                raise UserError(f"{out}, line {number} was not written by distill; {_OTHERWISE}")
    done = 0
    if indices:
        start = indices[-1] // batch * batch
        stop = min(start + batch, len(talks))
        done = stop if indices[-1] == stop - 1 else start
    kept = sum(index < done for index in indices)
    os.truncate(out, ends[kept])
    return done, kept


def _check(
    line: bytes, place: str, talks: list[Talk], before: list[int], settings: dict[str, Any]
) -> int:
    """The index of a line that an earlier run wrote; raises UserError if this run would have asked otherwise."""
    try:
        item = json.loads(line)
        index, made = int(item["index"]), dict(item["settings"])
        asks = [message for message in item["messages"] if message["role"] != "assistant"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{place} was not written by distill; {_OTHERWISE}") from None
    for name in settings | made:
        if made.get(name) != settings.get(name):
            there, here = made.get(name, "none"), settings.get(name, "none")
            raise UserError(
                f"{place} was made with {name} {there}, but this run has {here}; {_OTHERWISE}"
            )
    if not 0 <= index < len(talks):
        raise UserError(
            f"{place} answers prompt {index + 1}, but this run has {len(talks)}; {_OTHERWISE}"
        )
    if [index] <= before:
        raise UserError(f"{place} answers prompt {index + 1} again or out of turn; {_OTHERWISE}")
    if asks != talks[index].asks(sum(message["role"] == "user" for message in asks)):
        raise UserError(
            f"{place} answers another prompt than the one that this run has there; {_OTHERWISE}"
        )
    return index


class Local:
    """The model here, through transformers' generate(); loaded when it is first asked."""

    def __init__(
        self, spec: ModelSpec, plan: Plan, device: str, ignore_memory: bool = False
    ) -> None:
        self._spec, self.name = spec, spec.name
        self._plan, self._device, self._ignore_memory = plan, device, ignore_memory
        self._backbone: Any = None

    def answer(self, asked: Sequence[Question]) -> list[Reply | None]:
        """Replies to questions of one batch and turn; None where prompt and reply may not fit the context.

        Raises UserError for a model that cannot be loaded, for a conversation that its template refuses, and for
        too little memory.
        """
        import torch

        if self._backbone is None:
            self._load()
        if asked[0].turn == 0:
            # Each batch draws from its own seed, so that it does not matter which ones an earlier run had done.
            torch.manual_seed(self._plan.seed + asked[0].index // self._plan.batch)
        rows = [
            self._template.encode(cast("list[Message]", question.messages)) for question in asked
        ]
        # One that came near the end would otherwise shorten the replies of all others.
        fits = [
            self._context is None or len(row) + self._plan.max_new_tokens <= self._context
            for row in rows
        ]
        try:
            replies = iter(
                self._generate([row for row, fit in zip(rows, fits, strict=True) if fit])
            )
        except torch.OutOfMemoryError:
            raise UserError(
                "out of memory; a smaller --batch, with another --out, needs less"
            ) from None
        return [next(replies) if fit else None for fit in fits]

    def _load(self) -> None:
        from medusa_chat.decoding.engine import eos_ids
        from medusa_chat.machine.devices import choose_device
        from medusa_chat.model.loading import load_pretrained
        from medusa_chat.model.templates import named_template, resolve_template

        if self._spec.template:
            named_template(self._spec.template)  # a slip is told before the model is loaded
        device = choose_device(self._device)
        if not self._ignore_memory:
            check_answers(self._spec, str(device), self._plan.batch, self._plan.max_new_tokens)
        backbone, self._tokenizer = load_pretrained(self._spec, None)
        self._template = resolve_template(self._tokenizer, self._spec)
        config = backbone.config.get_text_config()
        self._context: int | None = getattr(config, "max_position_embeddings", None)
        if self._context is not None and self._context <= self._plan.max_new_tokens:
            raise UserError(
                f"--max-new-tokens must be below the {self._context} of the context of {self.name}"
            )
        self._ends = sorted(eos_ids(backbone, self._tokenizer) | self._template.stop_ids)
        self._backbone = backbone.to(device).eval()

    def _generate(self, rows: list[list[int]]) -> list[Reply]:
        import torch

        if not rows:
            return []
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        # The model's own distribution: nothing of what its generation config would cut off or weigh otherwise.
        sampling: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}
        if self._plan.temperature >= COLD:
            sampling |= {
                "do_sample": True,
                "temperature": self._plan.temperature,
                "top_k": 0,
                "top_p": 1.0,
            }
        with torch.inference_mode():
            output = self._backbone.generate(
                input_ids=ids.to(self._backbone.device),
                attention_mask=mask.to(self._backbone.device),
                max_new_tokens=self._plan.max_new_tokens,
                eos_token_id=self._ends or None,
                pad_token_id=0,
                **sampling,
            )
        return [self._read(row) for row in output[:, width:].tolist()]

    def _read(self, ids: list[int]) -> Reply:
        """The reply in the ids up to the first that ends one; without such it was cut."""
        stop = next((i for i, token in enumerate(ids) if token in self._ends), None)
        return Reply(self._tokenizer.decode(ids[:stop], skip_special_tokens=True), stop is None)
