"""Choices: a draft's nodes as the native step chooses them, and which it has chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medusa_chat.decoding.draft.dynamic import DynamicDraft
from medusa_chat.decoding.draft.fixed import FixedDraft
from medusa_chat.native.rows import ChosenRows, Line, Noise

if TYPE_CHECKING:
    from medusa_chat.decoding.draft.base import Draft
    from medusa_chat.decoding.report import StepInput
    from medusa_chat.decoding.trees.tree import NodePath


class Choices:
    """The nodes of a draft, chosen by the library."""

    def __init__(self, draft: Draft) -> None:
        """Describe what a draft chooses from."""
        lines = [Line(*line) for line in draft.ranker.lines]
        if isinstance(draft, FixedDraft):
            superset, self._copied = draft.tree, False
            measured: list[float] | None = [0.0] * len(draft.tree)  # all nodes are taken
        else:
            assert isinstance(draft, DynamicDraft)
            superset, self._copied = draft.superset, draft.copied
            measured = None if draft.measured is None else draft.measured.tolist()
        self._coupled = draft.ranked > 0 and draft.ranker.coupling != "none"
        self._paths = draft.layout.paths
        self._rows = ChosenRows(
            superset.parents,
            [path[-1] if path else 0 for path in superset.paths],
            draft.size,
            draft.ranked,
            lines=lines,
            measured=measured,
        )

    def rows_for(self, given: StepInput) -> ChosenRows:
        """Return the rows, with what is new at a step."""
        noise = _noise_of(given) if self._coupled else None
        if self._copied and given.copied is not None:
            self._rows.set(given.copied.tokens, given.copied.log_p, noise)
        else:
            self._rows.set(noise=noise)
        return self._rows

    @property
    def paths(self) -> tuple[NodePath, ...]:
        """The chosen nodes' paths."""
        return self._paths([self._rows.joint, *self._rows.rows])


def _noise_of(given: StepInput) -> Noise:
    numbers = given.numbers
    return Noise(
        int(numbers.seed),
        given.position,
        float(numbers.temperature),
        int(numbers.top_k),
        float(numbers.top_p),
        float(numbers.min_p),
    )
