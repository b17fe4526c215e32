"""How steps add up: the one definition of every figure that is shown. No torch here."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from medusa_chat.events import COPIED, Finish, Pause, Step, rounded

if TYPE_CHECKING:
    from collections.abc import Iterable

TIMED_STEPS = 256  # medians are taken over the last so many steps of a kind


@dataclass
class Stats:
    """A fold of Steps: of one reply, of a conversation, of a benchmark.

    Steps that are paused count as vanilla steps but not in the comparison: speedup is what the heads bring where they
    are used, and tokens_per_second what all steps together gave.

    Attributes:
        paused: of the last step: why the heads are not in use.
    """

    new_tokens: int = 0
    seconds: float = 0.0
    tree_steps: int = 0
    tree_tokens: int = 0
    vanilla_steps: int = 0
    paused_steps: int = 0
    finish: Finish | None = None
    paused: Pause | None = None
    reached: Counter[int] = field(
        default_factory=Counter
    )  # head -> steps that put its guess to the test
    accepted: Counter[int] = field(
        default_factory=Counter
    )  # head -> its guesses that were accepted
    _tree_times: deque[float] = field(default_factory=lambda: deque(maxlen=TIMED_STEPS), repr=False)
    _vanilla_times: deque[float] = field(
        default_factory=lambda: deque(maxlen=TIMED_STEPS), repr=False
    )
    _overheads: deque[float] = field(default_factory=lambda: deque(maxlen=TIMED_STEPS), repr=False)
    _before: Step | None = field(default=None, repr=False)

    @classmethod
    def of(cls, steps: Iterable[Step]) -> Stats:
        stats = cls()
        for step in steps:
            stats.add(step)
        return stats

    def add(self, step: Step) -> None:
        self.new_tokens += len(step.tokens)
        self.seconds += step.seconds
        self.finish = step.finish
        if not step.nodes:
            return
        self.paused = step.paused
        before, self._before = self._before, None if step.finish else step
        if step.kind == "vanilla":
            self.vanilla_steps += 1
            if step.paused:
                self.paused_steps += 1
                return
            self._vanilla_times.append(step.seconds)
            if before is not None and before.kind == "tree":
                self._overheads.append(before.seconds / step.seconds)
            return
        self.tree_steps += 1
        self.tree_tokens += step.settled
        self._tree_times.append(step.seconds)
        self.reached.update(step.tested)
        for token in step.tokens[1 : step.settled]:
            self.accepted[token.head] += 1

    @property
    def steps(self) -> int:
        """Forwards of the backbone, prefill aside."""
        return self.tree_steps + self.vanilla_steps

    @property
    def acceptance_length(self) -> float | None:
        """New tokens per tree step, the root included (the paper's acceleration rate)."""
        return self.tree_tokens / self.tree_steps if self.tree_steps else None

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens per second inside the engine, prefill aside."""
        return self.new_tokens / self.seconds if self.seconds else None

    @property
    def tree_step_seconds(self) -> float | None:
        return median(self._tree_times) if self._tree_times else None

    @property
    def vanilla_step_seconds(self) -> float | None:
        """Median of the vanilla steps; among tree steps, what they would have taken at the tree steps' pace."""
        if self._overheads and self.tree_step_seconds:
            return self.tree_step_seconds / median(self._overheads)
        return median(self._vanilla_times) if self._vanilla_times else None

    @property
    def vanilla_tokens_per_second(self) -> float | None:
        """What vanilla decoding does here: from the vanilla steps taken among the tree steps."""
        return 1 / self.vanilla_step_seconds if self.vanilla_step_seconds else None

    @property
    def overhead(self) -> float | None:
        """Time of a tree step over time of a vanilla step.

        Each vanilla step is compared with the tree step right before it, and the median of these ratios is told:
        a machine's pace drifts by more within a conversation than the two kinds of step differ.
        """
        if not self.tree_step_seconds or not self.vanilla_step_seconds:
            return None
        return self.tree_step_seconds / self.vanilla_step_seconds

    @property
    def speedup(self) -> float | None:
        """Acceptance length / overhead: tokens per second of tree steps over those of vanilla steps."""
        if self.acceptance_length is None or self.overhead is None:
            return None
        return self.acceptance_length / self.overhead

    def head_acceptance(self) -> dict[int, float]:
        """Per head: accepted guesses / steps in which its guess was put to the test; COPIED last."""
        heads = sorted(self.reached, key=lambda head: (head == COPIED, head))
        return {head: self.accepted[head] / self.reached[head] for head in heads}

    def as_json(self) -> dict[str, Any]:
        """The figures of the summary line of `--json`."""
        figures = {
            "new_tokens": self.new_tokens,
            "steps": self.steps,
            "acceptance_length": self.acceptance_length,
            "tokens_per_second": self.tokens_per_second,
            "vanilla_tokens_per_second": self.vanilla_tokens_per_second,
            "overhead": self.overhead,
            "speedup": self.speedup,
            "head_acceptance": {str(head): rate for head, rate in self.head_acceptance().items()},
            "paused_steps": self.paused_steps,
            "paused": asdict(self.paused) if self.paused else None,
        }
        return {key: rounded(value) for key, value in figures.items()} | {"finish": self.finish}
