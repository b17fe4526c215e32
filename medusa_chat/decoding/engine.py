"""Engine: one conversation's text, its cache across turns, and replies as a stream of Steps."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

from medusa_chat.config import Message, Sampling, UserError
from medusa_chat.decoding import tuning
from medusa_chat.decoding.acceptance import Rule, make_rule
from medusa_chat.decoding.accuracy import PUBLISHED, Accuracy
from medusa_chat.decoding.reply import Reply
from medusa_chat.decoding.runner import Outcome, Runner
from medusa_chat.decoding.tree import Tree, named_tree, paper_trees
from medusa_chat.events import Candidates, Step
from medusa_chat.model.backbone import Backbone
from medusa_chat.model.heads import Heads

VANILLA = Tree()
MAX_CONTEXT = 8192  # unless asked for more: the cache of a long-context model would fill the memory
MAX_NODES = 256
# Tree steps before each vanilla step that the speedup is measured by: few at first, then the last number again.
PROBE_GAPS = (2, 2, 3, 4, 6, 8, 24)


class Engine:
    """Decodes replies for one conversation at a time. Implements events.ChatEngine.

    Attributes:
        probing: whether tree modes take a vanilla step now and then to measure the speedup (bench measures apart).
    """

    def __init__(
        self, backbone: Backbone, heads: Heads | None, tokenizer: Any, *, name: str = "model",
        tree: str | Tree = "auto", accuracy: Accuracy | None = None, context: int | None = None,
        system: str = "", eos: frozenset[int] | None = None, probing: bool = True,
    ) -> None:  # fmt: skip
        self.name, self.system = name, system
        self.notices: list[str] = []
        self.tokenizer, self.backbone, self.probing = tokenizer, backbone, probing
        self.context = min(backbone.context, MAX_CONTEXT) if context is None else context
        if not 1 < self.context <= backbone.context:
            raise UserError(f"the context of {name} can hold 2 to {backbone.context} tokens, not {self.context}")
        self.runner = Runner(backbone, heads, self.context + MAX_NODES)
        self.prefilled, self.prefill_seconds = 0, 0.0
        self._accuracy = accuracy
        self._eos = eos_ids(backbone, tokenizer) if eos is None else eos
        self._tokens: list[int] = []  # the text behind the cache
        self._reply: Generator[Step] | None = None
        self._probes, self._since_probe = 0, 0
        self._last: tuple[Tree, Outcome] | None = None
        self._cost: tuning.StepCost | None = None
        self._forecast = ""
        self.tree = VANILLA
        self.use_tree(tree)

    @property
    def heads(self) -> int:
        return self.runner.heads.heads if self.runner.heads else 0

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
        try:
            text = self.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise UserError(f"the chat template of {self.name} refuses this conversation: {error}") from None
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def generate(self, prompt: Sequence[int] | Sequence[Message], sampling: Sampling) -> Generator[Step]:
        """Decode a reply, step by step. Close the iterator at any time: the cache holds what was yielded.

        Raises:
            UserError: the prompt is empty or leaves no room in the context, or the model has no heads.
        """
        ids = self.encode(prompt)
        if not ids:
            raise UserError("the prompt is empty")
        if len(ids) >= self.context:
            raise UserError(f"the prompt has {len(ids)} tokens; the context of {self.name} holds {self.context}")
        if sampling.mode != "vanilla" and not self.heads:
            raise UserError(f"{self.name} has no Medusa heads: {sampling.mode} mode needs them, vanilla does not")
        if not 0 <= min(ids) <= max(ids) < self.backbone.vocabulary:
            raise UserError(f"the prompt has ids that are not among the {self.backbone.vocabulary} of {self.name}")
        if self._reply is not None:
            self._reply.close()  # there is one cache: an older reply cannot go on beside the new one
        self._reply = self._decode(ids, sampling)
        return self._reply

    def _decode(self, ids: list[int], sampling: Sampling) -> Generator[Step]:
        rule = make_rule(sampling)
        reply = Reply(self.tokenizer, sampling, self._eos, self.context - len(ids))
        try:
            root = self._prefill(ids, rule)
            if reply.ends_at(root):
                yield Step(tuple(reply.take([root], [0])), 0, 0.0, "vanilla", finish=reply.finish)
                return
            while not reply.finish:
                tree = VANILLA if sampling.mode == "vanilla" or self._probe_due() else self.tree
                step, root = self._step(root, tree, rule, reply)
                yield step
        finally:
            # What an interrupt left in the cache beyond the text is dropped, and the other way round.
            length = min(len(self._tokens), self.runner.cache.length)
            self.runner.cache.rewind(length)
            del self._tokens[length:]

    def _probe_due(self) -> bool:
        """Whether the next step is taken as a vanilla one. Counted over replies: short ones need no probe each."""
        if not self.probing or self._since_probe < PROBE_GAPS[min(self._probes, len(PROBE_GAPS) - 1)]:
            self._since_probe += 1
            return False
        self._probes, self._since_probe = self._probes + 1, 0
        return True

    def _prefill(self, ids: list[int], rule: Rule) -> int:
        """Bring the cache to `ids`, running only what differs; returns the first token of the reply."""
        started = time.perf_counter()
        # The last token always runs again: its hidden state is where the reply starts.
        pairs = zip(self._tokens, ids[:-1], strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.runner.cache.rewind(min(shared, self.runner.cache.length))
        del self._tokens[self.runner.cache.length :]
        self.prefilled = len(ids) - len(self._tokens)
        root = self.runner.prefill(ids[len(self._tokens) :], rule)
        self._tokens = list(ids)
        self.prefill_seconds = time.perf_counter() - started
        return root

    def _step(self, root: int, tree: Tree, rule: Rule, reply: Reply) -> tuple[Step, int]:
        """One forward: its Step, and the root of the next."""
        started = time.perf_counter()
        outcome = self.runner.step(root, tree, rule)
        ids = [outcome.candidates[row] for row in outcome.rows]
        tokens = reply.take(ids, range(len(ids)))
        self._tokens += ids[: len(tokens)]
        self.runner.cache.rewind(len(self._tokens))
        if not reply.finish and reply.ends_at(outcome.next):
            tokens += reply.take([outcome.next], [0])  # known already: it needs no forward of its own
        if tree is not VANILLA:
            self._last = (tree, outcome)
        seconds = time.perf_counter() - started
        return Step(
            tuple(tokens), len(tree), seconds, "vanilla" if tree is VANILLA else "tree", tree.depth, reply.finish
        ), outcome.next

    def forget(self) -> None:
        """Empty the cache: the next reply prefills its whole prompt."""
        self.runner.cache.rewind(0)
        self._tokens.clear()

    def candidates(self) -> Candidates | None:
        """The tree of the last tree step, with its tokens as text."""
        if self._last is None:
            return None
        tree, outcome = self._last
        texts = tuple(self.tokenizer.decode([token]) for token in outcome.candidates)
        return Candidates(tree.paths, texts, outcome.rows)

    def use_tree(self, tree: str | Tree) -> None:
        """Switch to `auto`, a released tree by name, `chain-N`, a JSON file or a Tree."""
        if self.runner.heads is None:
            if tree != "auto":
                raise UserError(f"{self.name} has no Medusa heads to fill a tree")
            self.tree = VANILLA
            return
        if tree == "auto":
            self.tree = self._auto_tree()
            return
        wanted = named_tree(tree) if isinstance(tree, str) else tree
        fitting = wanted.pruned(self.heads, self.backbone.vocabulary)
        if len(fitting) < len(wanted):
            self.notices.append(
                f"tree {wanted.origin} was pruned from {len(wanted)} nodes to {len(fitting)}: it is {wanted.depth} deep"
                f" and {wanted.width} wide, {self.name} has {self.heads} heads over {self.backbone.vocabulary} tokens"
            )
        if not 1 < len(fitting) <= MAX_NODES:
            raise UserError(f"tree {wanted.origin} has {len(fitting) - 1} guesses; 1 to {MAX_NODES - 1} are possible")
        self.tree, self._forecast = fitting, ""
        if self._accuracy is not None:
            self._forecast = f", forecast {self._accuracy.forecast(fitting):.2f} tokens a step"

    def _auto_tree(self) -> Tree:
        accuracy = self._accuracy
        if accuracy is None:
            self.notices.append("nobody has measured these heads: auto uses published accuracies; see calibrate")
            accuracy = PUBLISHED
        accuracy = accuracy.pruned(self.heads, self.backbone.vocabulary)
        if self._cost is None:
            self.forget()
            self._cost = tuning.measure(self.runner, accuracy)
        tree, length, speedup = tuning.fastest(accuracy, self._cost)
        self._forecast = f", forecast {length:.2f} tokens a step, {speedup:.2f}x"
        return tree

    def describe_tree(self) -> str:
        if self.tree is VANILLA:
            return "no tree: the model has no Medusa heads"
        return f"{self.tree.origin}: {len(self.tree)} nodes, depth {self.tree.depth}{self._forecast}"

    def tree_names(self) -> list[str]:
        return ["auto", *(f"chain-{n}" for n in range(1, self.heads + 1)), *paper_trees()]


def eos_ids(backbone: Backbone, tokenizer: Any) -> frozenset[int]:
    """Every EOS id of the generation config and the tokenizer's own."""
    configured = getattr(backbone.model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)
