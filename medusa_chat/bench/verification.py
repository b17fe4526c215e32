"""`medusa-chat verify`: compare the text of every mode with vanilla decoding."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from medusa_chat.bench.near_ties import peer_gap, score_gap
from medusa_chat.bench.peers import TransformersPeer
from medusa_chat.config import UserError
from medusa_chat.decoding.trees.growth import dynamic_tree
from medusa_chat.decoding.trees.tree import AnyTree, Tree, chain, named_tree, paper_trees
from medusa_chat.text import common_prefix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from medusa_chat.decoding.engine import Engine
    from medusa_chat.prompts import Prompt
    from medusa_chat.sampling import Sampling

# Temperature and top-p of the exact mode.
SAMPLINGS = ((0.3, 1.0), (0.3, 0.9), (0.7, 1.0), (0.7, 0.9), (1.0, 1.0), (1.0, 0.9))
# Checked in some ways, unless the user gives penalties, which then hold in all.
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.2,
}
# Trees that greedy mode is also checked in with copies.
WITH_COPIES = ("auto", "mc_sim_7b_63", "random-12", "dynamic-16", "dynamic-64")


@dataclass
class Comparison:
    """Replies of one mode and tree compared with their references.

    Attributes:
        near_ties: replies whose first difference rounding explains.
        faults: replies whose first difference it does not.
        largest_gap: largest gap between the scores of two tokens that differed.
        first_fault: description of the first fault.
    """

    name: str
    replies: int = 0
    equal: int = 0
    near_ties: int = 0
    faults: int = 0
    largest_gap: float = 0.0
    first_fault: str = ""

    def add(
        self,
        engine: Engine,
        prompt: list[int],
        reference: list[int],
        found: list[int],
        sampling: Sampling,
        peer: TransformersPeer | None = None,
    ) -> None:
        """Compare one reply with its reference, ids with ids.

        Steps of the native library are the same row by row, so that between two replies of theirs
        no difference is a near-tie.

        Args:
            engine: gave the reply.
            prompt: what was answered.
            reference: the expected reply.
            found: the reply.
            sampling: of both.
            peer: gave the reference, if not the engine itself.
        """
        self.replies += 1
        if reference == found:
            self.equal += 1
            return
        place = common_prefix(reference, found)
        gap = float("inf")
        limit = 0.0
        if place < min(len(reference), len(found)):
            same = reference[:place]
            pair = reference[place], found[place]
            if engine.backbone.native is None:
                gap, limit = score_gap(engine, prompt, same, *pair, sampling)
            elif peer is not None:
                gap, limit = peer_gap(peer.model, prompt, same, *pair, sampling)
        self.largest_gap = max(self.largest_gap, gap)
        if gap <= limit:
            self.near_ties += 1
            return
        self.faults += 1
        if not self.first_fault:
            end = engine.tokenizer.decode((prompt + reference)[-12:])
            self.first_fault = f"after {end!r}: token {place} differs, gap {gap:.3g}"


def verify(
    engine: Engine,
    prompts: list[Prompt],
    sampling: Sampling,
    *,
    turns: int,
    progress: Callable[[int, int], None],
) -> list[Comparison]:
    """Check that fast modes give the text of vanilla decoding, and vanilla that of transformers.

    Greedy mode must equal vanilla in every tree, and exact mode vanilla sampling with the same
    seed for every entry of SAMPLINGS. Penalties are checked in a few of these ways.

    Args:
        engine: the model.
        prompts: conversations to answer.
        sampling: length of the replies, and the seed of the random trees.
        turns: first turns of each conversation to answer.
        progress: called with (done, total) after each prompt.

    Raises:
        UserError: no prompt fits into the context, so that nothing was compared.
    """
    check = _Check(engine, sampling)
    for done, prompt in enumerate(prompts, 1):
        for ids in _histories(engine, prompt, turns):
            check.greedy(ids)
            check.exact(ids, seed=done)
            if not sampling.penalized:
                check.penalized(ids, seed=done)
        progress(done, len(prompts))
    if not check.comparisons:
        raise UserError(
            f"nothing is verified: none of the {len(prompts)} prompts fits into the"
            f" {engine.context} tokens of {engine.name}"
        )
    return list(check.comparisons.values())


@dataclass
class _Check:
    """The comparisons of one engine."""

    engine: Engine
    sampling: Sampling
    comparisons: dict[str, Comparison] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trees = trees_to_check(self.engine, self.sampling.seed)
        native = self.engine.backbone.native
        # The native step's own int8 and nf4 weights differ from those of bitsandbytes.
        comparable = native is None or native.weights in ("bfloat16", "float32")
        self.peer = TransformersPeer(self.engine) if comparable else None

    def greedy(self, ids: list[int]) -> None:
        """Compare vanilla with transformers' generate(), and greedy with vanilla in every tree."""
        plain = replace(self.sampling, mode="greedy")
        vanilla = self._vanilla(ids, plain)
        self._generated(ids, vanilla, plain)
        for name, tree in self.trees.items():
            found = self._reply(ids, plain, tree)
            self._compare(f"greedy, {name}", ids, vanilla, found, plain)
            if name in WITH_COPIES:
                found = self._reply(ids, plain, tree, copies=True)
                self._compare(f"greedy, {name}, copies", ids, vanilla, found, plain)

    def exact(self, ids: list[int], seed: int) -> None:
        """Compare exact mode with vanilla sampling: a fixed tree, and a dynamic one with copies."""
        for temperature, top_p in SAMPLINGS:
            drawn = replace(
                self.sampling, mode="exact", temperature=temperature, top_p=top_p, seed=seed
            )
            vanilla = self._vanilla(ids, drawn)
            settings = f"T={temperature}, top-p={top_p}"
            found = self._reply(ids, drawn, self.trees["auto"])
            self._compare(f"exact, auto, {settings}", ids, vanilla, found, drawn)
            found = self._reply(ids, drawn, self.trees["dynamic-16"], copies=True)
            self._compare(f"exact, dynamic-16, copies, {settings}", ids, vanilla, found, drawn)

    def penalized(self, ids: list[int], seed: int) -> None:
        """Check that penalties hold per node along its own path, in greedy and exact mode."""
        greedy = replace(self.sampling, mode="greedy", **PENALTIES)
        vanilla = self._vanilla(ids, greedy)
        self._generated(ids, vanilla, greedy, ", penalties")
        found = self._reply(ids, greedy, self.trees["auto"])
        self._compare("greedy, auto, penalties", ids, vanilla, found, greedy)
        tree = self.trees["dynamic-64"]
        found = self._reply(ids, greedy, tree, copies=True)
        self._compare("greedy, dynamic-64, copies, penalties", ids, vanilla, found, greedy)
        drawn = replace(greedy, mode="exact", temperature=0.7, seed=seed)
        vanilla = self._vanilla(ids, drawn)
        found = self._reply(ids, drawn, tree, copies=True)
        self._compare("exact, dynamic-64, copies, penalties", ids, vanilla, found, drawn)

    def _generated(
        self, ids: list[int], vanilla: list[int], sampling: Sampling, note: str = ""
    ) -> None:
        """Compare a vanilla reply with transformers' generate()."""
        if self.peer is None:
            return
        # The engine ends a reply where its context ends.
        longest = min(sampling.max_new_tokens, self.engine.context - len(ids))
        expected = self.peer.generate(ids, longest, sampling)
        self._compare(f"vanilla, generate(){note}", ids, expected, vanilla, sampling, self.peer)

    def _compare(
        self,
        name: str,
        ids: list[int],
        reference: list[int],
        found: list[int],
        sampling: Sampling,
        peer: TransformersPeer | None = None,
    ) -> None:
        comparison = self.comparisons.setdefault(name, Comparison(name))
        comparison.add(self.engine, ids, reference, found, sampling, peer)

    def _vanilla(self, prompt: list[int], sampling: Sampling) -> list[int]:
        """Return the reply of vanilla decoding, which samples if the given mode does."""
        temperature = 0.0 if sampling.greedy else sampling.temperature
        vanilla = replace(sampling, mode="vanilla", temperature=temperature)
        return self._reply(prompt, vanilla, self.engine.trees.current)

    def _reply(
        self, prompt: list[int], sampling: Sampling, tree: AnyTree, *, copies: bool = False
    ) -> list[int]:
        engine = self.engine
        engine.trees.use(tree)
        engine.trees.use_copies(copies)
        engine.notices.clear()
        return [token.id for step in engine.generate(prompt, sampling) for token in step.tokens]


def trees_to_check(engine: Engine, seed: int) -> dict[str, AnyTree]:
    """The trees of a check by name.

    They are the engine's own, every released one, a chain, two random and two dynamic ones.
    """
    rng = random.Random(seed)
    named: dict[str, AnyTree] = {"auto": engine.trees.current}
    named |= {name: named_tree(name) for name in paper_trees()}
    named[f"chain-{engine.heads}"] = chain(engine.heads)
    for nodes in (12, 40):
        named[f"random-{nodes}"] = random_tree(rng, nodes, engine.heads, 10)
    accuracy = engine.runner.accuracy.pruned(engine.heads, engine.backbone.vocabulary)
    return named | {f"dynamic-{nodes}": dynamic_tree(accuracy, nodes) for nodes in (16, 64)}


def random_tree(rng: random.Random, nodes: int, depth: int, width: int) -> Tree:
    """A random prefix-closed tree."""
    paths: set[tuple[int, ...]] = set()
    while len(paths) < nodes:
        parent = rng.choice([(), *sorted(path for path in paths if len(path) < depth)])
        paths.add((*parent, rng.randrange(width)))
    return Tree.of(paths, f"random-{nodes}")


def _histories(engine: Engine, prompt: Prompt, turns: int) -> Iterator[list[int]]:
    """Ids of the conversation before each of the first replies, with the answers in the file."""
    messages = prompt.reference or prompt.opening()
    asked = [i for i, message in enumerate(messages) if message["role"] == "user"][:turns]
    for i in asked:
        ids = engine.encode(list(messages[: i + 1]))
        if len(ids) + 1 < engine.context:
            yield ids
