"""What each step verifies: the tree in use, a better one as the conversation goes, or the root alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medusa_chat.decoding.draft.plans import RANKED
from medusa_chat.decoding.trees.accuracy import PUBLISHED, Accuracy, dynamic_tree, grow, likeliest
from medusa_chat.decoding.trees.choice import Option, StepCost, fastest, options
from medusa_chat.decoding.trees.pause import Evidence, Gate
from medusa_chat.decoding.trees.tracker import GuessTracker, OnlineAccuracy
from medusa_chat.decoding.trees.tree import AnyTree, Tree

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from medusa_chat.config import Sampling
    from medusa_chat.decoding.draft.copies import Copied
    from medusa_chat.events import Pause, Step

VANILLA = Tree()
# Tree steps before each vanilla step that the speedup is measured by: few at first, then the last number again.
PROBE_GAPS = (2, 2, 3, 4, 6, 8, 24)
RESHAPE = 32  # tree steps between two looks at the tree
WORTHWHILE = 1.005  # times the forecast of the tree in use, for another of as many nodes
CONVINCING = (
    1.05  # times the forecast speed, for another number of nodes: it must not go to and fro
)


class Policy:
    """Chooses what each step verifies. A tree that was named is obeyed; `adapt` lets measurements choose.

    Attributes:
        tree: the tree in use.
        accuracy: of the heads, with what this conversation taught.
    """

    def __init__(
        self, accuracy: Accuracy | None, heads: int, vocabulary: int, *, probing: bool
    ) -> None:
        """`probing`: take a vanilla step now and then; without, there is no speedup to judge the heads by."""
        self.tree: AnyTree = VANILLA
        self.accuracy = OnlineAccuracy(
            (accuracy or PUBLISHED).pruned(heads, min(vocabulary, RANKED))
        )
        self._calibrated, self._probing = accuracy is not None, probing
        self._listener = GuessTracker(self.accuracy)
        self._gate = Gate()
        self._costs: Mapping[str, StepCost] = {}  # by kind of tree
        self._option: Option | None = None  # what `adapt` chose; None where the tree was named
        self._vanilla = False  # whether that is what the user wants
        self._way: tuple[str, float] | None = None
        self._probes, self._since_probe, self._since_look = 0, 0, 0

    def fix(self, tree: AnyTree) -> None:
        """Use this tree, whatever is measured."""
        self.tree, self._costs, self._option = tree, {}, None
        self._measure_anew()

    def adapt(self, costs: Mapping[str, StepCost]) -> None:
        """Use the fastest tree of any of these kinds by what is known now, and go on choosing."""
        self._costs = costs
        self._use(fastest(self._options()))

    def begin(self, sampling: Sampling) -> None:
        """A reply begins. Another way of decoding accepts more or less, so what was measured does not hold for it."""
        self._listener.begin()
        self._vanilla = sampling.mode == "vanilla"
        way = (sampling.mode, sampling.temperature)
        if not self._vanilla and self._way not in (None, way):
            self._measure_anew()
        self._way = self._way if self._vanilla else way

    def next(self) -> tuple[AnyTree, Pause | None]:
        """The tree of the next step, VANILLA for the root alone; and why, where the heads rest."""
        if self._vanilla or self._gate.paused:
            return VANILLA, None if self._vanilla else self._gate.paused
        if self._probe_due():
            return VANILLA, None
        if self._costs and self._since_look >= RESHAPE:
            self._look()
        return self.tree, None

    def learn(
        self, tokens: Sequence[int], guesses: Sequence[Sequence[int]], copied: Copied | None
    ) -> None:
        """Take in what a step kept, what the heads had guessed and what was copied; see GuessTracker.hear."""
        self._listener.observe(tokens, guesses, copied)

    def forget_copies(self) -> None:
        """Nothing is copied from now on: what copies brought counts no more."""
        self._listener.gain.forget()

    def record(self, step: Step) -> None:
        """Take in the time and the tokens of a step that `next` chose."""
        if self._vanilla:
            return
        self._since_look += step.kind == "tree"
        if self._option is None:
            self._gate.evidence.add(step)
            return
        rested = self._gate.paused
        self._gate.record(step)
        if rested and not self._gate.paused:
            self._probes = self._since_probe = 0

    def _probe_due(self) -> bool:
        """Whether the next step is taken as a vanilla one. Counted over replies: short ones need no probe each."""
        if (
            not self._probing
            or self._since_probe < PROBE_GAPS[min(self._probes, len(PROBE_GAPS) - 1)]
        ):
            self._since_probe += 1
            return False
        self._probes, self._since_probe = self._probes + 1, 0
        return True

    def _look(self) -> None:
        """Exchange the tree for a better one: of as many nodes, or of another kind or number if that is much faster."""
        self._since_look = 0
        known = self._options()
        best = fastest(known)
        current = next((option for option in known if self._in_use(option)), best)
        if best.rate > CONVINCING * current.rate:
            self._use(best)
            return
        self._option = current
        if isinstance(self.tree, Tree):  # a dynamic one takes its shape anew at every step
            tree = grow(self.accuracy, current.nodes)[0]
            if self.accuracy.forecast_static(tree) > WORTHWHILE * self.accuracy.forecast_static(
                self.tree
            ):
                self.tree = tree

    def _options(self) -> list[Option]:
        """What there is to choose from, by what is known now."""
        return options(self.accuracy, self._costs, self._listener.gain.of)

    def _grown(self, option: Option) -> AnyTree:
        """The tree of an option."""
        shaped = option.kind == "static"
        return (
            grow(self.accuracy, option.nodes)[0]
            if shaped
            else dynamic_tree(self.accuracy, option.nodes)
        )

    def _in_use(self, option: Option) -> bool:
        used = self._option
        return used is not None and (used.kind, used.nodes) == (option.kind, option.nodes)

    def _use(self, option: Option) -> None:
        if not self._in_use(option):
            self._measure_anew()
        self._option, self.tree = option, self._grown(option)
        most = max(cost.most for cost in self._costs.values())
        self._listener.gain.know(likeliest(self.accuracy.frequency, self.accuracy.widths, most - 1))

    def _measure_anew(self) -> None:
        """The step costs something else now, or brings something else: what it did before is no evidence."""
        self._gate.open()
        self._probes = self._since_probe = 0

    def describe(self) -> str:
        """One line: name or kind, nodes, depth, where accuracies come from, forecast and measured speed."""
        size = f"{len(self.tree)} nodes, depth {self.tree.depth}"
        parts = [
            f"{self.tree.origin}: {size}"
            if self._option is None
            else f"auto: {self._option.kind}, {size}"
        ]
        if self._option is not None:
            taught = (
                f" and this conversation's {self.accuracy.seen} steps" if self.accuracy.seen else ""
            )
            parts.append(f"{'calibrated' if self._calibrated else 'published'} accuracies{taught}")
            speedup = self._option.rate * self._costs[self._option.kind].vanilla
            parts.append(f"forecast {self._option.length:.2f} tokens a step, {speedup:.2f}x")
        elif self._calibrated and (length := self.accuracy.forecast(self.tree)) is not None:
            parts.append(f"forecast {length:.2f} tokens a step")
        parts += _measured(self._gate.evidence)
        if self._gate.paused:
            parts.append(str(self._gate.paused))
        return "; ".join(parts)


def _measured(evidence: Evidence) -> list[str]:
    if evidence.length is None:
        return []
    speedup = f", {evidence.speedup:.2f}x" if evidence.speedup is not None else ""
    return [
        f"measured {evidence.length:.2f} tokens a step{speedup} over the last {len(evidence.lengths)} steps"
    ]
