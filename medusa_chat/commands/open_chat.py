"""The chat as the command line opens it: its conversation, its model, and other models."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from platformdirs import user_state_path

from medusa_chat.commands.flags import load_engine
from medusa_chat.config import ChatOptions, LoadOptions, UserError
from medusa_chat.hub.model_list import known_models, resolve_model
from medusa_chat.terminal.chat.archive import Archive, archive_file
from medusa_chat.terminal.chat.keeping import Keeper
from medusa_chat.terminal.chat.kept import Kept, Place
from medusa_chat.terminal.chat.repl import chat
from medusa_chat.terminal.chat.start import Start

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping
    from typing import Any

    from medusa_chat.decoding.engine import Engine
    from medusa_chat.terminal.chat.loading import DownloadProgress


def open_chat(
    options: argparse.Namespace,
    chosen: ChatOptions,
    load_options: LoadOptions,
    given: Mapping[str, Any],
    flags: Mapping[str, Any],
) -> int:
    """Open the chat; return the exit status.

    Args:
        options: of the command line: model, heads, latest and resume are read.
        chosen: options of the chat.
        load_options: how models are loaded.
        given: settings of Sampling by name, of the command line and the settings file.
        flags: those of the command line alone, which win over those of a kept conversation.
    """
    archive = Archive(archive_file())
    kept = _resumed(archive, options, flags)
    place = Place(options.model, options.heads)
    if kept and place == Place():
        place = kept.place
    spec = resolve_model(place.model, place.heads, models=load_options.models)
    start = Start(
        model=spec.name,
        description=spec.description,
        history=user_state_path("medusa-chat") / "history",
        given=given,
        options=chosen,
        keeper=Keeper(archive, place.whole(), private=chosen.private),
        resumed=kept,
        models=OtherModels(load_options),
    )
    return chat(partial(_load, place, load_options), start)


def _resumed(
    archive: Archive, options: argparse.Namespace, flags: Mapping[str, Any]
) -> Kept | None:
    """Return the kept conversation that the command line names."""
    if not (options.latest or options.resume):
        return None
    if options.transcript:
        raise UserError("--transcript continues its own conversation: leave --resume out")
    summary = archive.find(options.resume) if options.resume else archive.latest()
    kept = archive.read(summary.number)
    changes = {name: value for name, value in flags.items() if name != "system"}
    conversation = replace(
        kept.conversation,
        sampling=replace(kept.conversation.sampling, **changes),
        system=flags.get("system", kept.conversation.system),
    )
    return kept._replace(conversation=conversation)


def _load(place: Place, options: LoadOptions, progress: DownloadProgress) -> Engine:
    """Load a model, and take its first steps while nobody waits for them."""
    from medusa_chat.decoding.warming import warm_up

    engine = load_engine(place.model, place.heads, options, progress)
    warm_up(engine)
    return engine


class OtherModels:
    """The models that a chat can change to; they are loaded with the chat's own options."""

    def __init__(self, options: LoadOptions) -> None:
        self._options = options

    def names(self) -> list[str]:
        """Return the names that the lists of models have."""
        return [*known_models(self._options.models)]

    def load(self, place: Place, progress: DownloadProgress) -> Engine:
        """Load a model."""
        import gc

        gc.collect()  # of a model that was freed
        options = replace(self._options, template="")  # that of another model
        return _load(place, options, progress)

    def size(self, place: Place) -> int:
        """Return the bytes that a loaded model occupies; 0 if they are unknown."""
        from medusa_chat.machine import plans
        from medusa_chat.machine.contents import contents_of
        from medusa_chat.machine.devices import likely_device
        from medusa_chat.native.library import likely

        options = self._options
        device = likely_device(options.device)
        native = likely(device, options.engine)
        spec = resolve_model(
            place.model, place.heads, options.quant, options.quant_heads, options.models
        )
        contents = contents_of(spec)
        if contents is None:
            return 0
        load = plans.load_of(spec, device, options.context, native=native)
        parts = plans.plan(contents, load).parts()
        return parts["layers"] + parts["plain"] + parts["packed"] + parts["heads"] + parts["cache"]
