"""The two runs of a race: each computes alone, and its steps know when they were done."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from medusa_chat.stats import Stats

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from medusa_chat.config import Message
    from medusa_chat.events import Step
    from medusa_chat.sampling import Sampling
    from medusa_chat.terminal.chat.engine import ChatEngine

WARM_UP = 3  # steps of each that are not timed: the first ones also prepare what the others use


class Lane:
    """One run: its steps, and the figures of all of them.

    Its clock counts the engine's own time from the first step on, neither the reading of the prompt
    nor the drawing.
    """

    def __init__(self, title: str, sampling: Sampling) -> None:
        self.title = title
        self.sampling = sampling
        self.stats = Stats()
        self._steps: list[tuple[float, Step]] = []  # each with the time at which it was done

    def add(self, step: Step) -> None:
        """Take in the next step."""
        self.stats.add(step)
        self._steps.append((self.stats.seconds, step))

    @property
    def seconds(self) -> float:
        """The time at which the last step was done."""
        return self.stats.seconds

    @property
    def ids(self) -> list[int]:
        """The tokens of all steps."""
        return [token.id for _, step in self._steps for token in step.tokens]

    def until(self, clock: float) -> list[Step]:
        """Return the steps that were done by then."""
        return [step for done, step in self._steps if done <= clock]


class Race:
    """The same prompt and seed, with heads and without.

    Two runs at once would share the processor and falsify each other. The one with heads runs
    first, as it is likely the shorter. The one without can then be shown while it runs, next to the
    steps of the first at the times that they took.
    """

    def __init__(self, engine: ChatEngine, prompt: Sequence[Message], sampling: Sampling) -> None:
        drafted = sampling
        if sampling.mode == "vanilla":
            drafted = replace(sampling, mode="greedy" if sampling.greedy else "exact")
        temperature = 0.0 if drafted.greedy else drafted.temperature
        plain = replace(drafted, mode="vanilla", temperature=temperature)
        self._engine = engine
        self._prompt = list(prompt)
        self.vanilla = Lane("without heads", plain)
        self.medusa = Lane(f"with heads · {drafted.mode}", drafted)

    @property
    def lanes(self) -> tuple[Lane, Lane]:
        """Both runs in the order in which they are shown."""
        return (self.vanilla, self.medusa)

    def run(self, lane: Lane) -> Generator[Step, None, None]:
        """Run a lane; yields each step after it was taken in. Raises what the engine raises."""
        with closing(self._generate(lane)) as steps:
            for step in steps:
                lane.add(step)
                yield step

    def warm_up(self) -> None:
        """Take a few steps of each lane, which are not timed."""
        for lane in self.lanes:
            with closing(self._generate(lane)) as steps:
                for _ in zip(range(WARM_UP), steps, strict=False):
                    pass

    def _generate(self, lane: Lane) -> Generator[Step, None, None]:
        steps = self._engine.generate(self._prompt, lane.sampling)
        return cast("Generator[Step, None, None]", steps)

    @property
    def same_text(self) -> bool | None:
        """True if both wrote the same tokens; None if the mode does not promise it."""
        if self.medusa.sampling.mode == "typical" and not self.medusa.sampling.greedy:
            return None
        return self.vanilla.ids == self.medusa.ids

    @property
    def speedup(self) -> float | None:
        """Tokens per second with heads over those without."""
        fast = self.medusa.stats.tokens_per_second
        slow = self.vanilla.stats.tokens_per_second
        return fast / slow if fast and slow else None
