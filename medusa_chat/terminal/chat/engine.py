"""The engine as the terminal needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from medusa_chat.config import Message
    from medusa_chat.events import Candidates, Step
    from medusa_chat.sampling import Sampling


class ChatTrees(Protocol):
    """The choice of a candidate tree; `TreeControl` is the real one."""

    @property
    def copies(self) -> bool:
        """True if text copied from the conversation is guessed too."""

    def use(self, tree: str) -> None:
        """Switch to auto, retune (auto, timed again), a name or a JSON file. Raises UserError."""

    def use_copies(self, on: bool) -> None:
        """Switch guessing by copying on or off."""

    def describe(self) -> str:
        """Describe the tree in one line: kind, nodes, depth, expected and measured figures."""

    def names(self) -> list[str]:
        """List the names that `use` takes."""


class Template(Protocol):
    """The text around messages; `ChatTemplate` is the real one."""

    @property
    def thinking(self) -> bool | None:
        """True or False if the model's thinking was switched, else None."""

    @property
    def drops_thoughts(self) -> bool:
        """True if it decides itself what later turns hold of <think> blocks."""

    def opening(self, messages: Sequence[Message]) -> str:
        """Return the tag of a block of thoughts that it opens for the reply, or ""."""


class ChatEngine(Protocol):
    """A model to chat with; `medusa_chat.decoding.engine.Engine` is the real one."""

    name: str  # of the model
    prefilled: int  # prompt tokens that the last reply had to prefill; the cache held the others
    prefill_seconds: float  # time of that prefill
    context: int  # tokens that prompt and reply may hold together
    system: str  # the model's default system prompt, may be empty
    raw: bool  # messages are plain text that the model goes on with; setting it may be refused
    defaults: dict[str, Any]  # settings of Sampling that the model itself names
    notices: list[str]  # to be shown once, such as "the tree was pruned"; the reader removes them

    @property
    def heads(self) -> int:
        """Number of Medusa heads; 0 if the model has none."""

    @property
    def tokens_in_context(self) -> int:
        """Number of tokens in the cache."""

    @property
    def trees(self) -> ChatTrees:
        """The choice of the candidate tree."""

    @property
    def template(self) -> Template:
        """The text around messages."""

    def think(self, on: bool) -> None:
        """Switch the model's thinking. Raises UserError if its template cannot."""

    def encode(self, prompt: list[int] | list[Message]) -> list[int]:
        """Return the ids of a prompt."""

    def count(self, text: str) -> int:
        """Count the tokens of a text, without a template."""

    def generate(self, prompt: list[int] | list[Message], sampling: Sampling) -> Iterator[Step]:
        """Decode a reply; may be closed early. Raises UserError if the prompt does not fit."""

    def close(self) -> None:
        """Free the model's memory. The engine cannot be used any more."""

    def candidates(self) -> Candidates | None:
        """Return the tree of the last tree step, or None before the first."""
