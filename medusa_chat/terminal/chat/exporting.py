"""A conversation as a document: Markdown, HTML, SVG or JSON."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.text import Text

from medusa_chat.config import UserError
from medusa_chat.files import resolved, write_text
from medusa_chat.terminal.chat.conversation import write_conversation
from medusa_chat.terminal.chat.showing import conversation_rows, settings_line
from medusa_chat.terminal.output import SafeConsole
from medusa_chat.terminal.theme import LABEL, STRONG
from medusa_chat.terminal.thoughts import answer_of
from medusa_chat.text import encodable, one_line

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from medusa_chat.terminal.chat.command import Chat
    from medusa_chat.terminal.chat.conversation import Conversation

COLUMNS = 100
MARK = "<!-- exported by medusa-chat -->\n"  # ends an export, which another one may replace
MOST_BYTES = 1 << 30


def export(chat: Chat, path: Path, title: str) -> None:
    """Write the conversation in the format that the file's suffix names.

    Raises:
        UserError: there is no such format, the file holds something else than an export, or it
            cannot be written.
    """
    conversation = chat.session.record()
    suffix = path.suffix.lower()
    if not conversation.messages:
        raise UserError("there is nothing to export yet")
    if suffix == ".json":
        write_conversation(path, conversation)
        return
    if suffix not in FORMATS:
        raise UserError(f"{path.name} must end in .md, .html, .svg or .json")
    document = FORMATS[suffix](chat, conversation, one_line(title))
    try:
        if path.exists() and not _is_export(path):
            raise UserError(f"{path} is no export of medusa-chat; choose another name")
        write_text(resolved(path), encodable(document.rstrip("\n") + "\n" + MARK), private=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def _is_export(path: Path) -> bool:
    if not path.is_file():  # a pipe may never bring a byte
        return False
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - len(MARK), 0))
        return file.read(len(MARK)) == MARK.encode()


def _markdown(_chat: Chat, conversation: Conversation, title: str) -> str:
    parts = [f"# {title}", f"{conversation.model} · {settings_line(conversation)}"]
    if conversation.system:
        parts.append(f"System prompt: {conversation.system}")
    for message in conversation.messages:
        name = "You" if message["role"] == "user" else conversation.model
        parts += [f"## {name}", answer_of(message["content"]).strip("\n")]
    return "\n\n".join(parts) + "\n"


def _html(chat: Chat, conversation: Conversation, title: str) -> str:
    return _recorded(chat, conversation, title).export_html(inline_styles=True)


def _svg(chat: Chat, conversation: Conversation, title: str) -> str:
    return _recorded(chat, conversation, title).export_svg(title=title)


FORMATS: dict[str, Callable[[Chat, Conversation, str], str]] = {
    ".md": _markdown,
    ".html": _html,
    ".svg": _svg,
}


def _recorded(chat: Chat, conversation: Conversation, title: str) -> SafeConsole:
    """Print the conversation, with the colours of its heads, on a console that records it."""
    console = SafeConsole(
        record=True,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        no_color=False,
        width=COLUMNS,
        highlight=False,
    )
    console.print(Text(title, STRONG))
    console.print(Text(f"{conversation.model} · {settings_line(conversation)}", LABEL))
    console.print(chat.legend())
    console.print()
    for row in conversation_rows(conversation, chat.view, COLUMNS, marks=chat.marks):
        console.print(row)
    return console
