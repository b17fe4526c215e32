"""See what training runs make on their way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medusa_chat.training import trainer

if TYPE_CHECKING:
    import pytest


def made_by_runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect what `make_trainee` returns in the runs from here on: trainee and packed texts."""
    made: list[Any] = []
    plain = trainer.make_trainee

    def spy(*arguments: Any, **named: Any) -> Any:
        made.append(plain(*arguments, **named))
        return made[-1]

    monkeypatch.setattr(trainer, "make_trainee", spy)
    return made
