"""StepInput and StepReport: the numbers that a step reads from the host and gives back.

Each crosses between host and device as one flat tensor. This module alone knows where in it a
number lies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.decoding.draft.copies import CHAIN, Copied
from medusa_chat.decoding.numbers import Numbers
from medusa_chat.events import proposer

if TYPE_CHECKING:
    from collections.abc import Callable

    from medusa_chat.decoding.acceptance import Verdict
    from medusa_chat.decoding.draft.guesses import Guesses
    from medusa_chat.decoding.trees.tree import NodePath

_ROOT = 1 + len(Numbers._fields)
_CHAIN = _ROOT + 1
INPUT_SIZE = _CHAIN + 2 * CHAIN
_VERDICT = 2  # the accepted row and the next token


@dataclass(frozen=True)
class StepInput:
    """The numbers that a step reads from the host.

    Attributes:
        root: the token that the step begins with, which the backbone chose one step earlier.
        position: of the root in the text.
        numbers: of the sampling.
        copied: the chain that competes with the heads' guesses, if there is one.
    """

    root: int
    position: int
    numbers: Numbers
    copied: Copied | None = None

    def pack(self) -> list[float]:
        """List the numbers as a PackedInput has them; without copies the list ends early."""
        values = [self.position, *map(float, self.numbers), self.root]
        if self.copied is not None:
            values += [*self.copied.tokens, *self.copied.log_p]
        return values


@dataclass(frozen=True)
class PackedInput:
    """A StepInput on the device: [INPUT_SIZE].

    float64 holds each number exactly, float32 all but the seed.
    """

    values: Tensor

    @property
    def position(self) -> Tensor:
        """Position of the root: []."""
        return self.values[0].long()

    @property
    def numbers(self) -> Numbers:
        """Numbers of the sampling: [] each."""
        return Numbers(*self.values[1:_ROOT].unbind())

    @property
    def root(self) -> Tensor:
        """Token of the root: [1]."""
        return self.values[_ROOT:_CHAIN].long()

    def chain(self, length: int) -> tuple[Tensor, Tensor]:
        """Return the copied tokens and their log p, [length] each; `length` is CHAIN or 0."""
        chain = self.values[_CHAIN : _CHAIN + 2 * length]
        return chain[:length].long(), chain[length:].float()


@dataclass(frozen=True)
class StepReport:
    """The result of a step.

    Attributes:
        paths: the path of every node, the root's first; COPIED for a guess of the copies alone.
        candidates: the token of every node.
        rows: rows of the accepted path, root first; their keys and values are committed.
        next: the token after the path, root of the next step.
        read_guesses: returns `guesses`; only before the next step. Few steps are asked for them.
    """

    paths: tuple[NodePath, ...]
    candidates: list[int]
    rows: tuple[int, ...]
    next: int
    read_guesses: Callable[[], Guesses] = field(compare=False)

    @property
    def guesses(self) -> Guesses:
        """Guesses of the heads behind the root; those of no head if none ran."""
        return self.read_guesses()

    @property
    def tokens(self) -> list[int]:
        """Tokens of the accepted path."""
        return [self.candidates[row] for row in self.rows]

    @property
    def heads(self) -> list[int]:
        """Proposers of the accepted path's tokens, as Token.head has them."""
        return [proposer(self.paths[row]) for row in self.rows]

    @property
    def depth(self) -> int:
        """Depth of the verified tree."""
        return max(map(len, self.paths))

    def tested(self, parents_kept: int) -> tuple[int, ...]:
        """List who proposed a child of the accepted path's first nodes, once for each depth.

        Args:
            parents_kept: how many of the path's nodes count.
        """
        parents = {self.paths[row] for row in self.rows[:parents_kept]}
        children = {(len(path), proposer(path)) for path in self.paths[1:] if path[:-1] in parents}
        return tuple(sorted(head for _, head in children))


def report_size(nodes: int, selection: int, guesses: int) -> int:
    """Count the numbers of a report."""
    return _VERDICT + nodes + selection + guesses


def pack_verdict(verdict: Verdict, report: Tensor) -> None:
    """Write a verdict to its place in a report."""
    report[:_VERDICT].copy_(torch.stack([verdict.row, verdict.next]))


@dataclass(frozen=True)
class ReportLayout:
    """The order of a report's numbers in one int64 tensor: verdict, candidates, selection, guesses.

    Attributes:
        nodes: candidates of the step, with those that fill a step up to its rows.
        selection: numbers that say which nodes were selected; 0 if these are always the same.
        shown: numbers that say what the heads guessed.
        paths: gives the nodes' paths for a selection.
        guesses: gives the guesses for those numbers and the root.
    """

    nodes: int
    selection: int
    shown: int
    paths: Callable[[list[int]], tuple[NodePath, ...]]
    guesses: Callable[[list[int], int], Guesses]

    @property
    def size(self) -> int:
        """Numbers in all."""
        return report_size(self.nodes, self.selection, self.shown)

    def pack_nodes(self, parts: tuple[Tensor, ...], report: Tensor) -> None:
        """Write candidates, selection and guesses to their place in `report`, int64 [size]."""
        report[_VERDICT : self.size].copy_(torch.cat(parts))

    def unpack(self, values: list[int]) -> StepReport:
        """Read a report from its numbers."""
        row, following, *rest = values
        chosen = rest[self.nodes : self.nodes + self.selection]
        guesses = rest[self.nodes + self.selection :]
        paths = self.paths(chosen)
        accepted = paths[row]
        return StepReport(
            paths,
            rest[: len(paths)],
            tuple(paths.index(accepted[:depth]) for depth in range(len(accepted) + 1)),
            following,
            partial(self.guesses, guesses, rest[0]),
        )
