"""Packed: a backbone and its heads in the form that the native step reads, with their threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from medusa_chat.native.library import load

if TYPE_CHECKING:
    from medusa_chat.native.model import NativeHeads, NativeModel
    from medusa_chat.native.step import Team


@dataclass(frozen=True)
class Packed:
    """The weights of one model, and the threads that run its steps.

    Attributes:
        weights: the format of the layers: a key of library.FORMATS.
        heads: the Medusa heads, or None.
    """

    model: NativeModel
    heads: NativeHeads | None
    team: Team
    weights: str

    @property
    def threads(self) -> int:
        """Threads of a step."""
        return self.team.threads

    @property
    def backbone_bytes(self) -> int:
        """Bytes that a forward reads of the backbone: all but the embedding's table."""
        return self.model.step_bytes

    @property
    def heads_bytes(self) -> int:
        """Bytes of the heads' own matrices."""
        return self.heads.store.bytes if self.heads else 0

    @property
    def name(self) -> str:
        """The kernels and the threads, for people to read."""
        return f"native ({variant()}), {self.threads} threads"


def variant() -> str:
    """Return the name of the kernels that suit this processor.

    Raises:
        Unavailable: the library is not there.
    """
    name: str = load().mc_variant().decode()
    return name
