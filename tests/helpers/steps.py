"""Surround every step of every runner, to watch it, to time it or to change its report."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from medusa_chat.decoding.runner import Runner

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from medusa_chat.decoding.report import StepReport
    from medusa_chat.decoding.trees.tree import AnyTree


def surround_steps(
    monkeypatch: pytest.MonkeyPatch,
    around: Callable[[Runner, AnyTree, Callable[[], StepReport]], StepReport],
) -> None:
    """Let `around` end each launched step.

    Args:
        monkeypatch: takes the change back after the test.
        around: is given the runner, the tree, and the function that ends the step.
    """
    launch = Runner.launch

    def surrounded(
        self: Runner, root: int, tree: AnyTree, *others: Any
    ) -> Callable[[], StepReport]:
        return partial(around, self, tree, launch(self, root, tree, *others))

    monkeypatch.setattr(Runner, "launch", surrounded)
