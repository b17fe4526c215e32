"""Training text: read documents, mark the assistant's tokens, pack rows."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from medusa_chat.config import Message, UserError
from medusa_chat.records import messages_of, read_records
from medusa_chat.text import common_prefix

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from medusa_chat.model.templates import ChatTemplate

MOST_BYTES = 16 << 30  # of a file to train on
_MARK = "\ufdd0"  # a code point that no text contains
IGNORED = -100  # label without a loss, as in torch's cross entropy
Span = tuple[int, int]  # of characters: start and end


@dataclass(frozen=True)
class Document:
    """A conversation, or plain text.

    Attributes:
        place: file and line, for error messages.
        cut: the last reply was cut off, so it does not teach where a reply ends.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    place: str = ""
    cut: bool = False


@dataclass(frozen=True)
class Example:
    """A document as ids. Token i is a target if trained[i]."""

    ids: list[int]
    trained: list[bool]
    place: str = ""


def read_documents(path: Path) -> Iterator[Document]:
    """Read the documents of a file.

    An item of JSON lines or of a JSON list is `{"messages": [...]}`, ShareGPT's
    `{"conversations": [...]}`, `{"text": ...}` or a text. Any other file is one plain text.

    Raises:
        UserError: the file cannot be read, or a line or item is damaged. The message names it.
    """
    try:
        found = read_records(path, MOST_BYTES)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    items = [(str(path), found)] if isinstance(found, str) else found
    for place, item in items:
        if document := _document(item, place):
            yield document


def _document(item: Any, place: str) -> Document | None:
    """Read one item; None for a conversation without an answer, as ShareGPT has some."""
    fields = item if isinstance(item, dict) else {}
    text = item if isinstance(item, str) else fields.get("text")
    if isinstance(text, str):
        return Document(text=text, place=place) if text.strip() else None
    turns: Any = fields.get("messages", fields.get("conversations"))
    messages = messages_of(turns, place)
    # A reply to nothing comes first in some collections, and templates refuse it.
    while messages and messages[0]["role"] == "assistant":
        messages.pop(0)
    if not any(message["role"] == "assistant" for message in messages):
        return None
    cut = turns is not None and turns[-1].get("cut") is True
    return Document(tuple(messages), place=place, cut=cut)


def encode(
    template: ChatTemplate, document: Document, everything: bool = False
) -> Iterator[Example]:
    """Tokenize a document in the model's template, with the assistant's tokens as targets.

    Most conversations give one example. Some templates rewrite earlier turns, such as the model's
    thoughts. There each reply is an example of its own, as the model sees it. With `everything`
    all tokens are targets, for a backbone from scratch.

    Raises:
        UserError: the template refuses the conversation.
    """
    if document.text:
        yield _encode_text(template.tokenizer, document)
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


def _encode_text(tokenizer: Any, document: Document) -> Example:
    ids = tokenizer(document.text)["input_ids"]
    if tokenizer.eos_token_id not in (None, *ids[-1:]):
        ids = [*ids, tokenizer.eos_token_id]
    return Example(ids, [True] * len(ids), document.place)


def _renderings(template: ChatTemplate, messages: list[Message]) -> list[tuple[str, list[Span]]]:
    """Texts, each with the spans of its trained replies. A span includes the end marker."""
    whole = template.text(messages)
    replies = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = template.text(messages[:i], replying=True)
            after = template.text(messages[: i + 1])
            start = common_prefix(before, after)
            replies.append((after, (start, template.reply_end(after, start, message["content"]))))
    if all(whole.startswith(after) for after, _ in replies):
        return [(whole, [span for _, span in replies])]
    return [(after, [span]) for after, span in replies]


def _without_end(template: ChatTemplate, messages: list[Message]) -> str:
    """The text of a conversation up to the place where its last reply was cut off.

    Templates may rewrite a reply, but they keep a mark at its end.
    """
    *before, last = messages
    marked: Message = {"role": last["role"], "content": last["content"].rstrip() + _MARK}
    return template.text([*before, marked]).partition(_MARK)[0]


class PackedRows(Dataset[dict[str, torch.Tensor]]):
    """Rows of `length` tokens cut from a stream of examples.

    Position ids start again with every document. transformers' masks then keep the documents of a
    row apart. A document that does not fit continues in the next row as a document of its own.
    The last row is filled with a document without targets.
    """

    def __init__(self, examples: Iterable[Example], length: int) -> None:
        ids = array("i")
        trained = array("b")
        positions = array("i")
        starts = array("q")
        self.length = length
        self._places: list[str] = []

        def add(example: Example) -> None:
            starts.append(len(ids))
            self._places.append(example.place)
            free = length - len(ids) % length
            for piece in _pieces(len(example.ids), free, length):
                positions.extend(range(piece))
            ids.extend(example.ids)
            trained.extend(example.trained)

        for example in examples:
            add(example)
        if not any(trained):
            raise UserError(
                "the data hold nothing to learn from: no reply of an assistant and no text"
            )
        if missing := -len(ids) % length:
            add(Example([0] * missing, [False] * missing))
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
        target = self._is_target(row)
        return {
            "input_ids": ids,
            "position_ids": positions,
            "labels": ids.masked_fill(~target, IGNORED),
            "rows": torch.tensor(row),
        }

    def targets(self) -> torch.Tensor:
        """Ids of all targets, [n]."""
        return self.ids[self._is_target(slice(None))]

    def _is_target(self, rows: int | slice) -> torch.Tensor:
        """Nothing in a document predicts its first token."""
        return self.trained[rows] & (self.positions[rows] > 0)

    def place(self, row: int) -> str:
        """The files and lines of a row's documents."""
        ends = torch.tensor([row * self.length, (row + 1) * self.length - 1])
        first, last = (torch.searchsorted(self._starts, ends, right=True) - 1).tolist()
        places = [place for place in self._places[first : last + 1] if place]
        return places[0] if len(set(places)) == 1 else f"{places[0]} to {places[-1]}"


def _pieces(size: int, free: int, length: int) -> list[int]:
    """Sizes of a document's parts on rows of which the first has `free` tokens left."""
    whole, remainder = divmod(max(size - free, 0), length)
    return [min(size, free), *[length] * whole, remainder]
