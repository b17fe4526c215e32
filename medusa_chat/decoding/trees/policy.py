"""Choose what each step verifies: a tree, copied text, or the root alone. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from medusa_chat.decoding.draft.copies import CHAIN, Copied, Copies
from medusa_chat.decoding.trees.bookkeeping import Bookkeeping
from medusa_chat.decoding.trees.choice import Option, StepCost, fastest, options
from medusa_chat.decoding.trees.growth import grow, likeliest, tree_of
from medusa_chat.decoding.trees.pause import PauseRule
from medusa_chat.decoding.trees.tracker import GuessTracker, OnlineAccuracy
from medusa_chat.decoding.trees.tree import AnyTree, DynamicTree, Tree

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from medusa_chat.decoding.report import StepReport
    from medusa_chat.decoding.trees.accuracy import Accuracy
    from medusa_chat.events import Pause, Step
    from medusa_chat.sampling import Sampling
    from medusa_chat.stats import Stats

VANILLA = Tree()
COPIES_ALONE = DynamicTree(VANILLA, 1 + CHAIN)  # for a model without heads
LEAST_PROMISE = 1.5  # tokens that a step of copies alone must promise; else it is a vanilla step
RESHAPE = 64  # tree steps between two choices of the tree
BETTER_SHAPE = 1.005  # least gain in acceptance length for another tree of as many nodes
MUCH_FASTER = 1.05  # least gain in speed for another kind or size, so that they do not alternate


@dataclass(frozen=True)
class Choice:
    """The choice for one step.

    Attributes:
        tree: the tree to verify; VANILLA for a vanilla step.
        copied: copied tokens that compete with the heads' guesses for the tree's nodes.
        pause: the pause that makes this a vanilla step.
    """

    tree: AnyTree
    copied: Copied | None = None
    pause: Pause | None = None


class Policy:
    """Chooses what each step of one mode verifies, and learns from its result.

    A named tree stays (`fix`); with `adapt`, measurements choose the tree and may pause the heads.

    Attributes:
        tree: the tree in use.
        copying: propose copied text too.
        copies: the text that is copied from, and how often copies were right.
        bookkeeping: time that steps take beside their forward.
        accuracy: the heads' accuracies, updated by this conversation.
    """

    def __init__(
        self,
        accuracy: Accuracy,
        *,
        calibrated: bool,
        probing: bool = True,
        copying: bool = True,
        copies: Copies | None = None,
        bookkeeping: Bookkeeping | None = None,
    ) -> None:
        """Start with vanilla steps.

        Args:
            accuracy: how often the heads' guesses are right, for as many heads as there are.
            calibrated: the accuracies were measured with these heads.
            probing: take vanilla steps now and then, to measure the speedup.
            copying: propose copied text too.
            copies: an index to share with other policies of the text.
            bookkeeping: figures to share with them.
        """
        self.tree: AnyTree = VANILLA
        self.copying = copying
        self.copies = copies or Copies()
        self.bookkeeping = bookkeeping or Bookkeeping()
        self._copied: Copied | None = None  # of the last choice
        self._pauses = PauseRule(probing=probing)
        self._costs: Mapping[str, StepCost] = {}  # by kind of tree
        self._option: Option | None = None  # the choice of `adapt`
        self._vanilla = False  # the user's own choice
        self._sampled: tuple[str, float] | None = None  # mode and temperature of the last reply
        self._since_reshape = 0
        self.use_accuracy(accuracy, calibrated=calibrated)

    def use_accuracy(self, accuracy: Accuracy, *, calibrated: bool) -> None:
        """Replace the accuracies, and all that this conversation taught about them."""
        self.accuracy = OnlineAccuracy(accuracy)
        self._calibrated = calibrated
        self._tracker = GuessTracker(self.accuracy)

    def use_copies(self, on: bool) -> None:
        """Propose copied text from now on, or no longer."""
        self.copying = on
        if not on:
            self._tracker.gain.forget()

    def fix(self, tree: AnyTree) -> None:
        """Use this tree, whatever is measured."""
        self.tree = tree
        self._costs = {}
        self._option = None
        self._pauses.restart()

    def adapt(self, costs: Mapping[str, StepCost]) -> None:
        """Use the fastest tree of these kinds as far as is known now, and keep choosing."""
        self._costs = costs
        self._use(fastest(self._options()))

    @property
    def adapts(self) -> bool:
        """True if measurements choose the tree."""
        return self._option is not None

    def begin(self, sampling: Sampling) -> None:
        """Begin a reply.

        Another mode or temperature accepts more or fewer guesses, so the speedup is measured anew.
        """
        self._tracker.begin()
        self._vanilla = sampling.mode == "vanilla"
        if self._vanilla:
            return
        sampled = (sampling.mode, sampling.temperature)
        if self._sampled not in (None, sampled):
            self._pauses.restart()
        self._sampled = sampled

    def rewind(self, length: int) -> None:
        """Cut the text that copies are taken from to its first `length` tokens."""
        self.copies.rewind(length)

    def next(self, text: Sequence[int], root: int) -> Choice:
        """Choose what the next step verifies.

        Args:
            text: the tokens of prompt and reply so far.
            root: the token after them, the first of the step.
        """
        self._copied = None
        tree = self._next_tree()
        if tree is VANILLA:
            return Choice(VANILLA, pause=None if self._vanilla else self._pauses.pause)
        if self.copying:
            self.copies.extend([*text[len(self.copies) :], root])
            self._copied = self.copies.propose()
        if tree is COPIES_ALONE and (not self._copied or self._copied.promise < LEAST_PROMISE):
            return Choice(VANILLA)
        return Choice(tree, self._copied)

    def learn(self, report: StepReport, step: Step) -> None:
        """Take in the result of the last choice.

        Args:
            report: the tokens of the nodes, the accepted path and the heads' guesses.
            step: the tokens that the reply kept, and the time that the step took.
        """
        if self._vanilla:
            return
        if self._copied:
            self.copies.learn(self._copied, [*report.tokens[1:], report.next])
        kept = [token.id for token in step.tokens[: step.settled]]
        self._tracker.observe(kept, report.read_guesses, self._copied)
        self._since_reshape += step.kind == "tree"
        self._pauses.add(step, may_pause=self.adapts)

    def _next_tree(self) -> AnyTree:
        if self._vanilla or self._pauses.pause or self._pauses.probe_due():
            return VANILLA
        if self.adapts and self._since_reshape >= RESHAPE:
            self._reshape()
        return self.tree

    def _reshape(self) -> None:
        """Exchange the tree for a better one of as many nodes, or for a much faster one."""
        self._since_reshape = 0
        known = self._options()
        best = fastest(known)
        current = next((option for option in known if self._in_use(option)), best)
        if best.rate > MUCH_FASTER * current.rate:
            self._use(best)
            return
        self._option = current
        if isinstance(self.tree, Tree):  # a dynamic tree takes another shape at every step anyway
            tree = grow(self.accuracy, current.nodes)[0]
            forecast = self.accuracy.forecast_static
            if forecast(tree) > BETTER_SHAPE * forecast(self.tree):
                self.tree = tree

    def _options(self) -> list[Option]:
        beside = self.bookkeeping.of("tree")
        return options(self.accuracy, self._costs, self._tracker.gain.of, beside)

    def _in_use(self, option: Option) -> bool:
        used = self._option
        return used is not None and (used.kind, used.nodes) == (option.kind, option.nodes)

    def _use(self, option: Option) -> None:
        if not self._in_use(option):
            self._pauses.restart()
        self._option = option
        self.tree = tree_of(option.kind, self.accuracy, option.nodes)
        most = max(cost.most for cost in self._costs.values())
        paths = likeliest(self.accuracy.frequency, self.accuracy.widths, most - 1)
        self._tracker.gain.set_paths(paths)

    def describe(self) -> str:
        """Describe the tree in one line: its size, the expected speed and the measured one."""
        size = f"{len(self.tree)} nodes, depth {self.tree.depth}"
        if self._option is None:
            parts = [f"{self.tree.origin}: {size}"]
            expected = self.accuracy.forecast(self.tree) if self._calibrated else None
            pace = ""
        else:
            parts = [f"auto: {self._option.kind}, {size}", self._source()]
            expected = self._option.length
            vanilla = self._costs[self._option.kind].vanilla + self.bookkeeping.of("vanilla")
            pace = f" ({_pace(self._option.rate * vanilla)})"
        if expected is not None:
            parts.append(f"expected {expected:.1f} tokens per step{pace}")
        got = self._pauses.stats
        if got.acceptance_length is not None:
            unit = " tokens per step" if expected is None else ""
            parts.append(f"got {got.acceptance_length:.1f}{unit} ({_window(got)})")
        if self._pauses.pause:
            parts.append(str(self._pauses.pause))
        return "; ".join(parts)

    def _source(self) -> str:
        source = "calibrated accuracies" if self._calibrated else "published accuracies"
        if self.accuracy.seen:
            return f"{source} and {self.accuracy.seen} steps of this conversation"
        return source


def _window(stats: Stats) -> str:
    steps = f"last {stats.tree_steps} steps"
    return steps if stats.speedup is None else f"{_pace(stats.speedup)}, {steps}"


def _pace(speedup: float) -> str:
    return f"{speedup:.1f}x faster" if speedup >= 1 else f"slower, {speedup:.2f}x"
