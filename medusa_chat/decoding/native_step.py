"""NativeStep as a StepProgram: heads, forward and acceptance in one call of the library."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch

from medusa_chat.decoding.acceptance import TreeTensors
from medusa_chat.decoding.draft.base import RANKED
from medusa_chat.decoding.draft.fixed import FixedDraft
from medusa_chat.decoding.draft.guesses import Guesses, ScoredGuesses
from medusa_chat.decoding.draft.ranking import Noise
from medusa_chat.decoding.native_choice import Choices
from medusa_chat.decoding.noise import token_keys
from medusa_chat.decoding.report import StepInput, StepReport
from medusa_chat.model.heads import MedusaHeads
from medusa_chat.model.native_weights import plain_format
from medusa_chat.native.model import NativeHeads
from medusa_chat.native.rows import FixedRows
from medusa_chat.native.rules import NativeRules
from medusa_chat.native.step import NativeStep

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from medusa_chat.decoding.acceptance import Rule
    from medusa_chat.decoding.draft.base import Draft
    from medusa_chat.decoding.state import State
    from medusa_chat.native.packed import Packed
    from medusa_chat.native.rows import ChosenRows
    from medusa_chat.native.step import Settled


class NativeProgram:
    """Implements state.StepProgram with the library's step.

    Attributes:
        observe: called after each step with the seconds of its parts, by name: heads, forward,
            acceptance, commit. bench times them by it.
    """

    shared_buffers = False
    overlaps = False
    device_seconds = 0.0

    def __init__(self, state: State, packed: Packed) -> None:
        """Run steps over a state's text; its last hidden state becomes the one of the library."""
        self.observe: Callable[[dict[str, float]], None] | None = None
        self._parts: dict[str, float] = {}
        self._state = state
        self._step = NativeStep(packed.model, _heads_of(state, packed), packed.team, state.cache)
        state.hidden = self._step.last
        self._rules = NativeRules(token_keys(state.backbone.vocabulary, state.backbone.device))
        self._rows: WeakKeyDictionary[FixedDraft, FixedRows] = WeakKeyDictionary()
        self._choices: WeakKeyDictionary[Draft, Choices] = WeakKeyDictionary()

    def prefill(self, tokens: list[int], rule: Rule) -> int:
        """Append tokens to the text and commit them; returns the token that follows."""
        return rule.first(self._step.prefill(tokens), self._state.cache.length - 1)

    def launch(self, draft: Draft, given: StepInput, rule: Rule) -> Callable[[], StepReport]:
        """Return a function that takes the step."""
        return partial(self.step, draft, given, rule)

    def step(self, draft: Draft, given: StepInput, rule: Rule) -> StepReport:
        """Verify a draft's nodes in one forward, and commit the accepted path."""
        if isinstance(draft, FixedDraft) and not draft.needs_log_p:
            report = self._fixed(draft, given, rule)
        else:
            report = self._chosen(draft, given, rule)
        started = time.perf_counter()
        self._step.keep(report.rows)
        self._parts["commit"] = time.perf_counter() - started
        if self.observe:
            self.observe(self._parts)
        return report

    def _fixed(self, draft: FixedDraft, given: StepInput, rule: Rule) -> StepReport:
        """Run a fixed tree: its heads and its rows in one call."""
        if draft not in self._rows:
            places = draft.filling.places.tolist()
            self._rows[draft] = FixedRows(draft.tree.parents, places, draft.ranked)
        settled = self._step.fixed(given.root, self._rows[draft], rule.plain_greedy)
        self._parts = {"heads": settled.heads_seconds, "forward": settled.rows_seconds}
        row, following = self._verdict(settled, draft.tree.parents, given, rule)
        tree = draft.tree
        guesses = partial(self._guesses_as_told, draft, settled)
        return StepReport(tree.paths, settled.tokens, tree.branches[row], following, guesses)

    def _chosen(self, draft: Draft, given: StepInput, rule: Rule) -> StepReport:
        """Run the heads, choose nodes among their guesses and the copies, and run those."""
        if draft not in self._choices:
            self._choices[draft] = Choices(draft)
        choices = self._choices[draft]
        rows = choices.rows_for(given)
        settled = self._step.choose(given.root, rows, rule.plain_greedy)
        self._parts = {"heads": settled.heads_seconds, "forward": settled.rows_seconds}
        parents = rows.parents
        row, following = self._verdict(settled, parents, given, rule)
        guesses = partial(self._guesses, draft, settled, rows, given)
        return StepReport(choices.paths, settled.tokens, _branch(row, parents), following, guesses)

    def _guesses(
        self, draft: Draft, settled: Settled, rows: ChosenRows, given: StepInput
    ) -> Guesses:
        """Report the guesses that rows were chosen from, with what orders them."""
        ranker = draft.ranker
        if not draft.needs_log_p or not ranker.reorders:
            return self._guesses_as_told(draft, settled)
        scores = self._step.log_p(draft.ranked).copy()
        if ranker.coupling != "none":
            values = torch.frombuffer(rows.noise, dtype=torch.float32)[: scores.size]
            noise = Noise(values.view(scores.shape), given.numbers)
            scores = ranker.host_scores(torch.from_numpy(scores), noise).numpy()
        bias = None if ranker.bias is None else ranker.bias.host
        tokens = np.array(settled.guesses, dtype=np.int32).reshape(-1, draft.ranked)
        return ScoredGuesses(tokens, scores, given.root, bias)

    def _guesses_as_told(self, draft: Draft, settled: Settled) -> Guesses:
        """Report the guesses in the heads' own order."""
        ranked = draft.ranked
        heads, shown = self._state.head_count if ranked else 0, min(ranked, RANKED)
        return Guesses([settled.guesses[head * ranked :][:shown] for head in range(heads)])

    def _verdict(
        self,
        settled: Settled,
        parents: Sequence[int],
        given: StepInput,
        rule: Rule,
    ) -> tuple[int, int]:
        """Return the accepted row and the token behind it.

        Greedy steps have found them. Otherwise the library decides where it can be certain to
        decide as the rule does.
        """
        if settled.accepted >= 0:
            return settled.accepted, settled.next
        started = time.perf_counter()
        logits = self._step.logits(len(settled.tokens))
        decided = self._rules.decide(
            rule.kind, rule.numbers, rule.counts, logits, settled.tokens, parents, given.position
        )
        if decided is None:
            tree = TreeTensors.from_parents(parents)
            verdict = rule(logits, torch.tensor(settled.tokens), tree, given.position)
            decided = int(verdict.row), int(verdict.next)
        row, following = decided
        self._state.hidden.copy_(self._step.hidden[row : row + 1])
        self._parts["acceptance"] = time.perf_counter() - started
        return row, following


def _branch(row: int, parents: Sequence[int]) -> tuple[int, ...]:
    """List the rows from the root down to `row`."""
    branch = [row]
    while branch[0]:
        branch.insert(0, parents[branch[0]])
    return tuple(branch)


def _heads_of(state: State, packed: Packed) -> NativeHeads | None:
    """Return a state's heads as the library reads them; plain ones are packed as they are."""
    if state.heads is None or isinstance(state.heads, NativeHeads):
        return state.heads
    if not isinstance(state.heads, MedusaHeads):
        raise TypeError(f"the native step does not run {type(state.heads).__name__}")
    return NativeHeads(state.heads, packed.model, plain_format(state.backbone.dtype))
