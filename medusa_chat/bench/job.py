"""The job of `medusa-chat bench` for one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medusa_chat.decoding.trees.costs import TIMED_LENGTH
from medusa_chat.events import Step

if TYPE_CHECKING:
    from medusa_chat.prompts import Prompt
    from medusa_chat.sampling import Mode, Sampling

Consume = Callable[[Iterable[Step]], object]
Tick = Callable[[int, int], None]  # (done, total)
ProgressBar = Callable[[str], AbstractContextManager[Tick]]  # opens a bar of that name


@dataclass(frozen=True)
class BenchJob:
    """Prompts, modes and lengths to measure.

    Attributes:
        turns: user turns to answer in each conversation, with the model's own answers in between.
        peers: other decoders to measure: transformers, llama.cpp=FILE.
        view: also measure replies that this function consumes, such as the chat's live view.
        contexts: numbers of cached positions at which steps are timed.
        histories: lengths of a conversation before the second turn that is timed.
    """

    prompts: list[Prompt]
    modes: list[Mode]
    sampling: Sampling
    rounds: int = 3
    turns: int = 1
    peers: tuple[str, ...] = ()
    view: Consume | None = None
    contexts: tuple[int, ...] = (TIMED_LENGTH,)
    histories: tuple[int, ...] = ()
