"""The one line that reports a mistake, from a call or from the command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from medusa_chat.cli import main
from medusa_chat.config import UserError

if TYPE_CHECKING:
    from collections.abc import Callable


def refusal(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """Return the line of the UserError that a call raises."""
    with pytest.raises(UserError) as raised:
        call(*arguments, **named)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def complaint(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """Return the line on standard error of a command that fails and prints nothing else."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("medusa-chat: error: ")
    assert printed.err.count("\n") == 1
    return printed.err
