"""The numbers of a sampling, as the rules of acceptance read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from medusa_chat.sampling import Sampling

Number = float | Tensor


class Numbers(NamedTuple):
    """The numbers of a sampling, as floats or as tensors [] of the device."""

    temperature: Number
    top_k: Number
    top_p: Number
    min_p: Number
    epsilon: Number
    delta: Number
    seed: Number
    repetition_penalty: Number
    presence_penalty: Number
    frequency_penalty: Number

    @classmethod
    def of(cls, sampling: Sampling) -> Numbers:
        """Return the numbers of a sampling, as floats."""
        return cls(*(float(getattr(sampling, name)) for name in cls._fields))


def single(number: Number) -> Number:
    """Return a number of the device as float32; floats stay as they are."""
    return number.float() if isinstance(number, Tensor) else number


def integer(number: Number) -> int | Tensor:
    """Return a number as an integer, or as a tensor of one."""
    return number.long() if isinstance(number, Tensor) else int(number)
