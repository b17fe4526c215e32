"""Stats: the one definition of every figure that is computed from Steps. No torch here."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from medusa_chat.events import COPIED, Finish, Pause, Step, rounded

if TYPE_CHECKING:
    from collections.abc import Iterable

TIMED_STEPS = 256  # medians are taken over the last so many steps of a kind
CHEAPEST_STEP = 1.0  # of vanilla steps: a tree step computes all that one does, so less is noise
# A vanilla step among tree steps finds the processor's caches filled by their work, and takes up to
# a sixth longer than among its own kind. So the faster ones count: two thirds of the ratios of each
# vanilla step and the tree step before it are at most the overhead.
OVERHEAD_SHARE = 2 / 3
# Two standard errors of a median of n ratios are 2 * 1.2533 * deviation / sqrt(n). Ratios of single
# steps deviate by a tenth on a quiet machine: 8 give a speedup within 9%, 4 within 13%.
REPLY_COMPARISONS = 8  # before a reply's own overhead counts in place of the conversation's
LEAST_COMPARISONS = 4  # before any speedup is shown


@dataclass(frozen=True)
class Speedup:
    """A reply's speedup that enough comparisons support.

    Attributes:
        value: tokens per second over those of vanilla decoding.
        comparisons: vanilla steps that were compared with the tree step before them.
        of_reply: all of them in this reply, not in the conversation.
    """

    value: float
    comparisons: int
    of_reply: bool


@dataclass
class Stats:
    """A fold of Steps: of one reply, a conversation, a benchmark, or a window of recent steps.

    A step of a pause counts as a vanilla step but not in the comparison: `speedup` is that of the
    heads in use, and `tokens_per_second` covers all steps.

    Attributes:
        paused: why the heads were not in use in the last step.
        reached: for each head, the steps that tested its guess.
        accepted: for each head, its guesses that were accepted.
        window: limits acceptance length and overhead, and so the speedup, to the last `window` tree
            steps and half as many vanilla steps among them; None takes all.
        lengths: tokens of each of the last tree steps.
        overheads: time of a tree step over that of the vanilla step after it, for the last pairs.
    """

    new_tokens: int = 0
    seconds: float = 0.0
    tree_steps: int = 0
    tree_tokens: int = 0
    vanilla_steps: int = 0
    paused_steps: int = 0
    finish: Finish | None = None
    paused: Pause | None = None
    reached: Counter[int] = field(default_factory=Counter)
    accepted: Counter[int] = field(default_factory=Counter)
    window: int | None = None

    def __post_init__(self) -> None:
        steps = self.window or TIMED_STEPS
        self.lengths: deque[int] = deque(maxlen=steps)
        self.overheads: deque[float] = deque(maxlen=steps // 2 if self.window else steps)
        self._tree_times: deque[float] = deque(maxlen=steps)
        self._vanilla_times: deque[float] = deque(maxlen=steps)
        self._before: Step | None = None

    @classmethod
    def of(cls, steps: Iterable[Step]) -> Stats:
        """Fold steps into the figures of all of them."""
        stats = cls()
        for step in steps:
            stats.add(step)
        return stats

    def add(self, step: Step) -> None:
        """Take in the next step."""
        self.new_tokens += len(step.tokens)
        self.seconds += step.seconds
        self.finish = step.finish
        if not step.nodes:
            return
        self.paused = step.paused
        if step.kind == "tree":
            self._add_tree_step(step)
        else:
            self._add_vanilla_step(step)
        self._before = None if step.finish else step

    def _add_tree_step(self, step: Step) -> None:
        if self.window and len(self.lengths) == self.window:
            self.tree_steps -= 1
            self.tree_tokens -= self.lengths[0]
        self.tree_steps += 1
        self.tree_tokens += step.settled
        self.lengths.append(step.settled)
        self._tree_times.append(step.seconds)
        self.reached.update(step.tested)
        self.accepted.update(token.head for token in step.tokens[1 : step.settled])

    def _add_vanilla_step(self, step: Step) -> None:
        self.vanilla_steps += 1
        if step.paused:
            self.paused_steps += 1
            return
        self._vanilla_times.append(step.seconds)
        if self._before is not None and self._before.kind == "tree":
            self.overheads.append(self._before.seconds / step.seconds)

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
        """Median time of a tree step."""
        return median(self._tree_times) if self._tree_times else None

    @property
    def vanilla_step_seconds(self) -> float | None:
        """Time of a vanilla step: among tree steps, of the faster ones at the pace of these.

        Without tree steps, it is the median.
        """
        if self.overheads and self.tree_step_seconds:
            ratio = sorted(self.overheads)[round(OVERHEAD_SHARE * (len(self.overheads) - 1))]
            return self.tree_step_seconds / max(ratio, CHEAPEST_STEP)
        return median(self._vanilla_times) if self._vanilla_times else None

    @property
    def comparisons(self) -> int:
        """Vanilla steps that were compared with the tree step right before them."""
        return len(self.overheads)

    @property
    def comparable(self) -> bool:
        """True once overhead, vanilla speed and speedup rest on enough comparisons to be shown."""
        return self.comparisons >= LEAST_COMPARISONS or not self.tree_steps

    @property
    def vanilla_tokens_per_second(self) -> float | None:
        """Speed of vanilla decoding, from the vanilla steps taken among the tree steps."""
        return 1 / self.vanilla_step_seconds if self.vanilla_step_seconds else None

    @property
    def overhead(self) -> float | None:
        """Time of a tree step over time of a vanilla step.

        It rests on the ratios of each vanilla step and the tree step right before it, because a
        machine's pace drifts by more within a conversation than the two kinds of step differ.
        It is never below CHEAPEST_STEP, and so no speedup exceeds the acceptance length.
        """
        if not self.tree_step_seconds or not self.vanilla_step_seconds:
            return None
        return max(self.tree_step_seconds / self.vanilla_step_seconds, CHEAPEST_STEP)

    @property
    def speedup(self) -> float | None:
        """Acceptance length / overhead: tokens per second of tree steps over vanilla steps."""
        if self.acceptance_length is None or self.overhead is None:
            return None
        return self.acceptance_length / self.overhead

    def shown_speedup(self, conversation: Stats) -> Speedup | None:
        """Return the speedup to show for this reply, or None before it can be told from noise.

        It is the reply's acceptance length over its overhead, which is the conversation's until the
        reply has REPLY_COMPARISONS of its own.
        """
        of_reply = self.comparisons >= REPLY_COMPARISONS
        source = self if of_reply else conversation
        if self.acceptance_length is None or source.overhead is None or not source.comparable:
            return None
        return Speedup(self.acceptance_length / source.overhead, source.comparisons, of_reply)

    def head_acceptance(self) -> dict[int, float]:
        """Share of each head's tested guesses that were accepted; COPIED is the last key."""
        heads = sorted(self.reached, key=lambda head: (head == COPIED, head))
        return {head: self.accepted[head] / self.reached[head] for head in heads}

    def as_json(self) -> dict[str, Any]:
        """The figures of the summary line of `--json`; null what too few comparisons support."""
        comparable = self.comparable
        figures = {
            "new_tokens": self.new_tokens,
            "steps": self.steps,
            "acceptance_length": self.acceptance_length,
            "tokens_per_second": self.tokens_per_second,
            "vanilla_tokens_per_second": self.vanilla_tokens_per_second if comparable else None,
            "overhead": self.overhead if comparable else None,
            "speedup": self.speedup if comparable else None,
            "comparisons": self.comparisons,
            "head_acceptance": {str(head): rate for head, rate in self.head_acceptance().items()},
            "paused_steps": self.paused_steps,
            "paused": asdict(self.paused) if self.paused else None,
        }
        return {key: rounded(value) for key, value in figures.items()} | {"finish": self.finish}
