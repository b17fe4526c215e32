"""Changing the model in the middle of a conversation."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Protocol

from rich.console import Group
from rich.text import Text

from medusa_chat.config import MemoryShortageError, UserError, out_of_memory
from medusa_chat.sampling import change_defaults
from medusa_chat.terminal.chat.errors import LoadError, error_line
from medusa_chat.terminal.chat.kept import Place
from medusa_chat.terminal.chat.loading import DownloadProgress, Loading
from medusa_chat.terminal.theme import LABEL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from medusa_chat.terminal.chat.command import Chat
    from medusa_chat.terminal.chat.engine import ChatEngine


class Models(Protocol):
    """The models that a chat can change to."""

    def names(self) -> Iterable[str]:
        """Return the names that the list of models has."""

    def load(self, place: Place, progress: DownloadProgress) -> ChatEngine:
        """Load a model. Raises UserError or whatever else loading raises."""

    def size(self, place: Place) -> int:
        """Return the bytes that a loaded model occupies; 0 if they are unknown."""


def switch(
    chat: Chat, models: Models | None, name: str, wait: Callable[[Loading], ChatEngine]
) -> Group:
    """Load another model and let the conversation go on with it; return what to print.

    Args:
        chat: keeps its model if the other one cannot be loaded.
        models: what there is to load.
        name: of the model, as `--model` takes it.
        wait: waits for a model that is being loaded.

    Raises:
        UserError: the model cannot be loaded; the present one is still in use.
        LoadError: the present one had to be freed, and cannot be loaded again either.
    """
    if models is None:
        raise UserError("this chat has no other models")
    place = Place(name).whole()
    present = chat.session.engine
    try:
        engine = wait(_begin(models, place))
    except KeyboardInterrupt:
        raise UserError(f"still using {present.name}") from None
    except LoadError as error:
        if not _fits_alone(models, chat.keeper.place, error.reason):
            raise _refusal(error, present.name) from None
        engine = _in_its_place(chat, models, place, wait)
    session = chat.session
    session.use(engine)
    session.sampling, line = change_defaults(session.sampling, present.defaults, engine.defaults)
    chat.keeper.place = place
    words = f"you now chat with {engine.name}"
    if count := len(session.messages):
        words += f"; it reads the {count} messages of the conversation before it answers"
    lines = [Text(each, LABEL) for each in (words, line) if each]
    return Group(*lines, chat.legend())


def _begin(models: Models, place: Place) -> Loading:
    return Loading(partial(models.load, place), place.model or "bundled")


def _refusal(error: LoadError, present: str) -> UserError:
    return UserError(f"{error_line(error.reason)}; still using {present}")


def _fits_alone(models: Models, present: Place, reason: BaseException) -> bool:
    """Tell if a model that did not fit may do so once the present one is freed."""
    if isinstance(reason, MemoryShortageError):
        return reason.missing <= models.size(present)
    return out_of_memory(reason)


def _in_its_place(
    chat: Chat, models: Models, place: Place, wait: Callable[[Loading], ChatEngine]
) -> ChatEngine:
    """Free the present model and load another one; bring it back if that fails."""
    present = chat.session.engine
    present.close()
    try:
        return _uninterrupted(wait, _begin(models, place))
    except LoadError as error:
        chat.session.engine = _uninterrupted(wait, _begin(models, chat.keeper.place))
        raise _refusal(error, present.name) from None


def _uninterrupted(wait: Callable[[Loading], ChatEngine], loading: Loading) -> ChatEngine:
    """Wait on after Ctrl-C: without a model there is no chat."""
    while True:
        with suppress(KeyboardInterrupt):
            return wait(loading)
