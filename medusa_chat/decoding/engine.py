"""Engine: one conversation's text, its cache across turns, and replies as a stream of Steps."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from medusa_chat.config import MAX_NODES, LoadOptions, Message, UserError
from medusa_chat.decoding.reply import Reply, eos_ids, generation_settings
from medusa_chat.decoding.runner import Launched, Runner
from medusa_chat.decoding.trees.control import TreeControl
from medusa_chat.decoding.trees.policy import VANILLA, Choice
from medusa_chat.events import Candidates, Step, Token
from medusa_chat.model.positions import usable_context
from medusa_chat.model.templates import ChatTemplate
from medusa_chat.sampling import Sampling, defaults_of
from medusa_chat.text import common_prefix

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    from medusa_chat.decoding.acceptance import Rule
    from medusa_chat.decoding.report import StepReport
    from medusa_chat.decoding.trees.accuracy import Accuracy
    from medusa_chat.model.backbone import Backbone
    from medusa_chat.model.heads import Heads


BEFORE = 8  # tokens of a text that goes on: the decoder of its first word needs one character


class Engine:
    """Decodes replies for one conversation at a time. Implements terminal.chat.engine.ChatEngine.

    Attributes:
        name: of the model.
        system: its default system prompt, maybe empty.
        template: turns messages into ids.
        tokenizer: of the model.
        backbone: the model that decides.
        runner: runs prefill and steps.
        trees: chooses what each step verifies.
        text: the ids whose keys and values the cache holds.
        context: tokens that prompt and reply may hold together.
        notices: messages for the user, a line each; drained by the reader.
        prefilled: prompt tokens that the last reply had to prefill.
        prefill_seconds: time that this took.
        defaults: settings of Sampling that the model's generation config names.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: Heads | None,
        tokenizer: Any,
        options: LoadOptions | None = None,
        *,
        name: str = "model",
        system: str = "",
        accuracy: Accuracy | None = None,
        template: ChatTemplate | None = None,
        eos: frozenset[int] | None = None,
        costs: Path | None = None,
    ) -> None:
        """Start with an empty text.

        Args:
            backbone: the model that decides.
            heads: the Medusa heads, or None.
            tokenizer: of the model.
            options: tree, copies, context, eager and probing are read.
            name: of the model.
            system: its default system prompt; empty for that of the template.
            accuracy: as measured with these heads, or None if they are not calibrated.
            template: in place of the tokenizer's own.
            eos: ids that end a reply, in place of the model's own.
            costs: folder that keeps step costs from one run to the next.

        Raises:
            UserError: the model's context is shorter than asked for, or the tree does not fit.
        """
        options = options or LoadOptions()
        self.name = name
        self.tokenizer = tokenizer
        self.backbone = backbone
        self.template = template or ChatTemplate(tokenizer, name)
        self.system = system or self.template.system
        self.context = usable_context(options.context, backbone.context, name)
        self.text: list[int] = []
        self.prefilled = 0
        self.prefill_seconds = 0.0
        own_eos = eos_ids(backbone.model, tokenizer) | self.template.stop_ids
        self._eos = own_eos if eos is None else eos
        self._reply: Generator[Step] | None = None
        self._last: StepReport | None = None  # of a tree step
        self.defaults, complaints = defaults_of(generation_settings(backbone.model))
        self.runner = Runner(backbone, heads, self.context + MAX_NODES, accuracy, options.eager)
        self.notices = self.runner.notices
        self.notices += complaints
        self.trees = TreeControl(self.runner, name, accuracy, options, costs, self.notices)

    @property
    def heads(self) -> int:
        """Medusa heads; 0 if the model has none."""
        return self.runner.state.head_count

    @property
    def raw(self) -> bool:
        """True if messages are plain text that the model goes on with; may be set.

        Raises:
            UserError: it is set to False, and the model has no chat template.
        """
        return self.template.raw

    @raw.setter
    def raw(self, on: bool) -> None:
        self.template = self.template.switched(on)

    @property
    def tokens_in_context(self) -> int:
        """Tokens that the cache holds now."""
        return self.runner.cache.length

    def encode(self, prompt: Sequence[int] | Sequence[Message]) -> list[int]:
        """Return the ids of a prompt; messages go through the model's chat template."""
        if all(isinstance(part, int) for part in prompt):
            return list(cast("Sequence[int]", prompt))
        return self.template.encode(cast("Sequence[Message]", prompt))

    def think(self, on: bool) -> None:
        """Switch the model's thinking. Raises UserError if its template cannot."""
        self.template = self.template.with_thinking(on)

    def count(self, text: str) -> int:
        """Count the tokens of a text, without a template."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def generate(
        self, prompt: Sequence[int] | Sequence[Message], sampling: Sampling
    ) -> Generator[Step]:
        """Decode a reply, step by step. Close the iterator at any time: the cache stays sound.

        Raises:
            UserError: the prompt is empty or too long for the context, or the model has no heads.
        """
        ids = self.encode(prompt)
        self._check(ids, sampling)
        if self._reply is not None:
            self._reply.close()  # there is one cache, so an older reply cannot go on
        # Ids and plain text go on; after a chat template a reply begins.
        goes_on = self.raw or all(isinstance(part, int) for part in prompt)
        self._reply = self._decode(ids, sampling, ids[-BEFORE:] if goes_on else [])
        return self._reply

    def _check(self, ids: list[int], sampling: Sampling) -> None:
        name, vocabulary = self.name, self.backbone.vocabulary
        if not ids:
            raise UserError("the prompt is empty")
        if len(ids) >= self.context:
            raise UserError(
                f"the prompt has {len(ids)} tokens; the context of {name} holds {self.context}"
            )
        if sampling.mode != "vanilla" and self.trees.current is VANILLA:
            raise UserError(
                f"{name} has no Medusa heads: {sampling.mode} mode needs them or copies,"
                " vanilla does not"
            )
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise UserError(f"the prompt has ids that are not among the {vocabulary} of {name}")

    def _decode(self, ids: list[int], sampling: Sampling, before: list[int]) -> Generator[Step]:
        rule = self.runner.begin(ids, sampling)
        if not sampling.ignore_eos:
            sampling = replace(sampling, stop=(*sampling.stop, *self.template.stop))
        reply = Reply(self.tokenizer, sampling, self._eos, self.context - len(ids), before)
        try:
            root = self._prefill(ids, rule)
            if reply.ends_at(root):
                tokens = tuple(reply.take([root], [0]))
                yield Step(tokens, 0, 0.0, "vanilla", finish=reply.finish)
                return
            self.trees.begin(sampling)
            yield from self._steps(root, rule, reply)
        finally:
            self._make_consistent()

    def _make_consistent(self) -> None:
        """Drop what an interrupt left in the cache and not in the text, or the other way round."""
        length = min(len(self.text), self.runner.cache.length)
        self.runner.cache.rewind(length)
        del self.text[length:]

    def _prefill(self, ids: list[int], rule: Rule) -> int:
        """Run what differs from the text in the cache; returns the reply's first token."""
        started = time.perf_counter()
        # The last token always runs again: the reply starts at its hidden state.
        shared = common_prefix(self.text, ids[:-1])
        self.trees.policy.rewind(shared)
        self.runner.cache.rewind(min(shared, self.runner.cache.length))
        del self.text[self.runner.cache.length :]
        self.prefilled = len(ids) - len(self.text)
        root = self.runner.prefill(ids[len(self.text) :], rule)
        self.text = list(ids)
        self.prefill_seconds = time.perf_counter() - started
        return root

    def _steps(self, root: int, rule: Rule, reply: Reply) -> Generator[Step]:
        """Take steps to the reply's end; a GPU takes the next one while this one is shown.

        One that was launched in vain leaves rows behind the cache's end, which the next prefill
        overwrites.
        """
        ahead: Launched | None = None
        while not reply.finish:
            step, root = self._finish(ahead or self._launch(root, rule), reply)
            ahead = None
            if self.runner.overlaps and not reply.finish:
                ahead = self._launch(root, rule)
            yield step

    def _launch(self, root: int, rule: Rule) -> Launched:
        started = time.perf_counter()
        choice = self.trees.policy.next(self.text, root)
        finish = self.runner.launch(root, choice.tree, rule, choice.copied)
        return Launched(choice, finish, time.perf_counter() - started)

    def _finish(self, launched: Launched, reply: Reply) -> tuple[Step, int]:
        """End a step; returns its event, and the root of the next step."""
        started = time.perf_counter()
        policy = self.trees.policy
        report = launched.finish()
        waited = time.perf_counter() - started
        # While nobody waits, a GPU computes all the same.
        unseen = max(self.runner.device_seconds - waited - launched.seconds, 0.0)
        tokens = self._keep(report, reply)
        spent = launched.seconds + unseen + time.perf_counter() - started
        step = self._event(launched.choice, report, tokens, reply, spent)
        # The policy compares steps without the time that it takes to learn from them.
        started = time.perf_counter()
        policy.learn(report, step)
        learned = time.perf_counter() - started
        return policy.bookkeeping.settle(step, waited + unseen, learned), report.next

    def _keep(self, report: StepReport, reply: Reply) -> list[Token]:
        """Add the accepted tokens to the reply, and drop those after its end from the cache."""
        tokens = reply.take(report.tokens, report.heads)
        self.text += report.tokens[: len(tokens)]
        self.runner.cache.rewind(len(self.text))
        if not reply.finish and reply.ends_at(report.next):
            tokens += reply.take([report.next], [0])  # it needs no forward of its own
        return tokens

    def _event(
        self, choice: Choice, report: StepReport, tokens: list[Token], reply: Reply, seconds: float
    ) -> Step:
        nodes = len(choice.tree)
        if nodes > 1:
            self._last = report
        return Step(
            tokens=tuple(tokens),
            nodes=nodes,
            seconds=seconds,
            kind="tree" if nodes > 1 else "vanilla",
            depth=report.depth,
            finish=reply.finish,
            tested=report.tested(len(tokens) - bool(reply.finish)),
            paused=choice.pause,
        )

    def forget(self) -> None:
        """Empty the cache: the next reply prefills its whole prompt."""
        self.runner.cache.rewind(0)
        self.text.clear()

    def close(self) -> None:
        """Free the model's memory. The engine cannot be used any more."""
        if self._reply is not None:
            self._reply.close()
        self._reply = self._last = None
        del self.backbone, self.runner, self.trees

    def candidates(self) -> Candidates | None:
        """Return the tree of the last tree step, with its tokens as text."""
        if self._last is None:
            return None
        texts = tuple(self.tokenizer.decode([token]) for token in self._last.candidates)
        return Candidates(self._last.paths, texts, self._last.rows)
