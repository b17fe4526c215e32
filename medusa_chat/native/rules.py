"""NativeRules: a step's decision in C, where it is certain that torch's rules decide the same."""

from __future__ import annotations

from ctypes import addressof, byref, c_int32
from typing import TYPE_CHECKING, Protocol

import torch

from medusa_chat.native.library import load
from medusa_chat.native.structures import MOST_ROWS, Rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

KINDS = {"greedy": 0, "exact": 1, "exact-truncated": 1, "typical": 2}
REAL = ("top_p", "min_p", "epsilon", "delta", "temperature")
PENALTIES = ("repetition", "presence", "frequency")


class Numbers(Protocol):
    """The numbers of a sampling, as floats; decoding.numbers has the real ones."""

    def _asdict(self) -> dict[str, float]:
        """The numbers by name."""


class NativeRules:
    """Decides steps over a vocabulary of one size. Not for two threads at once."""

    def __init__(self, token_keys: Tensor) -> None:
        """Take the keys of the tokens in the noise, int32 [V]."""
        self._decide = load().mc_decide
        self._keys = token_keys  # the library reads them
        self._scores = torch.zeros(len(token_keys))
        self._tokens = (c_int32 * MOST_ROWS)()
        self._parents = (c_int32 * MOST_ROWS)()
        self._rule = Rule()
        self._rule.tokens = addressof(self._tokens)
        self._rule.parents = addressof(self._parents)
        self._rule.vocabulary = len(token_keys)
        self._rule.token_keys = token_keys.data_ptr()
        self._rule.scores = self._scores.data_ptr()
        self._numbers: Numbers | None = None

    def decide(
        self,
        kind: str,
        numbers: Numbers,
        counts: Tensor | None,
        logits: Tensor,
        tokens: Sequence[int],
        parents: Sequence[int],
        position: int,
    ) -> tuple[int, int] | None:
        """Decide a step.

        Args:
            kind: of the rule.
            numbers: of the sampling.
            counts: float32 [2, V], of the text's tokens; None without penalties.
            logits: float32 [n, V], of the backbone at each node.
            tokens: [n], of each node.
            parents: [n], the row of each node's parent.
            position: of the root in the text.

        Returns:
            The deepest accepted row and the token behind it. None if a difference in the last
            places could change them, or for a kind that is torch's alone: typical acceptance of a
            truncated distribution, whose entropy depends on what exactly is cut off.
        """
        if kind not in KINDS:
            return None
        rule, count = self._rule, len(tokens)
        if numbers is not self._numbers:
            self._take(numbers)
        self._tokens[:count] = list(tokens)
        self._parents[:count] = list(parents)
        rule.kind, rule.rows, rule.position = KINDS[kind], count, position
        rule.logits = logits.data_ptr()
        rule.counts = None if counts is None else counts.data_ptr()
        if self._decide(byref(rule)) != 1:
            return None
        return rule.row, rule.next

    def _take(self, numbers: Numbers) -> None:
        values = numbers._asdict()
        for name in REAL:
            setattr(self._rule, name, values[name])
        for name in PENALTIES:
            setattr(self._rule, name, values[f"{name}_penalty"])
        # More tokens than there are leave all of them.
        self._rule.top_k = min(int(values["top_k"]), self._rule.vocabulary)
        self._rule.seed = int(values["seed"])
        self._numbers = numbers
