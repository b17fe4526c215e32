"""Step and TrainStep: the events that leave the engine and the trainer. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

COPIED = -1  # in Token.head and in a path of head ranks: copied from earlier text

Finish = Literal["eos", "length", "stop", "context", "loop"]
StepKind = Literal["tree", "vanilla"]


@dataclass(frozen=True)
class Token:
    """One token of a reply.

    Attributes:
        text: visible text that it adds; empty while a character or a stop string is incomplete.
        head: its proposer: 0 is the backbone's LM head, k is Medusa head k, COPIED earlier text.
    """

    id: int
    text: str
    head: int


@dataclass(frozen=True)
class Pause:
    """Why the heads are not in use: they made decoding slower than vanilla.

    Attributes:
        speedup: as measured over the last `steps` tree steps.
        retry_in: tokens until the heads are used again.
    """

    speedup: float
    steps: int
    retry_in: int

    def __str__(self) -> str:
        return f"heads are slower here ({self.speedup:.2f}x): off for {self.retry_in} tokens"


@dataclass(frozen=True)
class Step:
    """One forward of the backbone, and the tokens that it added to the reply.

    The first token is the root, which the backbone chose one forward earlier; the others are
    accepted guesses. A second token with head 0 comes last: it closes the reply and needed no
    forward of its own.

    Attributes:
        nodes: rows of the forward, the root included; 0 if the step needed no forward.
        seconds: time inside the engine, without prefill and without the consumer's time.
        depth: depth of the verified tree; 0 for a vanilla step.
        finish: why the reply ended with this step, else None.
        tested: the proposers of the guesses that followed a token of this step. A head is in it
            once, COPIED once for every depth.
        paused: why this is a vanilla step, if the heads are paused.
    """

    tokens: tuple[Token, ...]
    nodes: int
    seconds: float
    kind: StepKind
    depth: int = 0
    finish: Finish | None = None
    tested: tuple[int, ...] = ()
    paused: Pause | None = None

    @property
    def text(self) -> str:
        """Visible text that the step adds."""
        return "".join(token.text for token in self.tokens)

    @property
    def settled(self) -> int:
        """Tokens that this step's own forward paid for: all but a closing token."""
        closing = len(self.tokens) > 1 and self.tokens[-1].head == 0
        return len(self.tokens) - closing if self.nodes else 0

    @property
    def accepted(self) -> int:
        """Accepted guesses: the depth of the accepted path."""
        return max(self.settled - 1, 0)

    def as_json(self) -> dict[str, Any]:
        """The step line of `--json`."""
        return {"type": "step", **asdict(self)}


def proposer(path: tuple[int, ...]) -> int:
    """The proposer of a path's last guess, as in Token.head."""
    return COPIED if path and path[-1] == COPIED else len(path)


@dataclass(frozen=True)
class Candidates:
    """The candidate tree of a step, as `/tree` draws it.

    Attributes:
        paths: each node's path of head ranks, COPIED for a copied guess; the root's is empty.
        texts: each node's token as text.
        accepted: rows of the accepted path, root first.
    """

    paths: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    accepted: tuple[int, ...]


@dataclass(frozen=True)
class TrainStep:
    """Progress of training: means over the steps since the last event.

    Attributes:
        loss: the minimized loss.
        backbone_loss: the backbone's part of it; None while the backbone is frozen.
        head_loss: cross entropy of each head.
        top1: share of each head's likeliest guesses that are right.
        top5: share of each head's five likeliest guesses that include the right one.
        heads_weight: lambda_0 at this step.
        seconds_left: at the pace so far.
        memory: peak bytes of the GPU, or of the process if there is no GPU.
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
    """Round the figures of a JSON value to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, tuple):
        return [rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return value
