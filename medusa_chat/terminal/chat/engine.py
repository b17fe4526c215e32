"""What the terminal asks of an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from medusa_chat.config import Message, Sampling
    from medusa_chat.events import Candidates, Step


class Trees(Protocol):
    """Chooses what each step verifies."""

    @property
    def copies(self) -> bool:
        """Whether steps propose copied text too."""

    def use(self, tree: str) -> None:
        """Switch to `auto`, `retune` (auto, with steps timed anew), a tree by name, or a JSON file.

        Raises UserError.
        """

    def use_copies(self, on: bool) -> None:
        """Propose copied text from now on, or no longer."""

    def describe(self) -> str:
        """Describe the tree in use in one line."""

    def names(self) -> list[str]:
        """List the names that `use` takes."""


class ChatEngine(Protocol):
    """What can be chatted with. `medusa_chat.decoding.engine.Engine` is the one that decodes."""

    name: str  # of the model
    prefilled: int  # prompt tokens that the last reply had to prefill; the rest came from the cache
    prefill_seconds: float  # time that this took
    context: int  # tokens that prompt and reply may hold together
    system: str  # the model's default system prompt, maybe empty
    notices: list[
        str
    ]  # what the user should be told once, such as a pruned tree; drained by the reader

    def generate(self, prompt: list[int] | list[Message], sampling: Sampling) -> Iterator[Step]:
        """Decode a reply; may be closed at any time. Raises UserError for a prompt that does not fit."""

    @property
    def trees(self) -> Trees:
        """The trees, and what chooses among them."""

    @property
    def heads(self) -> int:
        """Medusa heads; 0 if the model has none."""

    @property
    def tokens_in_context(self) -> int:
        """Tokens that the cache holds now."""

    def candidates(self) -> Candidates | None:
        """The tree of the last tree step, or None before the first."""
