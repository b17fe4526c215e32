"""What `medusa-chat bench` measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medusa_chat.decoding.trees.costs import TIMED_LENGTH
from medusa_chat.events import Step

if TYPE_CHECKING:
    from medusa_chat.config import Mode, Quant, Sampling
    from medusa_chat.prompts import Prompt

Consume = Callable[[Iterable[Step]], object]
Tick = Callable[[int, int], None]  # (done, total)
Progress = Callable[[str], AbstractContextManager[Tick]]  # opens a phase of that name


@dataclass(frozen=True)
class Plan:
    """What is measured of one model.

    Attributes:
        turns: user turns to answer of each conversation, the model's own answers in between.
        peer: compare with transformers' generate() too.
        view: a consumer of steps that is timed beside the plain one.
        contexts: cached positions behind which steps are timed; histories: lengths of a conversation before the turn
            whose first token is timed.
    """

    prompts: list[Prompt]
    modes: list[Mode]
    sampling: Sampling
    rounds: int = 3
    turns: int = 1
    peer: bool = False
    view: Consume | None = None
    contexts: tuple[int, ...] = (TIMED_LENGTH,)
    histories: tuple[int, ...] = ()


@dataclass(frozen=True)
class RandomModel:
    """A model of random weights to measure steps on.

    Attributes:
        shape: a name of medusa_chat.shapes.SHAPES; own: LM heads of the heads' own.
        fused: with the matrices that read the same rows joined, as a loaded model has them.
    """

    shape: str
    quant: Quant = "none"
    quant_heads: Quant = "none"
    heads: int = 5
    own: bool = False
    fused: bool = True

    @property
    def name(self) -> str:
        return self.shape if self.quant == "none" else f"{self.shape}:{self.quant}"
