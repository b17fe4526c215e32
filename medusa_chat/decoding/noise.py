"""Keyed Gumbel noise: the same draw for the same seed, position and token, whatever the tree."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B - 2**32
_POSITION_STRIDE = 0x2545F4914F6CDD1D
_SEED_STRIDE = 0x9E3779B1


def gumbel(seed: int | Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise that depends on (seed, position, token id) alone.

    The bits are lowbias32 (C. Wellons, hash-prospector) of both keys. Integer arithmetic wraps
    around, as the hash needs it.

    Args:
        seed: an integer, or a tensor [] of the device.
        positions: [m], positions in the text.
        vocabulary: tokens, V.

    Returns:
        float32 [m, V]
    """
    return _drawn(seed, positions, token_keys(vocabulary, positions.device))


def gumbel_of(seed: int | Tensor, positions: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
    """The noise of `gumbel` for some tokens of each position: [m, c] -> float32 [m, c]."""
    return _drawn(seed, positions, token_keys(vocabulary, positions.device)[tokens])


def _drawn(seed: int | Tensor, positions: Tensor, keys_of_tokens: Tensor) -> Tensor:
    """Draw the noise of [m] positions and the tokens of these keys, [V] or [m, c]."""
    keys = positions * _POSITION_STRIDE + seed * _SEED_STRIDE
    rows = _mix((keys ^ (keys >> 32)).int())[:, None]
    bits = _mix(keys_of_tokens ^ rows)
    uniform = bits.bitwise_and_(2**31 - 1).float().mul_(2.0**-31)
    # Float32 is finest near 0, where the large values come from; 0 and 1 have none.
    uniform = uniform.clamp_(2.0**-32, 1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


@lru_cache(maxsize=4)
def token_keys(vocabulary: int, device: torch.device) -> Tensor:
    """One well mixed int32 for each token: [V]."""
    return _mix(torch.arange(1, vocabulary + 1, dtype=torch.int32, device=device))


def _mix(x: Tensor) -> Tensor:
    """Spread every bit of int32 x, in place, over the whole word; masks make the shifts logical."""
    x ^= (x >> 16).bitwise_and_(2**16 - 1)
    x *= _MIX_1
    x ^= (x >> 15).bitwise_and_(2**17 - 1)
    x *= _MIX_2
    x ^= (x >> 16).bitwise_and_(2**16 - 1)
    return x
