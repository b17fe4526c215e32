"""Flags that several sub-commands share. Most are read from the fields of the settings classes."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import Field, asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from medusa_chat.config import RECIPES, LoadOptions, Recipe
from medusa_chat.sampling import CHAT_ONLY, Sampling, choose_settings
from medusa_chat.settings import Duration, help_of, make, parse_value
from medusa_chat.terminal.output import say, warn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from medusa_chat.decoding.engine import Engine

T = TypeVar("T")


def add_fields(
    parser: argparse.ArgumentParser, settings: type, *names: str, **defaults: object
) -> None:
    """Add a flag for each field of a settings class that has a help text.

    Args:
        parser: parser of the sub-command.
        settings: Sampling, Recipe or LoadOptions.
        names: fields to take; all if none is named.
        defaults: other defaults than the fields' own, by name.
    """
    helps = help_of(settings)
    for field in fields(settings):
        if field.name in helps and (not names or field.name in names):
            _add_field(parser, settings, field, defaults.get(field.name))


def add_decoding(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """Add the flags of Sampling for a command without a conversation."""
    names = [name for name in help_of(Sampling) if name not in CHAT_ONLY]
    add_fields(parser, Sampling, *names, **defaults)


def _add_field(
    parser: argparse.ArgumentParser, settings: type, field: Field[Any], default: object
) -> None:
    kind = get_type_hints(settings)[field.name]
    flag = field.metadata["flag"] or "--" + field.name.replace("_", "-")
    note = _default_note(settings, field, default)
    form: dict[str, Any] = {
        "metavar": _metavar(kind),
        "type": partial(parse_value, field.metadata["flag"] or field.name, kind),
    }
    if kind in (bool, bool | None):
        form = {"action": argparse.BooleanOptionalAction}  # a recipe or a file may set it
    elif field.name == "template":
        form = {"action": _Template, "metavar": "NAME"}
    help_text = field.metadata["help"] + note
    parser.add_argument(flag, dest=field.name, default=default, help=help_text, **form)
    if field.name == "tree":
        parser.add_argument(
            "--retune",
            dest="tree",
            action="store_const",
            const="retune",
            help="--tree auto, but time the steps again instead of reading earlier measurements",
        )


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    names = {int: "N", int | None: "N", float: "X", Path | None: "FILE", Duration: "TIME"}
    return names.get(kind, "TEXT")


def _default_note(settings: type, field: Field[Any], default: object) -> str:
    """Name the default of a field, and the recipes that have another one."""
    shown = field.default if default is None else default
    if shown is None or shown is False or shown in ("", ()):
        return ""
    notes = ["on" if shown is True else str(shown)]
    if settings is Recipe:
        changed = {name: changes for name, changes in RECIPES.items() if field.name in changes}
        notes += [f"{name} {changes[field.name]}" for name, changes in changed.items()]
    return f" (default: {', '.join(notes)})"


def given_fields(options: argparse.Namespace, settings: type) -> dict[str, Any]:
    """Return the fields of a settings class that the command line gives, by name."""
    names = {field.name for field in fields(settings)}
    given = vars(options).items()
    return {name: value for name, value in given if name in names and value is not None}


def read_fields(options: argparse.Namespace, settings: type[T], **others: object) -> T:
    """Return the settings that the command line gives, with `others` by name.

    Raises:
        UserError: a value is no such value, or out of range.
    """
    return make(settings, given_fields(options, settings) | others)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a model and its heads."""
    parser.add_argument(
        "--model",
        help="name (see `medusa-chat models`), folder, GGUF file or hub id; default: the bundled"
        " model",
    )
    parser.add_argument(
        "--heads",
        help="Medusa heads: file, folder or hub id; default: those in the backbone's folder",
    )


def add_prompts(
    parser: argparse.ArgumentParser,
    *flags: str,
    limit: int | None = None,
    required: bool = False,
    more: str = "",
) -> None:
    """Add the flags that name files of prompts; their values are `prompts` and `limit`.

    `more` is for the help: what the first flag takes besides files.
    """
    shipped = "" if required else " (default: a few that come with medusa-chat)"
    parser.add_argument(
        *(flags or ("--prompts",)),
        dest="prompts",
        metavar="FILE",
        type=Path,
        nargs="+",
        required=required,
        help=f"MT-Bench, messages or text{more}{shipped}",
    )
    parser.add_argument(
        "--limit", type=count, default=limit, help="prompts to take, in turn from each file"
    )


def count(text: str) -> int:
    """Read a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def counts(text: str) -> tuple[int, ...]:
    """Read numbers separated by commas, in ascending order."""
    return tuple(sorted({count(part) for part in text.split(",")}))


def load_engine(
    model: str | None,
    heads: str | None,
    options: LoadOptions,
    progress: Callable[[str, int, int], None] | None = None,
) -> Engine:
    """Load the engine. Standard error shows a download unless `progress` is called with it."""
    import medusa_chat
    from medusa_chat.terminal.downloads import downloads

    with nullcontext(progress) if progress else downloads() as shown:
        return medusa_chat.load(model, heads, progress=shown, **asdict(options))


def sampling_for(engine: Engine, given: Mapping[str, Any]) -> Sampling:
    """Join a loaded model's defaults with the settings that the user gave; tell what holds."""
    sampling, lines = choose_settings(engine.defaults, given)
    for line in lines:
        warn(line)
    return sampling


class _Template(argparse.Action):
    """Takes the name of a conversation template; `list` prints the names and exits."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,  # noqa: ARG002 - the interface of argparse
    ) -> None:
        if values == "list":
            from fastchat.conversation import conv_templates

            say("\n".join(sorted(conv_templates)))
            parser.exit()
        setattr(namespace, self.dest, values)
