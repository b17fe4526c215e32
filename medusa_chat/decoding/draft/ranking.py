"""Rank the children of a node among the likeliest tokens of its head.

Without more, a head ranks the same tokens behind every node of a depth. Two things change that:

- a parent bias (model.parent_bias): the node's own token changes what its head takes for likely;
- coupling: where the target is drawn with noise that is known (mode exact), a guess is ranked by
  its log p plus the noise of its token, as the target will be (Daliri et al., arXiv:2408.07978).
  Heads know less than the backbone will, so that calibration weighs the two.

Everything runs on the device, in fixed shapes. Shapes: K heads, C candidates of each, N tokens that
heads rank, V tokens in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.decoding.acceptance import truncate
from medusa_chat.decoding.draft.guesses import HostBias
from medusa_chat.decoding.noise import gumbel_of
from medusa_chat.decoding.numbers import Numbers, integer, single

if TYPE_CHECKING:
    from medusa_chat.decoding.acceptance import Coupling
    from medusa_chat.decoding.trees.accuracy import Accuracy
    from medusa_chat.model.heads import Heads

CANDIDATES = 32  # tokens of each head that compete behind a node, if their order can change


@dataclass(frozen=True)
class Candidates:
    """The likeliest tokens of each head.

    Attributes:
        tokens: [K, C].
        log_p: float32 [K, C], natural logarithms; None if no draft reads them.
        indices: [K, C], of the tokens among the N that the heads rank.
    """

    tokens: Tensor
    log_p: Tensor | None
    indices: Tensor


class TokenBias:
    """The parent bias of heads, as drafts read it. Copies of a draft share it."""

    def __init__(self, first: Tensor, second: Tensor, rows: Tensor) -> None:
        """Take the matrices [P, rank] and [N, rank] of model.parent_bias.

        `rows` [V] has the index of each token among the N, or N.
        """
        self._first, self._second, self._rows = first.float(), second.float(), rows
        tensors = (self._first, self._second, self._rows)
        self.host = HostBias(*(tensor.detach().cpu().numpy() for tensor in tensors))

    def __call__(self, parents: Tensor, indices: Tensor) -> Tensor:
        """Bias of candidates behind parents [S]: float32 [S, C].

        `indices` are the candidates of one head, [C] or [S, C].
        """
        first = self._first[self._rows[parents]]
        if indices.ndim == 1:
            return first @ self._second[indices].T
        return (self._second[indices] @ first[..., None])[..., 0]

    def __deepcopy__(self, memo: object) -> TokenBias:
        return self


def bias_of(heads: Heads | None, device: torch.device, vocabulary: int) -> TokenBias | None:
    """Return the parent bias of heads on a device, or None if they have none."""
    bias = None if heads is None else heads.parent_bias
    if bias is None:
        return None
    rows = torch.arange(vocabulary) if bias.rows is None else bias.rows
    first, second = bias.first.detach(), bias.second.detach()
    return TokenBias(first.to(device), second.to(device), rows.to(device))


@dataclass(frozen=True)
class Noise:
    """The noise that the targets of a step will be drawn with.

    Attributes:
        values: float32 [K, C], of each candidate at its place.
        numbers: of the sampling.
    """

    values: Tensor
    numbers: Numbers


@dataclass(frozen=True)
class Ranked:
    """Candidates behind some nodes, likeliest first.

    Attributes:
        order: [..., C], their places among the head's candidates.
        log_p: float32 [..., C], natural logarithms of the chance that each is right if the node is.
    """

    order: Tensor
    log_p: Tensor


class Ranker:
    """Ranks children as the heads, their bias, the noise and the calibration say.

    Attributes:
        bias: of the heads, or None.
        coupling: the noise that counts, as a Rule says.
        lines: scale and shift of each head, and its weights of log p and noise.
    """

    def __init__(
        self,
        accuracy: Accuracy,
        heads: int,
        device: torch.device,
        bias: TokenBias | None = None,
        coupling: Coupling = "none",
    ) -> None:
        """`accuracy` has the calibration of as many `heads`."""
        self.bias, self.coupling = bias, coupling
        self.lines = [
            (*accuracy.calibration_of(head), *accuracy.coupling_of(head))
            for head in range(1, heads + 1)
        ]
        table = torch.tensor(self.lines, device=device).view(heads, 4, 1)
        # [K, 1] each
        self._scale, self._shift, self._of_log_p, self._of_noise = table.unbind(1)

    @property
    def reorders(self) -> bool:
        """True if the order of the candidates is not the heads' own."""
        return self.bias is not None or self.coupling != "none"

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Tensors that differ between rankers of one shape."""
        return self._scale, self._shift, self._of_log_p, self._of_noise

    def noise(
        self, candidates: Candidates, position: Tensor | int, numbers: Numbers, vocabulary: int
    ) -> Noise | None:
        """Draw the noise of a step whose root stands at `position`; None without coupling."""
        if self.coupling == "none":
            return None
        tokens = candidates.tokens
        positions = torch.arange(1, len(tokens) + 1, device=tokens.device) + position
        values = gumbel_of(integer(numbers.seed), positions, tokens, vocabulary)
        return Noise(values, numbers)

    def rank(self, candidates: Candidates, noise: Noise | None) -> Ranked:
        """Rank the candidates of all heads, whatever stands before them: [K, C]."""
        assert candidates.log_p is not None
        return self._ranked(candidates.log_p, slice(None), noise)

    def rank_behind(
        self, parents: Tensor, candidates: Candidates, head: int, noise: Noise | None
    ) -> Ranked:
        """Rank the candidates of a head, from 0, behind nodes with these tokens: [S] -> [S, C]."""
        assert candidates.log_p is not None
        log_p = self._biased(candidates.log_p[head], parents, candidates.indices[head])
        own = noise and Noise(noise.values[head], noise.numbers)
        return self._ranked(log_p, slice(head, head + 1), own)

    def rank_along(self, candidates: Candidates, parents: Tensor, noise: Noise | None) -> Ranked:
        """Rank the candidates of many steps, each behind the token that did precede it.

        Candidates, noise and result are [S, K, C] each; `parents` are [S, K].
        """
        return self._ranked(self.log_p_along(candidates, parents), slice(None), noise)

    def log_p_along(self, candidates: Candidates, parents: Tensor) -> Tensor:
        """The heads' log p of candidates [S, K, C] behind parents [S, K], before any noise."""
        log_p, indices = candidates.log_p, candidates.indices
        assert log_p is not None
        if self.bias is None:
            return log_p
        each = [
            self._biased(log_p[:, head], parents[:, head], indices[:, head])
            for head in range(parents.shape[1])
        ]
        return torch.stack(each, dim=1)

    def _biased(self, log_p: Tensor, parents: Tensor, indices: Tensor) -> Tensor:
        """Add the bias of parents [S] to log p, [C] or [S, C]: [S, C]."""
        assert self.bias is not None
        raised = log_p + self.bias(parents, indices)
        # The tokens that are no candidates keep their probability.
        rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=0)
        return raised - (raised.exp().sum(-1, keepdim=True) + rest).log()

    def shown(self, candidates: Candidates, noise: Noise | None) -> Tensor:
        """Scores by which the host ranks candidates as a step does."""
        assert candidates.log_p is not None
        return candidates.log_p if noise is None else self.host_scores(candidates.log_p, noise)

    def host_scores(self, log_p: Tensor, noise: Noise) -> Tensor:
        """Add the noise to log p [K, C] so that the host has to add the bias alone, if any.

        Behind a bias it leaves out the truncation, which seldom cuts a guess that counts.
        """
        if self.bias is None:
            return self._coupled(log_p, slice(None), noise)
        heat = single(noise.numbers.temperature) / self._of_log_p
        return log_p + heat * self._of_noise * noise.values

    def _ranked(self, log_p: Tensor, heads: slice, noise: Noise | None) -> Ranked:
        if noise is not None:
            log_p = self._coupled(log_p, heads, noise)
        if self.reorders:
            log_p, order = log_p.sort(dim=-1, descending=True, stable=True)
        else:
            order = torch.arange(log_p.shape[-1], device=log_p.device).expand_as(log_p)
        calibrated = self._scale[heads] * log_p + self._shift[heads]
        return Ranked(order, calibrated.clamp(max=0))

    def _coupled(self, log_p: Tensor, heads: slice, noise: Noise) -> Tensor:
        numbers = noise.numbers
        scores = self._of_log_p[heads] * log_p / single(numbers.temperature)
        if self.coupling == "truncated":
            flat = truncate(scores.flatten(0, -2), *numbers[1:4])
            scores = flat.view_as(scores)
        return (scores + self._of_noise[heads] * noise.values).log_softmax(-1)
