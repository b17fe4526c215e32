"""Messages become a prompt, by the tokenizer's own chat template or one of fastchat."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_chat.config import Message, ModelSpec, UserError
from medusa_chat.model.rendering import render
from medusa_chat.text import is_panic, reason_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastchat.conversation import Conversation

HOW_TO_NAME = "name one with --template NAME (`--template list` lists them)"
SWITCH = "enable_thinking"  # the variable that templates of thinking models read
THINK = "<think>"
TURNS = ("user", "assistant")


class NoTemplateError(UserError):
    """A model has no chat template, and none is known for its name."""


@dataclass(frozen=True)
class ChatTemplate:
    """The text around the messages of a conversation.

    Attributes:
        model: its name, for messages.
        conversation: fastchat's template, without messages; None for the tokenizer's own.
        raw: True if there is no text around them: the model goes on with what the user wrote.
        thinking: what the template's `enable_thinking` is set to; None leaves it alone.
    """

    tokenizer: Any
    model: str
    conversation: Conversation | None = None
    raw: bool = False
    thinking: bool | None = None

    @property
    def name(self) -> str:
        """Name of the template."""
        if self.raw:
            return "none, plain text"
        return self.conversation.name if self.conversation else "the tokenizer's own"

    @property
    def system(self) -> str:
        """The default system message; "" for the tokenizer's template, which does not show it."""
        return self.conversation.system_message if self.conversation else ""

    @property
    def drops_thoughts(self) -> bool:
        """True if it decides itself what later turns hold of <think> blocks."""
        source = self._source()
        return "</think>" in source or "reasoning_content" in source

    def opening(self, messages: Sequence[Message]) -> str:
        """Return the tag of a block of thoughts that it opens for the reply, or ""."""
        opens = self.render(messages).rstrip().endswith(THINK)
        return THINK if opens else ""

    def with_thinking(self, on: bool) -> ChatTemplate:
        """Switch the model's thinking. Raises UserError if the template cannot."""
        if SWITCH not in self._source():
            raise UserError(f"the chat template of {self.model} has no switch for thinking")
        return replace(self, thinking=on)

    def _source(self) -> str:
        return "" if self.conversation else str(self.tokenizer.chat_template or "")

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end a reply."""
        if self.raw:
            return ()
        stop = self.conversation.stop_str if self.conversation else None
        return (stop,) if isinstance(stop, str) else tuple(stop or ())

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a reply, besides the model's EOS."""
        ids = self.conversation.stop_token_ids if self.conversation else None
        return frozenset(ids or ())

    def switched(self, raw: bool) -> ChatTemplate:
        """Return the template with `raw` on or off; raises UserError if there is no template."""
        if not raw and self.conversation is None and not self.tokenizer.chat_template:
            raise UserError(f"{self.model} has no chat template: {HOW_TO_NAME}")
        return replace(self, raw=raw)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Encode a conversation up to where the reply begins, with one BOS if the model has any."""
        return self.tokens(self.render(messages))["input_ids"]

    def tokens(self, text: str, **options: bool) -> dict[str, list[Any]]:
        """Encode the text of `render` or `text`.

        Returns:
            `input_ids`, and further outputs that `options` ask the tokenizer for, one by token.
        """
        # The tokenizer's template writes its special tokens; most of fastchat's leave BOS out.
        add = self.raw or self.conversation is not None
        try:
            found = self.tokenizer(text, add_special_tokens=add, **options)
        except BaseException as error:
            if not is_panic(error):
                raise
            raise UserError(f"the tokenizer fails on this text: {reason_of(error)}") from None
        bos = self.tokenizer.bos_token_id
        twice = add and bos is not None and found["input_ids"][:2] == [bos, bos]
        return {name: items[twice:] for name, items in found.items()}

    def render(self, messages: Sequence[Message]) -> str:
        """Write a conversation up to where the reply begins.

        Without a system message the template's own is used; an empty one suppresses it.

        Raises:
            UserError: there is no template, the template refuses the conversation, or its last
                message is a reply.
        """
        if messages and messages[-1]["role"] == "assistant":
            raise UserError(
                "the conversation ends with a reply, which cannot be continued: the user speaks"
                " next"
            )
        return self.text(messages, replying=True)

    def text(self, messages: Sequence[Message], replying: bool = False) -> str:
        """Write a conversation, with the beginning of a reply if `replying`; raises as `render`."""
        if self.raw:
            return _plain(messages)
        if self.conversation is None:
            return self._by_tokenizer(messages, replying)
        return self._by_fastchat(self.conversation.copy(), messages, replying)

    def reply_end(self, text: str, start: int, reply: str) -> int:
        """Find where the last reply of a text ends, with the mark that ends it.

        In a template of fastchat the text after the mark opens the next turn. In the tokenizer's
        own, all text to the end belongs to the reply.

        Args:
            text: a conversation's text.
            start: where the reply begins in it.
            reply: the reply, which templates may strip.
        """
        if self.conversation is None:
            return len(text)
        written = text.find(reply.strip(), start)
        end = start if written < 0 else written + len(reply.strip())
        stop_tokens = self.tokenizer.convert_ids_to_tokens([*self.stop_ids])
        marks = [*self.stop, *stop_tokens, self.tokenizer.eos_token]
        places = [(text.find(mark, end), mark) for mark in marks if mark]
        return min((at + len(mark) for at, mark in places if at >= 0), default=len(text))

    def _by_tokenizer(self, messages: Sequence[Message], replying: bool) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(f"{self.model} has no chat template: {HOW_TO_NAME}")
        kept = [each for each in messages if each["role"] != "system" or each["content"]]
        try:
            switch: dict[str, bool] = {} if self.thinking is None else {SWITCH: self.thinking}
            return render(self.tokenizer, kept, replying, **switch)
        except UserError as error:
            raise UserError(
                f"the chat template of {self.model} refuses this conversation: {error}"
            ) from None

    def _by_fastchat(
        self, conversation: Conversation, messages: Sequence[Message], replying: bool
    ) -> str:
        turns = list(messages)
        if turns and turns[0]["role"] == "system":
            conversation.set_system_message(turns.pop(0)["content"])
        for place, turn in enumerate(turns):
            if turn["role"] != TURNS[place % 2] or not turn["content"]:
                found = f"of {turn['role']}" if turn["content"] else "empty"
                raise UserError(
                    f"the chat template {self.name} of {self.model} refuses this conversation:"
                    f" user and assistant speak in turn, and message {place + 1} is {found}"
                )
            conversation.append_message(conversation.roles[place % 2], turn["content"])
        if replying:
            conversation.append_message(conversation.roles[1], None)
        text: str = conversation.get_prompt()
        return text


def _plain(messages: Sequence[Message]) -> str:
    """Join messages to one text, in which each of the user's but the first begins a line."""
    text = ""
    for message in messages:
        if message["role"] == "user" and text and not text.endswith("\n"):
            text += "\n"
        if message["role"] != "system":  # it instructs a model that chats
            text += message["content"]
    return text


def template_or_plain(
    tokenizer: Any, spec: ModelSpec, notices: list[str], raw: bool
) -> ChatTemplate:
    """Choose a template as `resolve_template` does; plain text if there is none, or if `raw`.

    `notices` gets a line if there is none.
    """
    try:
        template = resolve_template(tokenizer, spec, notices)
    except NoTemplateError:
        template = ChatTemplate(tokenizer, spec.name, raw=True)
        if not raw:
            notices.append(
                f"{spec.name} has no chat template: it completes plain text (--raw), unless"
                " --template NAME gives it one"
            )
    return template.switched(True) if raw else template


def resolve_template(
    tokenizer: Any, spec: ModelSpec, notices: list[str] | None = None
) -> ChatTemplate:
    """Choose a template: the spec's, else the tokenizer's, else fastchat's for the model's name.

    The last is a guess, of which `notices` gets a line.

    Raises:
        UserError: the named template is unknown, or there is none (NoTemplateError).
    """
    if spec.template:
        return ChatTemplate(tokenizer, spec.name, named_template(spec.template))
    if tokenizer.chat_template:
        return ChatTemplate(tokenizer, spec.name)
    for name in (spec.name, Path(spec.backbone.partition("@")[0]).name):
        if conversation := matching_template(name):
            if notices is not None:
                notices.append(
                    f"{spec.name} has no chat template: that of {conversation.name} was chosen by"
                    " its name; --template NAME chooses another"
                )
            return ChatTemplate(tokenizer, spec.name, conversation)
    raise NoTemplateError(
        f"neither the tokenizer of {spec.name} nor fastchat has a chat template for it:"
        f" {HOW_TO_NAME}"
    )


def named_template(name: str) -> Conversation:
    """Return a conversation template of fastchat; raises UserError for an unknown name."""
    from fastchat.conversation import conv_templates

    if name not in conv_templates:
        near = difflib.get_close_matches(name, conv_templates, n=3, cutoff=0.4)
        hint = f"; close are {', '.join(near)}" if near else ""
        raise UserError(f"there is no chat template {name!r}{hint}; `--template list` lists them")
    return conv_templates[name].copy()


def matching_template(model: str) -> Conversation | None:
    """Return fastchat's template for a model's name; None if only its catch-all matches.

    fastchat looks for names of families anywhere ("mpt" in "my-prompt-model"). Here they have to
    be parts of the name, maybe with a number behind.
    """
    from fastchat.model.model_adapter import BaseModelAdapter, get_model_adapter

    adapter = get_model_adapter(model)
    if type(adapter) is BaseModelAdapter or not _matches_parts(adapter, model.lower()):
        return None
    return adapter.get_default_conv_template(model)


def _matches_parts(adapter: Any, name: str) -> bool:
    """Tell if what an adapter finds in a name is no piece of a longer word."""
    ends = range(1, len(name) + 1)
    start = max((i for i in range(len(name)) if adapter.match(name[i:])), default=0)
    end = next((j for j in ends if j > start and adapter.match(name[start:j])), len(name))
    return not (name[:start][-1:].isalpha() or name[end:][:1].isalpha())
