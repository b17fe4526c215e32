"""Training text: read conversations, mark the assistant's tokens, pack rows without attention across documents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from medusa_chat.config import Message, UserError

IGNORED = -100  # the label that carries no loss, as torch's cross entropy has it
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Example:
    """One conversation as ids; trained[i] says whether token i is a target."""

    ids: list[int]
    trained: list[bool]


def read_conversations(path: Path) -> Iterator[list[Message]]:
    """Conversations of a JSONL file of `{"messages": [...]}` lines or a ShareGPT JSON list.

    Raises UserError with the file and line (or item) of what is damaged.
    """
    try:
        if path.suffix == ".json":
            items = [(f"item {i}", item) for i, item in enumerate(json.loads(path.read_text(encoding="utf-8")), 1)]
        else:
            items = _json_lines(path)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    for place, item in items:
        yield _conversation(item, f"{path}, {place}")


def _json_lines(path: Path) -> list[tuple[str, Any]]:
    items = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                items.append((f"line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error.msg})") from None
    return items


def _conversation(item: Any, place: str) -> list[Message]:
    turns = item.get("messages", item.get("conversations")) if isinstance(item, dict) else None
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{place}: no list 'messages' (or ShareGPT 'conversations')")
    messages: list[Message] = []
    for turn in turns:
        role = _ROLES.get(str(turn.get("role", turn.get("from")))) if isinstance(turn, dict) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if role is None or not isinstance(content, str):
            raise UserError(f"{place}: a turn needs a known role and text content")
        messages.append({"role": role, "content": content})
    return messages


def encode(tokenizer: Any, messages: list[Message], everything: bool = False) -> Example:
    """Tokenize a conversation with the model's own chat template.

    Args:
        everything: train on all tokens, not only on the assistant's (for a backbone made from scratch).
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [(0, len(text))] if everything else _assistant_spans(tokenizer, messages)
    trained = [
        any(start < stop and start >= a and stop <= b for a, b in spans) for start, stop in encoded["offset_mapping"]
    ]
    return Example(encoded["input_ids"], trained)


def _assistant_spans(tokenizer: Any, messages: list[Message]) -> list[tuple[int, int]]:
    """Character spans of the assistant's turns, end marker included, found by rendering prefixes."""
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
            spans.append((len(before), len(after)))
    return spans


class PackedRows(Dataset):
    """Rows of `length` tokens cut from a stream of examples.

    Position ids start again with every document, which is how transformers' masks keep documents apart in
    a packed row. A document that does not fit continues in the next row as a document of its own.
    """

    def __init__(self, examples: Iterable[Example], length: int) -> None:
        ids: list[int] = []
        trained: list[bool] = []
        positions: list[int] = []
        for example in examples:
            room = length - len(ids) % length
            ids += example.ids
            trained += example.trained
            pieces = _pieces(len(example.ids), room, length)
            positions += [i for piece in pieces for i in range(piece)]
        rows = len(ids) // length
        if rows == 0:
            raise UserError(f"the data hold {len(ids)} tokens, fewer than one row of {length}")
        stop = rows * length
        self.ids = torch.tensor(ids[:stop], dtype=torch.int32).view(rows, length)
        self.trained = torch.tensor(trained[:stop]).view(rows, length)
        self.positions = torch.tensor(positions[:stop], dtype=torch.int32).view(rows, length)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        ids = self.ids[row].long()
        positions = self.positions[row].long()
        # The first token of a document is predicted from nothing that belongs to it.
        target = self.trained[row] & (positions > 0)
        return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(~target, IGNORED)}


def _pieces(size: int, room: int, length: int) -> list[int]:
    """How a document of `size` tokens falls on rows of which the first has `room` left."""
    pieces = [min(size, room)]
    while (rest := size - sum(pieces)) > 0:
        pieces.append(min(rest, length))
    return pieces
