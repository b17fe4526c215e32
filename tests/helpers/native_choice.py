"""A choice of nodes by the library's mc_choose alone, over candidates that a test makes up."""

from __future__ import annotations

from ctypes import addressof, byref, c_float, c_int32
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from medusa_chat.native.library import load
from medusa_chat.native.structures import BFLOAT16, FLOAT32, Bias, Candidates

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medusa_chat.native.rows import ChosenRows


@dataclass
class Biased:
    """A bias: first [P, rank], second [N, rank], and the row of `first` of each token."""

    first: torch.Tensor
    second: torch.Tensor
    rows: Sequence[int] | None = None

    def structure(self) -> Bias:
        """What the library reads; this object has to live as long."""
        assert self.first.dtype == self.second.dtype
        number = FLOAT32 if self.first.dtype == torch.float32 else BFLOAT16
        self._rows = None if self.rows is None else (c_int32 * len(self.rows))(*self.rows)
        return Bias(
            self.first.shape[1],
            number,
            len(self.first),
            len(self.second),
            self.first.data_ptr(),
            self.second.data_ptr(),
            None if self._rows is None else addressof(self._rows),
        )


def choose(
    rows: ChosenRows,
    root: int,
    tokens: Sequence[Sequence[int]],
    log_p: Sequence[Sequence[float]],
    vocabulary: int = 128,
    *,
    indices: Sequence[Sequence[int]] | None = None,
    bias: Biased | None = None,
) -> int:
    """Choose among tokens [heads, ranked] with log p [heads, ranked]; returns mc_choose's result.

    `indices` are those of the tokens among the ones that the heads rank, by default the tokens.
    """
    flat = [token for row in tokens for token in row]
    ids = flat if indices is None else [index for row in indices for index in row]
    arrays: Any = (
        (c_int32 * len(flat))(*flat),
        (c_int32 * len(ids))(*ids),
        (c_float * len(flat))(*(value for row in log_p for value in row)),
    )
    structure = None if bias is None else bias.structure()
    candidates = Candidates(
        len(tokens),
        rows.ranked,
        vocabulary,
        *map(addressof, arrays),
        None if structure is None else addressof(structure),
    )
    return int(load().mc_choose(byref(rows.choice), byref(candidates), root))
