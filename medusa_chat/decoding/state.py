"""State: the model and its text, as every kind of step reads and changes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from medusa_chat.decoding.draft.ranking import Candidates
from medusa_chat.decoding.penalties import new_counts
from medusa_chat.native.model import NativeHeads

if TYPE_CHECKING:
    from collections.abc import Callable

    from medusa_chat.decoding.acceptance import Rule
    from medusa_chat.decoding.draft.base import Draft
    from medusa_chat.decoding.report import StepInput, StepReport
    from medusa_chat.model.backbone import Backbone
    from medusa_chat.model.heads import Heads


class State:
    """A model with the cache of one text.

    Attributes:
        backbone: the model that decides.
        heads: the Medusa heads, or None.
        head_count: how many heads there are.
        cache: keys and values of the text.
        hidden: [1, hidden], the backbone's last hidden state of the text's last token. Steps write
            to this tensor; only a StepProgram that is made replaces it.
        counts: of the text's tokens, as `penalties` keeps them for a rule that reads them.
    """

    def __init__(self, backbone: Backbone, heads: Heads | None, capacity: int) -> None:
        """Start with an empty text; the cache holds `capacity` positions."""
        self.backbone = backbone
        self.heads = heads
        self.head_count = heads.heads if heads else 0
        self.cache = backbone.new_cache(capacity)
        self.hidden = torch.zeros(
            1, backbone.hidden_size, dtype=backbone.dtype, device=backbone.device
        )
        self.counts = new_counts(backbone.vocabulary, backbone.device)

    def candidates(self, draft: Draft) -> Candidates:
        """Let the heads guess the tokens after the root: the likeliest of each, `draft.ranked`."""
        if self.heads is None or draft.ranked == 0:
            nothing = torch.empty(0, 0, dtype=torch.long, device=self.backbone.device)
            return Candidates(nothing, None, nothing)
        assert not isinstance(self.heads, NativeHeads), "only the native step runs packed heads"
        logits = self.heads.logits(self.hidden, self.backbone.lm_head)[:, 0]
        likeliest = logits.topk(draft.ranked)
        indices = likeliest.indices
        vocabulary = self.heads.vocabulary
        tokens = indices if vocabulary is None else vocabulary.tokens[indices]
        if not draft.needs_log_p:
            return Candidates(tokens, None, indices)
        log_p = likeliest.values.float() - logits.float().logsumexp(-1, keepdim=True)
        return Candidates(tokens, log_p, indices)


class StepProgram(Protocol):
    """A way to run the model over a State's text.

    Attributes:
        shared_buffers: whether drafts of one shape cost less than drafts of several.
        overlaps: whether a launched step runs while the host does other things.
        device_seconds: time that the last step took on a GPU; 0.0 elsewhere.
    """

    shared_buffers: bool
    overlaps: bool
    device_seconds: float

    def prefill(self, tokens: list[int], rule: Rule) -> int:
        """Append tokens to the text and commit them; returns the token that follows."""

    def launch(self, draft: Draft, given: StepInput, rule: Rule) -> Callable[[], StepReport]:
        """Start a step, which verifies a draft's nodes in one forward.

        Returns:
            A function that ends the step and commits the accepted path. Where steps do not overlap
            with the host, it takes the whole step.

        Raises:
            StepUnavailableError: this way does not work here; text and cache are as they were.
        """


class StepUnavailableError(Exception):
    """A way to take steps does not work here; the message is one sentence for the user."""
