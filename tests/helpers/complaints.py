"""What a user is told of a mistake: one line, from a call or from the command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from medusa_chat.cli import main
from medusa_chat.config import UserError

if TYPE_CHECKING:
    from collections.abc import Callable


def refusal(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """The line of the UserError that a call has to end in."""
    with pytest.raises(UserError) as raised:
        call(*arguments, **named)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def complaint(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """The line on standard error of a command that has to fail, with nothing on standard output."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("medusa-chat: error: ")
    assert told.err.count("\n") == 1
    return told.err
