"""Training text: read documents, mark the assistant's tokens, pack rows without attention across documents."""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from medusa_chat.config import Message, UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from medusa_chat.model.templates import ChatTemplate

_MARK = "\ufdd0"  # a code point that no text holds
IGNORED = -100  # the label that carries no loss, as torch's cross entropy has it
# "gpt" and "human" are ShareGPT's own; the others are what the collections made from it hold as well.
_ROLES = {
    "human": "user",
    "user": "user",
    "system": "system",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class Document:
    """A conversation, or plain text.

    Attributes:
        place: file and line, for complaints.
        cut: the last reply was cut off, so that it does not teach where a reply ends.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    place: str = ""
    cut: bool = False


@dataclass(frozen=True)
class Example:
    """A document as ids; trained[i] says whether token i is a target."""

    ids: list[int]
    trained: list[bool]
    place: str = ""


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of a file.

    JSONL holds a `{"messages": [...]}`, ShareGPT's `{"conversations": [...]}` or a `{"text": ...}` a line, JSON a list
    of such; any other file is one plain text.

    Raises:
        UserError: the file cannot be read, or a line (or item), which it names, is damaged.
    """
    try:
        if path.suffix == ".jsonl":
            items = _json_lines(path)
        elif path.suffix == ".json":
            items = iter(
                [(f"{path}, item {i}", item) for i, item in enumerate(json.loads(_text(path)), 1)]
            )
        else:
            items = iter([(str(path), {"text": _text(path)})])
        for place, item in items:
            if document := _document(item, place):
                yield document
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    except (OSError, UnicodeDecodeError, TypeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield f"{path}, line {number}", json.loads(line.decode("utf-8"))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error.msg})") from None
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None


def _document(item: Any, place: str) -> Document | None:
    """None for a conversation without an answer: ShareGPT's collections hold such."""
    if isinstance(item, dict) and isinstance(item.get("text"), str):
        return Document(text=item["text"], place=place) if item["text"].strip() else None
    turns = item.get("messages", item.get("conversations")) if isinstance(item, dict) else None
    if not isinstance(turns, list):
        raise UserError(f"{place}: no 'messages', no ShareGPT 'conversations' and no 'text'")
    messages = [_message(turn, place) for turn in turns]
    while (
        messages and messages[0]["role"] == "assistant"
    ):  # it answers nothing, and templates refuse it
        messages.pop(0)
    if not any(message["role"] == "assistant" for message in messages):
        return None
    return Document(tuple(messages), place=place, cut=turns[-1].get("cut") is True)


def _message(turn: Any, place: str) -> Message:
    role = _ROLES.get(str(turn.get("role", turn.get("from")))) if isinstance(turn, dict) else None
    content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
    if role is None or not isinstance(content, str):
        raise UserError(f"{place}: a turn needs a known role and text content")
    return {"role": role, "content": content}


def encode(
    template: ChatTemplate, document: Document, everything: bool = False
) -> Iterator[Example]:
    """Tokenize a document; a conversation as the model is talked to, its assistant's tokens as targets.

    Most conversations make one example. Where the template rewrites earlier turns (it drops what a model thought),
    each reply is an example of its own, because a model sees it like that.

    Args:
        everything: train on all tokens, not only on the assistant's (for a backbone made from scratch).

    Raises:
        UserError: the template refuses the conversation.
    """
    tokenizer = template.tokenizer
    if document.text:
        ids = tokenizer(document.text)["input_ids"]
        ids = ids if tokenizer.eos_token_id in (None, *ids[-1:]) else [*ids, tokenizer.eos_token_id]
        yield Example(ids, [True] * len(ids), document.place)
        return
    messages = list(document.messages)
    try:
        renderings = _renderings(template, messages)
    except UserError as error:
        raise UserError(f"{document.place}: {error}") from None
    for text, spans in renderings:
        if document.cut and text is renderings[-1][0]:
            text = _without_end(template, messages)
        encoded = template.tokens(text, return_offsets_mapping=True)
        wanted = [(0, len(text))] if everything else spans
        offsets = encoded["offset_mapping"]
        trained = [any(a <= start < stop <= b for a, b in wanted) for start, stop in offsets]
        yield Example(encoded["input_ids"], trained, document.place)


def _renderings(
    template: ChatTemplate, messages: list[Message]
) -> list[tuple[str, list[tuple[int, int]]]]:
    """Texts, each with the character spans of the assistant's turns in it, end markers included."""
    whole = template.text(messages)
    replies = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = (
                template.text(messages[:i], replying=True),
                template.text(messages[: i + 1]),
            )
            differing = (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
            start = len(before) if after.startswith(before) else next(differing, len(after))
            replies.append((after, (start, template.reply_end(after, start, message["content"]))))
    if all(whole.startswith(after) for after, _ in replies):
        return [(whole, [span for _, span in replies])]
    return [(after, [span]) for after, span in replies]


def _without_end(template: ChatTemplate, messages: list[Message]) -> str:
    """The conversation up to where its last reply was cut off: templates may rewrite a reply, but keep a mark in it."""
    *before, last = messages
    marked: Message = {"role": last["role"], "content": last["content"].rstrip() + _MARK}
    return template.text([*before, marked]).partition(_MARK)[0]


class PackedRows(Dataset):
    """Rows of `length` tokens cut from a stream of examples.

    Position ids start again with every document, which is how transformers' masks keep documents apart in
    a packed row. A document that does not fit continues in the next row as a document of its own. The last
    row is filled up with a document without targets.
    """

    def __init__(self, examples: Iterable[Example], length: int) -> None:
        ids, trained, positions, starts = array("i"), array("b"), array("i"), array("q")
        self.length = length
        self._places: list[str] = []

        def add(example: Example) -> None:
            starts.append(len(ids))
            self._places.append(example.place)
            pieces = _pieces(len(example.ids), length - len(ids) % length, length)
            ids.extend(example.ids)
            trained.extend(example.trained)
            for piece in pieces:
                positions.extend(range(piece))

        for example in examples:
            add(example)
        if not any(trained):
            raise UserError(
                "the data hold nothing to learn from: no reply of an assistant and no text"
            )
        if rest := -len(ids) % length:
            add(Example([0] * rest, [False] * rest))
        self._starts = torch.frombuffer(starts, dtype=torch.int64)
        self.ids = torch.frombuffer(ids, dtype=torch.int32).view(-1, length)
        self.trained = torch.frombuffer(trained, dtype=torch.int8).view(-1, length).bool()
        self.positions = torch.frombuffer(positions, dtype=torch.int32).view(-1, length)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """`input_ids`, `position_ids`, `labels`: [length] each; `rows`: the row's own number."""
        ids = self.ids[row].long()
        positions = self.positions[row].long()
        # The first token of a document is predicted from nothing that belongs to it.
        target = self.trained[row] & (positions > 0)
        labels = ids.masked_fill(~target, IGNORED)
        return {
            "input_ids": ids,
            "position_ids": positions,
            "labels": labels,
            "rows": torch.tensor(row),
        }

    def place(self, row: int) -> str:
        """Where the documents of a row come from."""
        ends = torch.tensor([row * self.length, (row + 1) * self.length - 1])
        first, last = (torch.searchsorted(self._starts, ends, right=True) - 1).tolist()
        places = [place for place in self._places[first : last + 1] if place]
        return places[0] if len(set(places)) == 1 else f"{places[0]} to {places[-1]}"


def _pieces(size: int, room: int, length: int) -> list[int]:
    """How a document of `size` tokens falls on rows of which the first has `room` left."""
    whole, rest = divmod(max(size - room, 0), length)
    return [min(size, room), *[length] * whole, rest]
