"""Packed: a backbone in the form that the native step reads, with the threads that run it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from medusa_chat.native.library import load
from medusa_chat.native.structures import FORMATS, Matrix

if TYPE_CHECKING:
    from medusa_chat.native.model import NativeHeads, NativeModel
    from medusa_chat.native.step import Team

NAMES = {number: name for name, number in FORMATS.items()}


@dataclass(frozen=True)
class Packed:
    """The weights of one backbone, and the threads that run its steps.

    Attributes:
        weights: the format of the layers: a key of structures.FORMATS.
    """

    model: NativeModel
    team: Team
    weights: str

    @property
    def threads(self) -> int:
        """Threads of a step."""
        return self.team.threads

    @property
    def variant(self) -> str:
        """The kernels in use: portable, avx2, avx2vnni, avx512 or arm."""
        return variant()

    def formats(self, heads: NativeHeads | None) -> str:
        """Name the formats of the layers, the LM head, and the heads' blocks and own LM heads."""
        used = [self.model.structure.layer[0].qkv, self.model.structure.lm_head]
        if heads:
            used.append(heads.structure.block[0])
            used += heads.structure.lm_head[:1] if heads.own_lm_heads else []
        return ", ".join(NAMES[matrix.format] for matrix in used)

    @property
    def backbone_bytes(self) -> int:
        """Bytes that a forward reads of the backbone."""
        return self.model.step_bytes

    def heads_bytes(self, heads: NativeHeads) -> int:
        """Count the bytes that heads read: their own, and the LM head again if they share it."""
        apart = heads.own_lm_heads or heads.cut
        shared = 0 if apart else packed_bytes(self.model.structure.lm_head)
        return heads.store.bytes + shared


def packed_bytes(matrix: Matrix) -> int:
    """Return the bytes of a packed matrix, without its bias."""
    return int(load().mc_packed_bytes(matrix.format, matrix.outputs, matrix.inputs))


def variant() -> str:
    """Return the name of the kernels that suit this processor.

    Raises:
        UnavailableError: the library is not there.
    """
    name: str = load().mc_variant().decode()
    return name
