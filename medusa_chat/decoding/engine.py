"""Engine: one conversation's text, its cache across turns, and replies as a stream of Steps."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from medusa_chat.config import MAX_CONTEXT, MAX_NODES, Message, Sampling, UserError
from medusa_chat.decoding.acceptance import Rule, make_rule
from medusa_chat.decoding.draft.copies import CHAIN, Copied, Copies
from medusa_chat.decoding.reply import Reply
from medusa_chat.decoding.runner import Runner
from medusa_chat.decoding.trees.accuracy import PUBLISHED, Accuracy, shaped_tree
from medusa_chat.decoding.trees.costs import step_costs
from medusa_chat.decoding.trees.policy import VANILLA, Policy
from medusa_chat.decoding.trees.tree import AnyTree, DynamicTree, paper_trees
from medusa_chat.events import Candidates, Step, proposer
from medusa_chat.model.templates import ChatTemplate

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    from medusa_chat.decoding.draft.plans import Outcome
    from medusa_chat.decoding.trees import choice as tuning
    from medusa_chat.model.backbone import Backbone
    from medusa_chat.model.heads import Heads

COPIES_ALONE = DynamicTree(VANILLA, 1 + CHAIN)  # for a model without heads
WORTHWHILE = (
    1.5  # tokens that a step of copies alone has to promise, or it is taken as a vanilla one
)


class Engine:
    """Decodes replies for one conversation at a time. Implements terminal.engine.ChatEngine.

    Attributes:
        policy: what each step verifies.
        copies: whether guesses are copied from the conversation too; change it by `use_copies`.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: Heads | None,
        tokenizer: Any,
        *,
        name: str = "model",
        tree: str | AnyTree = "auto",
        accuracy: Accuracy | None = None,
        context: int | None = None,
        system: str = "",
        eos: frozenset[int] | None = None,
        probing: bool = True,
        copies: bool = True,
        template: ChatTemplate | None = None,
        costs: Path | None = None,
        eager: bool | None = None,
    ) -> None:
        """`probing`: tree modes take a vanilla step now and then, to measure the speedup (bench measures apart);
        `costs`: folder that keeps what steps cost, from one run to the next.
        """
        self.template = template or ChatTemplate(tokenizer, name)
        self.name, self.system = name, system or self.template.system
        self.tokenizer, self.backbone = tokenizer, backbone
        self.context = min(backbone.context, MAX_CONTEXT) if context is None else context
        if not 1 < self.context <= backbone.context:
            raise UserError(
                f"the context of {name} can hold 2 to {backbone.context} tokens, not {self.context}"
            )
        self.runner = Runner(
            backbone, heads, self.context + MAX_NODES, accuracy or PUBLISHED, eager
        )
        self.notices = self.runner.notices
        self.prefilled, self.prefill_seconds = 0, 0.0
        self._accuracy, self._costs, self._probing = accuracy, costs, probing
        self.policy = self._new_policy()
        self._eos = (
            eos_ids(backbone.model, tokenizer) | self.template.stop_ids if eos is None else eos
        )
        self._tokens: list[int] = []  # the text behind the cache
        self._reply: Generator[Step] | None = None
        self._last: Outcome | None = None
        self._step_cost: dict[str, tuning.StepCost] = {}  # by kind of tree
        self._copies = Copies()
        self.copies = copies
        self.use_tree(tree)

    @property
    def heads(self) -> int:
        return self.runner.heads.heads if self.runner.heads else 0

    @property
    def tree(self) -> AnyTree:
        """The tree in use."""
        return self.policy.tree

    @property
    def accuracy(self) -> Accuracy | None:
        """What was measured of the heads, or None if nobody has."""
        return self._accuracy

    @property
    def tokens_in_context(self) -> int:
        return len(self._tokens)

    def encode(self, prompt: Sequence[int] | Sequence[Message]) -> list[int]:
        """Ids of a prompt: messages go through the model's chat template and end where the reply begins."""
        if all(isinstance(part, int) for part in prompt):
            return list(prompt)  # type: ignore[arg-type]
        return self.template.encode(prompt)  # type: ignore[arg-type]

    def generate(
        self, prompt: Sequence[int] | Sequence[Message], sampling: Sampling
    ) -> Generator[Step]:
        """Decode a reply, step by step. Close the iterator at any time: the cache holds what was yielded.

        Raises:
            UserError: the prompt is empty or leaves no room in the context, or the model has no heads.
        """
        ids = self.encode(prompt)
        if not ids:
            raise UserError("the prompt is empty")
        if len(ids) >= self.context:
            raise UserError(
                f"the prompt has {len(ids)} tokens; the context of {self.name} holds {self.context}"
            )
        if sampling.mode != "vanilla" and self.tree is VANILLA:
            raise UserError(
                f"{self.name} has no Medusa heads: {sampling.mode} mode needs them or copies, vanilla does not"
            )
        if not 0 <= min(ids) <= max(ids) < self.backbone.vocabulary:
            raise UserError(
                f"the prompt has ids that are not among the {self.backbone.vocabulary} of {self.name}"
            )
        if self._reply is not None:
            self._reply.close()  # there is one cache: an older reply cannot go on beside the new one
        self._reply = self._decode(ids, sampling)
        return self._reply

    def _decode(self, ids: list[int], sampling: Sampling) -> Generator[Step]:
        rule = make_rule(sampling)
        if not sampling.ignore_eos:
            sampling = replace(sampling, stop=(*sampling.stop, *self.template.stop))
        reply = Reply(self.tokenizer, sampling, self._eos, self.context - len(ids))
        try:
            root = self._prefill(ids, rule)
            if reply.ends_at(root):
                yield Step(tuple(reply.take([root], [0])), 0, 0.0, "vanilla", finish=reply.finish)
                return
            self.policy.begin(sampling)
            while not reply.finish:
                step, root = self._step(root, rule, reply)
                yield step
        finally:
            # What an interrupt left in the cache beyond the text is dropped, and the other way round.
            length = min(len(self._tokens), self.runner.cache.length)
            self.runner.cache.rewind(length)
            del self._tokens[length:]

    def _prefill(self, ids: list[int], rule: Rule) -> int:
        """Bring the cache to `ids`, running only what differs; returns the first token of the reply."""
        started = time.perf_counter()
        # The last token always runs again: its hidden state is where the reply starts.
        pairs = zip(self._tokens, ids[:-1], strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.runner.cache.rewind(min(shared, self.runner.cache.length))
        self._copies.rewind(shared)
        del self._tokens[self.runner.cache.length :]
        self.prefilled = len(ids) - len(self._tokens)
        root = self.runner.prefill(ids[len(self._tokens) :], rule)
        self._tokens = list(ids)
        self.prefill_seconds = time.perf_counter() - started
        return root

    def _step(self, root: int, rule: Rule, reply: Reply) -> tuple[Step, int]:
        """One forward: its Step, and the root of the next."""
        started = time.perf_counter()
        tree, paused = self.policy.next()
        copied = self._copied(root) if self.copies and tree is not VANILLA else None
        if tree is COPIES_ALONE and (copied is None or copied.promise < WORTHWHILE):
            tree = VANILLA
        outcome = self.runner.step(root, tree, rule, copied if tree is not VANILLA else None)
        ids = [outcome.candidates[row] for row in outcome.rows]
        tokens = reply.take(ids, [proposer(outcome.paths[row]) for row in outcome.rows])
        if copied:
            self._copies.learn(copied, [*ids[1:], outcome.next])
        self._tokens += ids[: len(tokens)]
        self.runner.cache.rewind(len(self._tokens))
        if not reply.finish and reply.ends_at(outcome.next):
            tokens += reply.take(
                [outcome.next], [0]
            )  # known already: it needs no forward of its own
        if tree is not VANILLA:
            self._last = outcome
        self.policy.learn(ids[: len(tokens)], outcome.guesses, copied)
        kind: Literal["tree", "vanilla"] = "vanilla" if tree is VANILLA else "tree"
        tested = outcome.tested(len(tokens) - bool(reply.finish)) if tree is not VANILLA else ()
        depth = max(map(len, outcome.paths))
        seconds = time.perf_counter() - started
        step = Step(tuple(tokens), len(tree), seconds, kind, depth, reply.finish, tested, paused)
        self.policy.record(step)
        return step, outcome.next

    def _copied(self, root: int) -> Copied | None:
        """What the text copies of itself behind `root`."""
        self._copies.extend([*self._tokens[len(self._copies) :], root])
        return self._copies.propose()

    def _new_policy(self) -> Policy:
        return Policy(self._accuracy, self.heads, self.backbone.vocabulary, probing=self._probing)

    def forget(self) -> None:
        """Empty the cache: the next reply prefills its whole prompt."""
        self.runner.cache.rewind(0)
        self._tokens.clear()

    def candidates(self) -> Candidates | None:
        """The tree of the last tree step, with its tokens as text."""
        if self._last is None:
            return None
        texts = tuple(self.tokenizer.decode([token]) for token in self._last.candidates)
        return Candidates(self._last.paths, texts, self._last.rows)

    def use_accuracy(self, accuracy: Accuracy) -> None:
        """Take other figures for how often the heads are right; the tree in use stays."""
        self._accuracy = accuracy
        self.runner.trust(accuracy)
        tree, self.policy = self.tree, self._new_policy()
        self.policy.fix(tree)

    def use_copies(self, on: bool) -> None:
        """Whether to copy guesses from the conversation from now on."""
        self.copies = on
        if not on:
            self.policy.forget_copies()
        if self.runner.heads is None:
            self.use_tree("auto")

    def use_tree(self, tree: str | AnyTree) -> None:
        """Switch to `auto`, `retune` (auto, with steps timed anew), dynamic-N, static-N, chain-N, a released tree by
        name, a JSON file or a tree itself.
        """
        if self.runner.heads is None:
            if tree not in ("auto", "retune"):
                raise UserError(f"{self.name} has no Medusa heads to fill a tree")
            self.policy.fix(COPIES_ALONE if self.copies else VANILLA)
            return
        if tree in ("auto", "retune"):
            self.policy.adapt(self._step_costs(anew=tree == "retune"))
            return
        wanted = shaped_tree(tree, self._known_accuracy()) if isinstance(tree, str) else tree
        fitting = wanted.pruned(self.heads, self.backbone.vocabulary)
        if len(fitting) < len(wanted):
            self.notices.append(
                f"tree {wanted.origin} was pruned from {len(wanted)} nodes to {len(fitting)}: it is {wanted.depth} deep"
                f" and {wanted.width} wide, {self.name} has {self.heads} heads over {self.backbone.vocabulary} tokens"
            )
        if not 1 < len(fitting) <= MAX_NODES:
            raise UserError(
                f"tree {wanted.origin} has {len(fitting) - 1} guesses; 1 to {MAX_NODES - 1} are possible"
            )
        self.policy.fix(fitting)

    def _known_accuracy(self) -> Accuracy:
        return (self._accuracy or PUBLISHED).pruned(self.heads, self.backbone.vocabulary)

    def _step_costs(self, anew: bool) -> dict[str, tuning.StepCost]:
        """What steps cost here, by the kind of tree: as known from an earlier run, or as measured now."""
        if self._accuracy is None:
            self.notices.append(
                "nobody has measured these heads: auto uses published accuracies; see calibrate"
            )
        if anew or not self._step_cost:
            self.forget()
            accuracy = self._known_accuracy()
            self._step_cost = step_costs(
                self.runner, self.name, accuracy, self.copies, self._costs, anew=anew
            )
        return self._step_cost

    def describe_tree(self) -> str:
        if self.tree is VANILLA:
            return "no tree: the model has no Medusa heads"
        if self.tree is COPIES_ALONE:
            return f"copies of the conversation alone, {CHAIN} tokens at once: the model has no Medusa heads"
        return self.policy.describe() + ("; with copies" if self.copies else "")

    def tree_names(self) -> list[str]:
        if not self.heads:
            return ["auto"]
        shaped = [f"{kind}-{nodes}" for kind in ("dynamic", "static") for nodes in (8, 16, 32, 64)]
        return [
            "auto",
            *(f"chain-{n}" for n in range(1, self.heads + 1)),
            *shaped,
            *paper_trees(),
            "retune",
        ]


def eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every EOS id of a transformers model's generation config and the tokenizer's own."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)
