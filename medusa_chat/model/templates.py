"""Messages -> prompt: the tokenizer's own chat template where it has one, else a conversation template of fastchat."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from medusa_chat.config import Message, ModelSpec, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastchat.conversation import Conversation

HOW_TO_NAME = "name one with --template NAME (`--template list` lists them)"


@dataclass(frozen=True)
class ChatTemplate:
    """How a model is talked to.

    Attributes:
        model: its name, for complaints.
        conversation: fastchat's template, without messages of this conversation; None: the tokenizer's own.
    """

    tokenizer: Any
    model: str
    conversation: Conversation | None = None

    @property
    def name(self) -> str:
        return self.conversation.name if self.conversation else "the tokenizer's own"

    @property
    def system(self) -> str:
        """The system message where none is given; the tokenizer's own template keeps its to itself."""
        return self.conversation.system_message if self.conversation else ""

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end a reply."""
        stop = self.conversation.stop_str if self.conversation else None
        return (stop,) if isinstance(stop, str) else tuple(stop or ())

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a reply, besides the model's EOS."""
        return frozenset((self.conversation.stop_token_ids if self.conversation else None) or ())

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the reply begins, with one BOS if the model has any."""
        return self.tokens(self.render(messages))["input_ids"]

    def tokens(self, text: str, **asked: bool) -> dict[str, list[Any]]:
        """`input_ids` of a conversation's text, and what else the tokenizer is asked for, an item a token."""
        # The tokenizer's own template brings its special tokens; fastchat's leave BOS to the tokenizer, most of them.
        found = self.tokenizer(text, add_special_tokens=self.conversation is not None, **asked)
        bos = self.tokenizer.bos_token_id
        twice = (
            self.conversation is not None
            and bos is not None
            and found["input_ids"][:2] == [bos, bos]
        )
        return {name: items[twice:] for name, items in found.items()}

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation up to where the reply begins.

        Without a system message the template's own is used; an empty one suppresses it.

        Raises:
            UserError: there is no template, it refuses the conversation, or the last message is no user's.
        """
        if messages and messages[-1]["role"] == "assistant":
            raise UserError(
                "the conversation ends with a reply, which cannot be continued: the user speaks next"
            )
        return self.text(messages, replying=True)

    def text(self, messages: Sequence[Message], replying: bool = False) -> str:
        """The text of a conversation as it stands or, `replying`, up to where a reply begins. Raises as `render`."""
        by = self._by_fastchat if self.conversation else self._by_tokenizer
        return by(messages, replying)

    def reply_end(self, text: str, start: int, reply: str) -> int:
        """Where `reply`, which begins at `start` and is the last of `text`, has ended, with what the model ends it by.

        What fastchat has behind that opens the next turn. Of the tokenizer's own template all belongs to the reply.
        """
        if self.conversation is None:
            return len(text)
        said = text.find(reply.strip(), start)  # templates may strip it
        said = start if said < 0 else said + len(reply.strip())
        marks = (
            *self.stop,
            *self.tokenizer.convert_ids_to_tokens([*self.stop_ids]),
            self.tokenizer.eos_token,
        )
        places = ((text.find(mark, said), mark) for mark in marks if mark)
        return min((place + len(mark) for place, mark in places if place >= 0), default=len(text))

    def _by_tokenizer(self, messages: Sequence[Message], replying: bool) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(f"{self.model} has no chat template: {HOW_TO_NAME}")
        said = [
            message for message in messages if message["role"] != "system" or message["content"]
        ]
        try:
            text: str = self.tokenizer.apply_chat_template(
                said, tokenize=False, add_generation_prompt=replying
            )
        except TemplateError as error:
            raise UserError(
                f"the chat template of {self.model} refuses this conversation: {error}"
            ) from None
        return text

    def _by_fastchat(self, messages: Sequence[Message], replying: bool) -> str:
        assert self.conversation is not None
        conversation = self.conversation.copy()
        turns = list(messages)
        if turns and turns[0]["role"] == "system":
            conversation.set_system_message(turns.pop(0)["content"])
        for place, turn in enumerate(turns):
            role = ("user", "assistant")[place % 2]
            if turn["role"] != role or not turn["content"]:
                found = f"of {turn['role']}" if turn["content"] else "empty"
                raise UserError(
                    f"the chat template {self.name} of {self.model} refuses this conversation: user and assistant speak"
                    f" in turn, and message {place + 1} is {found}"
                )
            conversation.append_message(conversation.roles[place % 2], turn["content"])
        if replying:
            conversation.append_message(conversation.roles[1], None)
        text: str = conversation.get_prompt()
        return text


def resolve_template(tokenizer: Any, spec: ModelSpec) -> ChatTemplate:
    """The template that the spec names, else the tokenizer's own, else the one that fastchat has for the model's name.

    Raises:
        UserError: the named template is unknown, or there is none.
    """
    if spec.template:
        return ChatTemplate(tokenizer, spec.name, named_template(spec.template))
    if tokenizer.chat_template:
        return ChatTemplate(tokenizer, spec.name)
    for name in (spec.name, Path(spec.backbone.partition("@")[0]).name):
        if conversation := matching_template(name):
            return ChatTemplate(tokenizer, spec.name, conversation)
    raise UserError(
        f"neither the tokenizer of {spec.name} nor fastchat has a chat template for it: {HOW_TO_NAME}"
    )


def named_template(name: str) -> Conversation:
    """A conversation template of fastchat."""
    from fastchat.conversation import conv_templates

    if name not in conv_templates:
        near = difflib.get_close_matches(name, conv_templates, n=3, cutoff=0.4)
        hint = f"; close are {', '.join(near)}" if near else ""
        raise UserError(f"there is no chat template {name!r}{hint}; `--template list` lists them")
    return conv_templates[name].copy()


def matching_template(model: str) -> Conversation | None:
    """What fastchat's adapters choose for a model's name; None where only its catch-all would."""
    from fastchat.model.model_adapter import BaseModelAdapter, get_model_adapter

    adapter = get_model_adapter(model)
    return None if type(adapter) is BaseModelAdapter else adapter.get_default_conv_template(model)
