"""Step, TrainStep: all that leaves the engine and the trainer. No torch here; stats.py adds it up."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

COPIED = (
    -1
)  # Token.head of a token that was copied from earlier text, and its place in a path of head ranks

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
class Pause:
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
        paused: set on a vanilla step that would have been a tree step if the heads paid.
    """

    tokens: tuple[Token, ...]
    nodes: int
    seconds: float
    kind: Literal["tree", "vanilla"]
    depth: int = 0
    finish: Finish | None = None
    tested: tuple[int, ...] = ()
    paused: Pause | None = None

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
        return {key: rounded(value) for key, value in asdict(self).items()}


def rounded(value: Any) -> Any:
    """A figure of a JSON line in five digits; the figures in a tuple or a mapping."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, tuple):
        return [rounded(item) for item in value]
    return {key: rounded(item) for key, item in value.items()} if isinstance(value, dict) else value
