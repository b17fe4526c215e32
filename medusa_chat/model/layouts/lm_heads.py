"""The LM heads of a file: own, shared, padded, or for a part of the vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.model.head_vocabulary import HeadVocabulary

if TYPE_CHECKING:
    from medusa_chat.model.layouts.checked import CheckedTensors
    from medusa_chat.model.layouts.names import Parts

# A vocabulary may be padded to a multiple of one of these, by an eighth of its size at most.
PADDINGS = (1, *(2**n for n in range(3, 11)))
MOST_PADDING = 1 / 8
COMPARED_ROWS = 4096  # rows of an LM head that are compared at a time


class LMHeads:
    """Reads LM heads [N, hidden] for the backbone's vocabulary, or the part of it that heads rank.

    Attributes:
        heads_vocabulary: that part; None if the heads rank all tokens.
        notices: lines for the user.
    """

    def __init__(self, tensors: CheckedTensors, parts: Parts, hidden: int, vocabulary: int) -> None:
        self.tensors = tensors
        self.parts = parts
        self.hidden = hidden
        self.vocabulary = vocabulary
        self.notices: list[str] = []
        self._ids = self._token_map()
        self.heads_vocabulary: HeadVocabulary | None = None
        if self._ids is not None and len(self._ids) < vocabulary:
            self.heads_vocabulary = HeadVocabulary(self._ids, vocabulary)
        self._report_vocabulary()

    @property
    def rows(self) -> int:
        """Tokens that the heads rank, N."""
        return self.vocabulary if self.heads_vocabulary is None else len(self.heads_vocabulary)

    def own(self, lm_head: Tensor | None) -> bool:
        """Return whether the heads have LM heads of their own.

        Args:
            lm_head: [V, hidden], the backbone's, if it can be compared.
        """
        if self.parts.lm_heads:
            return True
        return self.parts.shared is not None and not self._is_backbones(self.parts.shared, lm_head)

    def fill(self, lm_heads: Tensor) -> None:
        """Copy all LM heads to `lm_heads` [K, N, hidden]."""
        names = {head: name for (head, _), name in self.parts.lm_heads.items()}
        for head, target in enumerate(lm_heads):
            name = names.get(head) or self.parts.shared or ""
            if head == 0:
                self._report_padding(self._rows(name))
            self._fill_rows(name, target)

    def _token_map(self) -> Tensor | None:
        """The ids that the rows of truncated LM heads belong to, [rows], in the file's order."""
        name = self.parts.token_map
        if name is None:
            return None
        ids = self.tensors.files.get(name)
        if ids.dtype not in (torch.int32, torch.int64) or ids.ndim != 1 or not len(ids):
            raise self.tensors.fault(f"{name} is not a list of token ids")
        outside = int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary
        if outside or len(ids.unique()) < len(ids):
            raise self.tensors.fault(
                f"{name} names tokens twice, or beyond the backbone's {self.vocabulary}"
            )
        return ids.long().clone()

    def _rows(self, name: str) -> int:
        """Rows of an LM head: the backbone's but for padding, or those of the token map."""
        tensor = self.tensors.get(name)
        fits = tensor.ndim == 2 and tensor.shape[1] == self.hidden
        if not fits or (self._ids is None and not _padded(tensor.shape[0], self.vocabulary)):
            self.tensors.check_shape(name, (self.vocabulary, self.hidden))
        rows = tensor.shape[0]
        if self._ids is not None and rows not in (len(self._ids), self.vocabulary):
            raise self.tensors.fault(
                f"tensor {name} has {rows} rows, token_map names {len(self._ids)} tokens"
            )
        return rows

    def _report_vocabulary(self) -> None:
        """Tell of other programs' vocabularies; a training of our own has told of its own."""
        if self.heads_vocabulary is not None and self.parts.naming != "official":
            self.notices.append(
                f"the heads know {self.rows} of {self.vocabulary} tokens and guess no others"
            )

    def _report_padding(self, rows: int) -> None:
        if self._ids is None and rows != self.vocabulary:
            self.notices.append(
                f"the heads have {rows} rows for {self.vocabulary} tokens, taken for padding"
            )

    def _in_order(self, name: str) -> Tensor:
        """Return the rows of an LM head in the order of their tokens' ids, [N, hidden].

        Without a token map there may be more or fewer rows than tokens: padding.
        """
        rows = self._rows(name)
        found = self.tensors.finite(name)
        if self._ids is None:
            return found[: self.vocabulary]
        order = self._ids.argsort()
        return found[order if rows == len(self._ids) else self._ids[order]]

    def _fill_rows(self, name: str, target: Tensor) -> None:
        """Copy an LM head's rows to the rows of their tokens.

        A token that padding took the row of gets the mean of all rows. Its logit is the mean of
        the others', never the largest and, among thousands, never near it. (No row of a layer
        without bias is below all others for every input.)
        """
        kept = self._in_order(name)
        if len(kept) < len(target):
            target[:] = kept.mean(0, dtype=torch.float32)
        target[: len(kept)] = kept.to(target.dtype)
        self.tensors.check_range(name, target)

    def _is_backbones(self, name: str, lm_head: Tensor | None) -> bool:
        """Return whether the LM head that all heads of a file share is the backbone's."""
        theirs = self._in_order(name)
        if lm_head is None or not lm_head.is_floating_point():
            self.notices.append(
                f"{name} is taken to be the backbone's LM head: they cannot be compared"
            )
            return True
        if self.heads_vocabulary is not None:
            lm_head = lm_head[self.heads_vocabulary.tokens.to(lm_head.device)]
        rows = min(len(theirs), len(lm_head))
        same = _close(theirs[:rows], lm_head[:rows])
        if not same:
            self.notices.append(
                f"{name} is not the backbone's LM head, so that each head keeps a copy of it"
            )
        return same


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Compare two matrices up to 16-bit rounding, a piece at a time."""
    pairs = zip(ours.split(COMPARED_ROWS), theirs.split(COMPARED_ROWS), strict=True)
    return all(torch.allclose(a.float(), b.float().cpu(), rtol=0.01, atol=1e-5) for a, b in pairs)


def _padded(rows: int, vocabulary: int) -> bool:
    """Return whether two counts of rows differ by padding alone."""
    small, large = sorted((rows, vocabulary))
    if large - small > MOST_PADDING * large:
        return False
    return any(large == -(-small // multiple) * multiple for multiple in PADDINGS)
