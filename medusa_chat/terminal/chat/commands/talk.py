"""Slash-commands on the conversation: take back, renew, go on, copy, keep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from medusa_chat.config import UserError
from medusa_chat.files import expanded
from medusa_chat.terminal.chat.attachments import read_file, reference
from medusa_chat.terminal.chat.clipboard import copy
from medusa_chat.terminal.chat.command import Chat, Draft, Result, Stream, in_group
from medusa_chat.terminal.chat.conversation import read_conversation
from medusa_chat.terminal.chat.errors import UsageError
from medusa_chat.terminal.rendering import code_blocks
from medusa_chat.terminal.theme import LABEL
from medusa_chat.terminal.thoughts import answer_of
from medusa_chat.terminal.wrapping import escape_controls

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from medusa_chat.terminal.chat.session import Session

command = in_group("Talk")
GREEDY_REPEATS = "greedy decoding repeats itself: /typical or /exact draws another reply"
TAIL = 60  # characters of a reply that /continue repeats
GLIMPSE = 70  # characters of a reply that /replies shows


@command("system", "[TEXT]")
def _system(chat: Chat, argument: str) -> Result:
    """Show or set the system prompt; "" removes it."""
    if argument:
        chat.session.system = "" if argument in ('""', "''") else argument
    shown = chat.session.system or "none"
    return Text.assemble(("system prompt: ", LABEL), escape_controls(shown))


@command("reset", destroys=True)
def _reset(chat: Chat) -> Result:
    """Start a new conversation; keep settings and system prompt."""
    chat.session.reset()
    return Text("new conversation", LABEL)


@command("undo", destroys=True)
def _undo(chat: Chat) -> Result:
    """Take back the last message and its reply."""
    first, *more = chat.session.undo().strip().splitlines() or [""]
    return Text.assemble(("took back: ", LABEL), escape_controls(first), " …" if more else "")


@command("edit")
def _edit(chat: Chat) -> Result:
    """Change your last message and have it answered anew."""
    return Draft(chat.session.last_message())


@command("regen")
def _regen(chat: Chat) -> Result:
    """Answer the last message again, with the next seed; /replies brings the earlier one back."""
    steps = chat.session.regen()
    sampling = chat.session.sampling
    return Stream(steps, GREEDY_REPEATS if sampling.greedy else f"seed {sampling.seed}")


def _reply_numbers(session: Session | None, words: list[str]) -> Iterable[str]:
    count = len(session.answers) if session and not words else 0
    return [str(number) for number in range(1, count + 1)]


@command("replies", "[N]", values=_reply_numbers)
def _replies(chat: Chat, argument: str) -> Result:
    """List the replies to your last message, or choose one to go on with."""
    session = chat.session
    if argument:
        session.choose(_number(argument))
    elif not session.answers:
        raise UserError("there is no reply to choose from yet")
    rows = []
    for number, answer in enumerate(session.answers, 1):
        mark = "▸" if answer is session.answer else " "
        rows.append(Text.assemble((f"{mark} {number}  ", LABEL), _glimpse(answer_of(answer.text))))
    return Group(*rows)


def _glimpse(text: str) -> str:
    words = escape_controls(" ".join(text.split()))
    return words if len(words) <= GLIMPSE else words[:GLIMPSE] + "…"


@command("continue")
def _continue(chat: Chat) -> Result:
    """Go on with a reply that Ctrl+C, the length limit or the loop guard cut."""
    steps = chat.session.go_on()
    assert chat.session.answer
    tail = escape_controls(" ".join(chat.session.answer.text.split())[-TAIL:])
    return Stream(steps, f"… {tail}")


def _copy_values(_session: Session | None, words: list[str]) -> Iterable[str]:
    return () if words else ("code",)


@command("copy", "[code|N]", values=_copy_values)
def _copy(chat: Chat, argument: str) -> Result:
    """Copy the last reply, its last block of code, or its Nth block of code."""
    reply = chat.session.last_reply()
    if not argument:
        return Text(copy(reply), LABEL)
    blocks = code_blocks(reply)
    number = len(blocks) if argument == "code" else _number(argument)
    if not blocks:
        raise UserError("the last reply has no block of code; /copy copies all of it")
    if not 1 <= number <= len(blocks):
        raise UserError(f"the last reply has {len(blocks)} blocks of code; choose 1 to that many")
    return Text(copy(blocks[number - 1]), LABEL)


def _number(argument: str) -> int:
    if not (argument.isascii() and argument.isdecimal() and len(argument) < 10):
        raise UsageError
    return int(argument)


@command("save", "FILE", takes_path=True)
def _save(chat: Chat, argument: str) -> Result:
    """Save the conversation to a file."""
    path = _path(argument)
    chat.session.save(path)
    return Text(f"saved {len(chat.session.messages)} messages to {path}", LABEL)


@command("load", "FILE", takes_path=True, destroys=True)
def _load(chat: Chat, argument: str) -> Result:
    """Continue a saved conversation."""
    conversation = read_conversation(_path(argument))
    chat.session.load(conversation)
    text = f"loaded {len(conversation.messages)} messages"
    name = chat.session.engine.name
    if conversation.model != name:
        text += f"; they were saved with {conversation.model}, you now chat with {name}"
    return Text(text, LABEL)


@command("file", "FILE", takes_path=True)
def _file(chat: Chat, argument: str) -> Result:
    """Put a file into your next message; there, @FILE does it too."""
    path = _path(argument)
    content = read_file(path, chat.session.engine)
    note = f"{path} · {chat.session.engine.count(content):,} tokens"
    return Draft(f"{reference(path)} ", replaces=False, note=note)


def _path(argument: str) -> Path:
    if not argument:
        raise UsageError
    if "\0" in argument:
        raise UserError("no file has a name with a zero byte")
    return expanded(argument)


@command("exit")
def _exit(_chat: Chat) -> Result:
    """Leave; Ctrl+D does too."""
    raise EOFError  # as Ctrl+D does
