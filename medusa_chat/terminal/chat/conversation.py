"""The file of a saved conversation, written whole and checked when it is read."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from medusa_chat.config import Message, UserError
from medusa_chat.files import read_json, resolved, write_text
from medusa_chat.sampling import Sampling

if TYPE_CHECKING:
    from pathlib import Path

RETIRED = ("sample",)  # settings of earlier versions, in files that these wrote


# Who proposed a text: a head, as in Token.head, and how many characters in a row are its own.
Runs = tuple[tuple[int, int], ...]
NEEDED = {"model", "system", "sampling", "messages"}


@dataclass(frozen=True)
class Conversation:
    """A conversation as `/save` writes it and `/load` reads it.

    Attributes:
        heads: for each message who proposed its text; empty for a user's message, and where it is
            unknown.
    """

    model: str
    system: str
    sampling: Sampling
    messages: list[Message]
    heads: tuple[Runs, ...] = ()


def split(conversation: Conversation) -> tuple[Conversation, str]:
    """Split a last message that has no reply from a conversation."""
    messages = conversation.messages
    if not messages or messages[-1]["role"] != "user":
        return conversation, ""
    return replace(conversation, messages=messages[:-1]), messages[-1]["content"]


def write_conversation(path: Path, conversation: Conversation) -> None:
    """Write a conversation, whole or not at all, over nothing but a saved conversation."""
    _check_replaceable(path)
    text = json.dumps(asdict(conversation), ensure_ascii=False, indent=2) + "\n"
    encodable = text.encode(errors="replace").decode()  # a paste may hold half a surrogate pair
    try:
        write_text(resolved(path), encodable, private=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def _check_replaceable(path: Path) -> None:
    """Raise UserError for a file that is no conversation, or a name that no file can have."""
    try:
        present = path.exists()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    if not present:
        return
    try:
        read_conversation(path)
    except UserError:
        raise UserError(f"{path} is not a saved conversation; choose another name") from None


def read_conversation(path: Path) -> Conversation:
    """Read a saved conversation. Raises UserError for any other file."""
    try:
        return _parse(read_json(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except UserError as error:
        raise UserError(f"{path} is not a saved conversation: {error}") from None
    except ValueError:
        raise UserError(f"{path} is not a saved conversation: it is not JSON") from None


def _parse(document: Any) -> Conversation:
    if not isinstance(document, dict) or set(document) - {"heads"} != NEEDED:
        raise UserError("it must hold model, system, sampling and messages")
    model, system, messages = (document[key] for key in ("model", "system", "messages"))
    if not isinstance(model, str) or not isinstance(system, str):
        raise UserError("model and system must be text")
    if not isinstance(messages, list) or not all(map(is_message, messages)):
        raise UserError("a message holds a role (user or assistant) and content, both text")
    return Conversation(
        model, system, _sampling(document["sampling"]), messages, _heads(document, messages)
    )


def _heads(document: dict[str, Any], messages: list[Message]) -> tuple[Runs, ...]:
    listed = document.get("heads", [])
    if not isinstance(listed, list):
        raise UserError("heads must be a list")
    listed = [*listed, *([()] * len(messages))]
    pairs = zip(messages, listed, strict=False)
    return tuple(runs_of(runs, message["content"]) for message, runs in pairs)


def runs_of(value: Any, text: str) -> Runs:
    """Read the runs of a text from JSON; none if they are not those of this text."""
    if not isinstance(value, list) or not all(map(_is_run, value)):
        return ()
    runs = tuple((head, length) for head, length in value)
    return runs if sum(length for _, length in runs) == len(text) else ()


def _is_run(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(number) is int for number in value)
        and value[1] > 0
    )


def extend(runs: list[tuple[int, int]], head: int, length: int) -> None:
    """Append more characters of a head."""
    if runs and runs[-1][0] == head:
        length += runs.pop()[1]
    if length:
        runs.append((head, length))


def is_message(message: Any) -> bool:
    """Tell if a value is a message of a conversation."""
    return (
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and message["role"] in ("user", "assistant")
        and isinstance(message["content"], str)
    )


def _sampling(settings: Any) -> Sampling:
    defaults = asdict(Sampling())
    if not isinstance(settings, dict):
        raise UserError("sampling must be a mapping")
    settings = {name: value for name, value in settings.items() if name not in RETIRED}
    for name, value in settings.items():
        if name not in defaults:
            raise UserError(f"there is no setting {name!r}")
        if not _same_type(value, defaults[name]):
            raise UserError(f"setting {name} cannot be {value!r}")
    stop = tuple(settings.get("stop", ()))
    return Sampling(**{**settings, "stop": stop})


def readable_sampling(settings: Any) -> Sampling:
    """Read settings of another version of medusa-chat: take those that this one knows."""
    sampling = Sampling()
    for name, value in settings.items() if isinstance(settings, dict) else ():
        with suppress(UserError):
            sampling = _sampling(asdict(sampling) | {"stop": list(sampling.stop), name: value})
    return sampling


def _same_type(value: Any, default: Any) -> bool:
    """Check that a value of JSON has the type of a setting's default."""
    if isinstance(default, tuple):
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)
