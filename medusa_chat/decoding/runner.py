"""Runner: prefill and steps over one text. Nothing else runs the model while decoding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from medusa_chat.decoding import penalties
from medusa_chat.decoding.acceptance import Rule, make_rule
from medusa_chat.decoding.draft.base import Guessing
from medusa_chat.decoding.draft.dynamic import DynamicDraft
from medusa_chat.decoding.draft.fixed import FixedDraft
from medusa_chat.decoding.draft.ranking import bias_of
from medusa_chat.decoding.eager import EagerStep
from medusa_chat.decoding.fast import fast_step
from medusa_chat.decoding.report import StepInput, StepReport
from medusa_chat.decoding.state import State, StepProgram, StepUnavailableError
from medusa_chat.decoding.trees.accuracy import PUBLISHED, Accuracy
from medusa_chat.decoding.trees.tree import AnyTree, Tree

if TYPE_CHECKING:
    from collections.abc import Callable

    from medusa_chat.decoding.acceptance import Coupling
    from medusa_chat.decoding.draft.base import Draft
    from medusa_chat.decoding.draft.copies import Copied
    from medusa_chat.decoding.trees.policy import Choice
    from medusa_chat.model.backbone import Backbone
    from medusa_chat.model.heads import Heads
    from medusa_chat.sampling import Sampling

MOST_DRAFTS = 64  # kept for trees that come again


@dataclass(frozen=True)
class Launched:
    """A step on its way.

    Attributes:
        choice: the tree that it verifies.
        finish: waits for its report, and commits the path.
        seconds: time that the host took to launch it.
    """

    choice: Choice
    finish: Callable[[], StepReport]
    seconds: float


class Runner:
    """Runs steps over one text.

    Attributes:
        backbone: the model that decides.
        heads: the Medusa heads, or None.
        cache: keys and values of the text.
        accuracy: how far dynamic trees trust the heads, and how often paths are right.
        state: backbone, heads, cache and the last hidden state.
        eager: the step that always works.
        fast: the step in use if there is a faster one, else None.
        notices: messages for the user, a line each.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: Heads | None,
        capacity: int,
        accuracy: Accuracy | None = None,
        eager: bool | None = None,
    ) -> None:
        """Start with an empty text.

        Args:
            backbone: the model that decides.
            heads: the Medusa heads, or None.
            capacity: positions of the cache.
            accuracy: of the heads; None for that of published ones.
            eager: run steps operation by operation; None does so only where it must.
        """
        self.backbone = backbone
        self.heads = heads
        self.accuracy = accuracy or PUBLISHED
        self.state = State(backbone, heads, capacity)
        self.cache = self.state.cache
        self.eager = EagerStep(self.state)
        self.fast: StepProgram | None = fast_step(self.state, eager)
        self.notices: list[str] = []
        self._bias = bias_of(heads, backbone.device, backbone.vocabulary)
        self._drafts: dict[tuple[AnyTree, bool, Coupling], Draft] = {}

    def trust(self, accuracy: Accuracy) -> None:
        """Replace the figures for how likely the heads' guesses are right."""
        self.accuracy = accuracy or PUBLISHED
        self._drafts.clear()

    @torch.inference_mode()
    def begin(self, prompt: list[int], sampling: Sampling) -> Rule:
        """Return the rule of a reply; penalties count the whole prompt from here on."""
        if not sampling.penalized:
            return make_rule(sampling)
        penalties.begin(self.state.counts, prompt)
        return make_rule(sampling, self.state.counts)

    @torch.inference_mode()
    def prefill(self, tokens: list[int], rule: Rule) -> int:
        """Append tokens to the text; returns the token that the rule chooses after them."""
        return (self.fast or self.eager).prefill(tokens, rule)

    @torch.inference_mode()
    def step(
        self, root: int, tree: AnyTree, rule: Rule, copied: Copied | None = None
    ) -> StepReport:
        """Verify a tree in one forward and commit the accepted path.

        Args:
            root: the token that the step begins with.
            tree: the tree to verify. That of the root alone is a vanilla step: no heads run.
            rule: decides which candidates are accepted.
            copied: a chain that competes with the heads' guesses for the tree's places.
        """
        return self.launch(root, tree, rule, copied)()

    @torch.inference_mode()
    def launch(
        self, root: int, tree: AnyTree, rule: Rule, copied: Copied | None = None
    ) -> Callable[[], StepReport]:
        """Begin a step as `step` takes it.

        Returns:
            A function that ends it. Where steps do not overlap with the host, it takes the step.
        """
        given = StepInput(root, self.cache.length, rule.numbers, copied)
        return partial(self._finish, self._launch(given, tree, rule), rule)

    def _launch(self, given: StepInput, tree: AnyTree, rule: Rule) -> Callable[[], StepReport]:
        copied = given.copied is not None
        if self.fast is not None:
            try:
                return self.fast.launch(self._draft(tree, copied, rule.coupling), given, rule)
            except StepUnavailableError as reason:
                self._step_eagerly(reason)
        return self.eager.launch(self._draft(tree, copied, rule.coupling), given, rule)

    @torch.inference_mode()
    def _finish(self, finish: Callable[[], StepReport], rule: Rule) -> StepReport:
        """End a step, and count the tokens of its path if the rule has penalties."""
        report = finish()
        if rule.counts is not None:
            penalties.extend(rule.counts, report.tokens)
        return report

    @property
    def overlaps(self) -> bool:
        """True if a launched step runs while the host does other things."""
        return self.fast is not None and self.fast.overlaps

    @property
    def device_seconds(self) -> float:
        """Time that the last step took on a GPU; 0.0 elsewhere."""
        return self.fast.device_seconds if self.fast is not None else 0.0

    def _step_eagerly(self, reason: StepUnavailableError) -> None:
        """Drop the fast step for good: where one step fails, others would, and memory is short."""
        self.fast = None
        self._drafts.clear()
        self.notices.append(str(reason))

    def _draft(self, tree: AnyTree, copied: bool, coupling: Coupling) -> Draft:
        key = (tree, copied, coupling)
        draft = self._drafts.get(key)
        if draft is None:
            if len(self._drafts) >= MOST_DRAFTS:
                self._drafts.clear()
            draft = self._drafts[key] = self._new_draft(tree, copied, coupling)
        return draft

    def _new_draft(self, tree: AnyTree, copied: bool, coupling: Coupling) -> Draft:
        accuracy = self.accuracy.of_guesses(coupled=coupling != "none")
        guessing = self.guessing(coupling, accuracy)
        if isinstance(tree, Tree) and not copied:
            return FixedDraft(tree, guessing)
        return DynamicDraft(tree, guessing, copied=copied)

    def guessing(self, coupling: Coupling, accuracy: Accuracy) -> Guessing:
        """Describe the heads to drafts, with these figures for how far they are to be trusted."""
        vocabulary = None if self.heads is None else self.heads.vocabulary
        return Guessing(
            self.backbone,
            self.state.head_count,
            self.backbone.vocabulary if vocabulary is None else len(vocabulary),
            accuracy,
            self._bias,
            coupling,
            self.fast is not None and self.fast.shared_buffers,
        )
