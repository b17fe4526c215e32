"""What leaves the engine, and how it adds up: the one definition of every figure that is shown. No torch here."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal, Protocol

from medusa_chat.config import Message, Sampling

COPIED = -1  # Token.head of a token that was copied from earlier text, and its place in a path of head ranks
TIMED_STEPS = 256  # medians are taken over the last so many steps of a kind

Finish = Literal["eos", "length", "stop", "context"]


@dataclass(frozen=True)
class Token:
    """One token of a reply.

    Attributes:
        text: what it adds to the visible text; empty while a character or a stop string is incomplete.
        head: who proposed it: 0 the backbone's LM head, k Medusa head k, COPIED earlier text.
    """

    id: int
    text: str
    head: int


@dataclass(frozen=True)
class Gated:
    """Why a mode with heads decodes vanilla for now: they did not pay.

    Attributes:
        speedup: what was measured over the last `steps` tree steps.
        retry_in: tokens until the heads are tried again.
    """

    speedup: float
    steps: int
    retry_in: int

    def __str__(self) -> str:
        return (
            f"heads do not pay here: {self.speedup:.2f}x over the last {self.steps} steps; decoding vanilla,"
            f" trying again in {self.retry_in} tokens"
        )


@dataclass(frozen=True)
class Step:
    """One forward of the backbone and the tokens that it settled.

    The first token is the root, which the backbone itself chose one forward earlier; the others are accepted
    guesses. A last token with head 0 behind the root closes the reply and needed no forward of its own.

    Attributes:
        nodes: rows of the forward, the root included; 0 if the step needed no forward at all.
        seconds: time inside the engine, without that of its consumer and without prefill.
        depth: depth of the tree that was verified (0 for a vanilla step).
        finish: why the reply ended with this step, else None.
        tested: the heads, or COPIED, whose guesses were put to the test: they stood behind a token of this step. A head
            is in it once, COPIED once for every depth.
        gated: set on a vanilla step that would have been a tree step if the heads paid.
    """

    tokens: tuple[Token, ...]
    nodes: int
    seconds: float
    kind: Literal["tree", "vanilla"]
    depth: int = 0
    finish: Finish | None = None
    tested: tuple[int, ...] = ()
    gated: Gated | None = None

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def settled(self) -> int:
        """Tokens that this step's own forward paid for: all but a closing token."""
        closing = len(self.tokens) > 1 and self.tokens[-1].head == 0
        return len(self.tokens) - closing if self.nodes else 0

    @property
    def accepted(self) -> int:
        """Accepted guesses: the depth reached in the tree."""
        return max(self.settled - 1, 0)

    def as_json(self) -> dict[str, Any]:
        """The step line of `--json`."""
        return {"type": "step", **asdict(self)}


def proposer(path: tuple[int, ...]) -> int:
    """Who made the last guess of a candidate's path, as Token.head says it."""
    return COPIED if path and path[-1] == COPIED else len(path)


@dataclass(frozen=True)
class Candidates:
    """The candidate tree of a step, as `/tree` draws it.

    Attributes:
        paths: node i's path of head ranks, COPIED for a copied guess; the root's is empty.
        texts: node i's token as text.
        accepted: rows on the accepted path, root first.
    """

    paths: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    accepted: tuple[int, ...]


@dataclass(frozen=True)
class TrainStep:
    """Progress of training: means over the steps since the one before.

    Attributes:
        loss: what is minimized; backbone_loss: its part for the backbone, None while that is frozen.
        head_loss, top1, top5: per head its cross entropy, and how often its likeliest guess, and one of its five
            likeliest, is right.
        heads_weight: lambda_0 at this step.
        seconds_left: at the pace so far; memory: peak bytes, of the GPU where there is one, else of the process.
    """

    step: int
    total: int
    loss: float
    backbone_loss: float | None = None
    head_loss: tuple[float, ...] = ()
    top1: tuple[float, ...] = ()
    top5: tuple[float, ...] = ()
    heads_weight: float = 1.0
    learning_rates: tuple[float, ...] = ()
    tokens_per_second: float = 0.0
    seconds_left: float = 0.0
    memory: int = 0

    def as_json(self) -> dict[str, Any]:
        """A line of the log."""
        return {key: _rounded(value) for key, value in asdict(self).items()}


@dataclass
class Stats:
    """A fold of Steps: of one reply, of a conversation, of a benchmark.

    Steps that are gated count as vanilla steps but not in the comparison: speedup is what the heads bring where they
    are used, and tokens_per_second what all steps together gave.

    Attributes:
        gated: of the last step: why the heads are not in use.
    """

    new_tokens: int = 0
    seconds: float = 0.0
    tree_steps: int = 0
    tree_tokens: int = 0
    vanilla_steps: int = 0
    gated_steps: int = 0
    finish: Finish | None = None
    gated: Gated | None = None
    reached: Counter[int] = field(default_factory=Counter)  # head -> steps that put its guess to the test
    accepted: Counter[int] = field(default_factory=Counter)  # head -> its guesses that were accepted
    _tree_times: deque[float] = field(default_factory=lambda: deque(maxlen=TIMED_STEPS), repr=False)
    _vanilla_times: deque[float] = field(default_factory=lambda: deque(maxlen=TIMED_STEPS), repr=False)
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
        self.gated = step.gated
        before, self._before = self._before, None if step.finish else step
        if step.kind == "vanilla":
            self.vanilla_steps += 1
            if step.gated:
                self.gated_steps += 1
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
            "gated_steps": self.gated_steps,
            "gated": asdict(self.gated) if self.gated else None,
        }
        return {key: _rounded(value) for key, value in figures.items()} | {"finish": self.finish}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, tuple):
        return [_rounded(item) for item in value]
    return {key: _rounded(item) for key, item in value.items()} if isinstance(value, dict) else value


class ChatEngine(Protocol):
    """What the terminal asks of an engine. `medusa_chat.decoding.engine.Engine` is the one that decodes."""

    name: str  # of the model
    prefilled: int  # prompt tokens that the last reply had to prefill; the rest came from the cache
    prefill_seconds: float  # time that this took
    context: int  # tokens that prompt and reply may hold together
    system: str  # the model's default system prompt, maybe empty
    copies: bool  # whether guesses are copied from the conversation too
    notices: list[str]  # what the user should be told once, such as a pruned tree; drained by the reader

    def generate(self, prompt: list[int] | list[Message], sampling: Sampling) -> Iterator[Step]:
        """Decode a reply; may be closed at any time. Raises UserError for a prompt that does not fit."""

    @property
    def heads(self) -> int:
        """Medusa heads; 0 if the model has none."""

    @property
    def tokens_in_context(self) -> int:
        """Tokens that the cache holds now."""

    def candidates(self) -> Candidates | None:
        """The tree of the last tree step, or None before the first."""

    def describe_tree(self) -> str:
        """One line: kind, nodes, depth, where the accuracies come from, forecast and measured acceptance length."""

    def use_tree(self, name: str) -> None:
        """Switch to `auto`, `retune` (auto, with steps timed anew), a tree by name, or a JSON file.

        Raises UserError.
        """

    def use_copies(self, on: bool) -> None:
        """Whether to copy guesses from the conversation from now on."""

    def tree_names(self) -> list[str]:
        """Names that use_tree takes."""
