"""Switch trees, copies and accuracies of an engine, and measure what its steps cost."""

from __future__ import annotations

from copy import copy, deepcopy
from typing import TYPE_CHECKING

from medusa_chat.config import MAX_NODES, LoadOptions, UserError
from medusa_chat.decoding.draft.base import RANKED
from medusa_chat.decoding.draft.copies import CHAIN, Copies
from medusa_chat.decoding.trees.accuracy import PUBLISHED, Accuracy
from medusa_chat.decoding.trees.bookkeeping import Bookkeeping
from medusa_chat.decoding.trees.costs import step_costs
from medusa_chat.decoding.trees.growth import shaped_tree
from medusa_chat.decoding.trees.policy import COPIES_ALONE, VANILLA, Policy
from medusa_chat.decoding.trees.tree import AnyTree, paper_trees

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from medusa_chat.decoding.runner import Runner
    from medusa_chat.decoding.trees.choice import StepCost
    from medusa_chat.sampling import Mode, Sampling

SPECULATIVE: tuple[Mode, ...] = ("greedy", "typical", "exact")
SIZES = (8, 16, 32, 64)  # of the trees that completion offers


class TreeControl:
    """The trees of one engine.

    Attributes:
        policy: chooses what each step verifies, in the mode of the last reply.
        accuracy: how often the heads are right, or None if these heads are not calibrated.
    """

    def __init__(
        self,
        runner: Runner,
        name: str,
        accuracy: Accuracy | None,
        options: LoadOptions,
        costs: Path | None,
        notices: list[str],
    ) -> None:
        """Use the tree that the options name.

        Args:
            runner: takes the steps; its cache must be empty.
            name: the model's name.
            accuracy: as measured with these heads.
            options: tree, copies and probing.
            costs: folder that keeps step costs from one run to the next.
            notices: takes messages for the user.
        """
        self.accuracy = accuracy
        self._runner = runner
        self._name = name
        self._folder = costs
        self._notices = notices
        self._costs: dict[bool, dict[str, StepCost]] = {}  # with copies or without, by kind of tree
        copies = Copies()
        bookkeeping = Bookkeeping(hidden=runner.overlaps)
        # A rank means another thing where guesses are coupled to noise, and another mode accepts
        # more or fewer of them.
        self._policies = {
            mode: Policy(
                self._ranked_accuracy(mode),
                calibrated=accuracy is not None,
                probing=options.probing,
                copying=options.copies,
                copies=copies,
                bookkeeping=bookkeeping,
            )
            for mode in SPECULATIVE
        }
        self.policy = self._policies["greedy"]
        self.use(options.tree)

    def begin(self, sampling: Sampling) -> None:
        """Begin a reply: the policy of its mode chooses from here on."""
        mode: Mode = "greedy" if sampling.greedy else sampling.mode
        self.policy = self._policies.get(mode, self.policy)
        self.policy.begin(sampling)

    def separate(self) -> TreeControl:
        """Return a copy that learns and switches on its own."""
        mode = next(mode for mode, policy in self._policies.items() if policy is self.policy)
        other = copy(self)
        other._policies = deepcopy(self._policies)
        other.policy = other._policies[mode]
        return other

    @property
    def current(self) -> AnyTree:
        """The tree in use."""
        return self.policy.tree

    @property
    def copies(self) -> bool:
        """True if steps propose copied text too."""
        return self.policy.copying

    def use(self, tree: str | AnyTree) -> None:
        """Switch to another tree.

        Args:
            tree: auto, retune (auto, with steps timed anew), dynamic-N, static-N, chain-N, the name
                of a released tree, a JSON file, or a tree itself.

        Raises:
            UserError: there is no such tree, or the heads cannot fill it.
        """
        if tree in ("auto", "retune"):
            self._use_auto(anew=tree == "retune")
        elif self._runner.heads is None:
            raise UserError(f"{self._name} has no Medusa heads to fill a tree")
        else:
            fitting = {mode: self._fitting(tree, mode) for mode in self._policies}
            self._check(tree, fitting["greedy"])
            self._fix(fitting)

    def use_copies(self, on: bool) -> None:
        """Propose copied text from now on, or no longer."""
        if on == self.copies:
            return
        for policy in self._policies.values():
            policy.use_copies(on)
        if self.policy.adapts or self._runner.heads is None:
            self._use_auto()  # steps with copies cost more than steps without

    def use_accuracy(self, accuracy: Accuracy) -> None:
        """Replace the figures for how often the heads are right; the tree in use stays."""
        self.accuracy = accuracy
        self._runner.trust(accuracy)
        for mode, policy in self._policies.items():
            policy.use_accuracy(self._ranked_accuracy(mode), calibrated=True)
            policy.fix(policy.tree)

    def describe(self) -> str:
        """Describe the tree in use in one line."""
        if self.current is VANILLA:
            return "no tree: the model has no Medusa heads"
        if self.current is COPIES_ALONE:
            return f"copied text only, {CHAIN} tokens at once: the model has no Medusa heads"
        return self.policy.describe() + ("; with copies" if self.copies else "")

    def names(self) -> list[str]:
        """List the names that `use` takes."""
        if not self._heads:
            return ["auto"]
        chains = [f"chain-{depth}" for depth in range(1, self._heads + 1)]
        dynamic = [f"dynamic-{nodes}" for nodes in SIZES]
        static = [f"static-{nodes}" for nodes in SIZES]
        return ["auto", *chains, *dynamic, *static, *paper_trees(), "retune"]

    @property
    def _heads(self) -> int:
        return self._runner.heads.heads if self._runner.heads else 0

    def _known_accuracy(self) -> Accuracy:
        accuracy = self.accuracy or PUBLISHED
        return accuracy.pruned(self._heads, self._runner.backbone.vocabulary)

    def _ranked_accuracy(self, mode: Mode) -> Accuracy:
        """Prune to the guesses that a step reports: the conversation teaches about no others."""
        known = self._known_accuracy().pruned(self._heads, RANKED)
        return known.of_guesses(coupled=mode == "exact")

    def _fix(self, trees: Mapping[Mode, AnyTree]) -> None:
        for mode, policy in self._policies.items():
            policy.fix(trees[mode])

    def _use_auto(self, *, anew: bool = False) -> None:
        if self._runner.heads is None:
            self._fix(dict.fromkeys(SPECULATIVE, COPIES_ALONE if self.copies else VANILLA))
            return
        if self.accuracy is None:
            self._notices.append(
                "these heads are not calibrated: auto uses published accuracies;"
                " see `medusa-chat calibrate`"
            )
        costs = self._step_costs(anew=anew)
        for policy in self._policies.values():
            policy.adapt(costs)

    def _step_costs(self, *, anew: bool) -> dict[str, StepCost]:
        """Step costs by the kind of tree: known from earlier, or measured now."""
        copies = self.copies
        if anew or copies not in self._costs:
            self._runner.cache.rewind(0)
            self._costs[copies] = step_costs(
                self._runner, self._name, self._known_accuracy(), copies, self._folder, anew=anew
            )
        return self._costs[copies]

    def _fitting(self, tree: str | AnyTree, mode: Mode) -> AnyTree:
        """The part of a tree that these heads can fill."""
        wanted = self._named(tree, mode) if isinstance(tree, str) else tree
        return wanted.pruned(self._heads, self._runner.backbone.vocabulary)

    def _named(self, name: str, mode: Mode) -> AnyTree:
        accuracy = self._known_accuracy().of_guesses(coupled=mode == "exact")
        return shaped_tree(name, accuracy)

    def _check(self, tree: str | AnyTree, fitting: AnyTree) -> None:
        """Say if a tree had to be pruned; raises UserError if nothing is left, or too much."""
        wanted = self._named(tree, "greedy") if isinstance(tree, str) else tree
        if len(fitting) < len(wanted):
            self._notices.append(
                f"tree {wanted.origin} was pruned from {len(wanted)} nodes to {len(fitting)}:"
                f" it is {wanted.depth} deep and {wanted.width} wide,"
                f" {self._name} has {self._heads} heads over"
                f" {self._runner.backbone.vocabulary} tokens"
            )
        if not 1 < len(fitting) <= MAX_NODES:
            raise UserError(
                f"tree {wanted.origin} has {len(fitting) - 1} guesses;"
                f" 1 to {MAX_NODES - 1} are possible"
            )
