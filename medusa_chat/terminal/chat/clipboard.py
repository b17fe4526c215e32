"""Text for the clipboard: by the system's tool, by the terminal (OSC 52), or else in a file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from base64 import b64encode

from platformdirs import user_state_path

from medusa_chat.config import UserError
from medusa_chat.files import write_text
from medusa_chat.text import sanitize

# Each with the variable that tells that its screen is there; a tool without one needs none.
TOOLS = (
    ("WAYLAND_DISPLAY", ("wl-copy",)),
    ("DISPLAY", ("xclip", "-selection", "clipboard")),
    ("DISPLAY", ("xsel", "--clipboard", "--input")),
    ("", ("pbcopy",)),
    ("", ("clip.exe",)),
)
PATIENCE = 5  # seconds for a tool
LONGEST_SEQUENCE = 74_994  # bytes of base64 that terminals take at least
NO_SEQUENCES = ("", "dumb", "linux")  # terminals without a clipboard


def copy(text: str) -> str:
    """Put text on the clipboard; say where it went. Raises UserError if it could go nowhere."""
    safe = sanitize(text, tab="\t")
    size = f"{len(safe)} characters"
    tool = None if os.environ.get("SSH_TTY") else _by_tool(safe)
    if tool:
        return f"copied {size} ({tool})"
    if _by_terminal(safe):
        return f"copied {size} by the terminal, if it allows that (OSC 52)"
    return f"no clipboard here: {size} are in {_to_file(safe)}"


def _by_tool(text: str) -> str | None:
    """Give text to the first tool that takes it; return its name."""
    for variable, command in TOOLS:
        present = shutil.which(command[0]) and (not variable or os.environ.get(variable))
        if present and _run(command, text):
            return command[0]
    return None


def _run(command: tuple[str, ...], text: str) -> bool:
    quiet = subprocess.DEVNULL  # a tool that stays in the background would keep a pipe open
    try:
        ended = subprocess.run(
            command, input=text.encode(), timeout=PATIENCE, stdout=quiet, stderr=quiet, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return ended.returncode == 0


def _by_terminal(text: str) -> bool:
    encoded = b64encode(text.encode()).decode()
    if os.environ.get("TERM", "") in NO_SEQUENCES or len(encoded) > LONGEST_SEQUENCE:
        return False
    sys.stdout.write(f"\x1b]52;c;{encoded}\x07")
    sys.stdout.flush()
    return True


def _to_file(text: str) -> str:
    path = user_state_path("medusa-chat") / "copied.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text, private=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    return str(path)
