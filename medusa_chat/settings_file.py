"""The settings file: TOML in the platform's settings folder. No torch here."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from platformdirs import user_config_path

from medusa_chat.config import ChatOptions, LoadOptions, UserError
from medusa_chat.files import check_ends, expanded, read_text, resolved, write_text
from medusa_chat.sampling import CHAT_DEFAULTS, Sampling
from medusa_chat.settings import help_of, require
from medusa_chat.text import encodable, reason_of

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_BYTES = 1 << 20
CLASSES = (Sampling, LoadOptions, ChatOptions)


class Key(NamedTuple):
    """A key of the file: the field that it sets, and the field's type."""

    field: str
    kind: Any


def settings_file() -> Path:
    """Return the place of the settings file."""
    return user_config_path("medusa-chat") / "settings.toml"


def known_keys() -> dict[str, Key]:
    """Return the keys by name: those of the flags, with _ for -."""
    keys = {"model": Key("model", str), "heads": Key("heads", str)}
    for settings in CLASSES:
        kinds = get_type_hints(settings)
        helps = help_of(settings)
        for field in fields(settings):
            if field.name in helps:
                name = (field.metadata["flag"] or field.name).lstrip("-").replace("-", "_")
                keys[name] = Key(field.name, kinds[field.name])
    return keys


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a file by field; none if there is no file.

    Raises:
        UserError: names the file, and the key that is unknown or has a bad value.
    """
    document = _document(path)
    keys = known_keys()
    values = {}
    for name, value in document.items():
        key = keys.get(name.replace("-", "_"))
        if key is None:
            raise UserError(f"{path}: there is no setting {name!r}{_near(name, keys)}")
        values[key.field] = _value(path, name, key.kind, value)
    _check_ranges(path, values)
    return values


def _document(path: Path) -> dict[str, Any]:
    try:
        check_ends(path)
        return tomllib.loads(read_text(path, MOST_BYTES))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not TOML: {reason_of(error)}") from None


def _near(name: str, keys: Mapping[str, Key]) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), keys, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ", see `medusa-chat --help`"


def _value(path: Path, name: str, kind: Any, value: Any) -> Any:
    """Check a value against a field's type. Raises UserError that names the key."""
    if get_origin(kind) is UnionType:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        require(value in choices, f"{path}: {name} must be one of {', '.join(choices)}")
        return value
    if get_origin(kind) is tuple:
        listed = [value] if isinstance(value, str) else value
        texts = isinstance(listed, list) and all(isinstance(each, str) for each in listed)
        require(texts, f"{path}: {name} must be text, or a list of texts")
        return tuple(listed)
    if kind is Path:
        require(isinstance(value, str), f"{path}: {name} must be a path, in quotes")
        return expanded(value)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    wanted = f"{path}: {name} must be {words[kind]}"
    require(type(value) in ((int, float) if kind is float else (kind,)), wanted)
    try:
        return kind(value)
    except OverflowError:  # an integer of hundreds of digits
        raise UserError(wanted) from None


def _check_ranges(path: Path, values: Mapping[str, Any]) -> None:
    """Raise UserError, with the file's name, for a value that the settings do not allow."""
    for settings in CLASSES:
        names = {field.name for field in fields(settings)}
        try:
            settings(**{name: value for name, value in values.items() if name in names})
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def write_settings(
    path: Path, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> list[str]:
    """Write settings by key into a file. Its other keys, its order and its comments stay.

    Args:
        path: of the file, which may not exist yet.
        values: by key; the default of a setting is written only over another value, and None
            removes a key.
        defaults: those of the model, by name, where they are not the usual ones.

    Returns:
        the keys that were changed.

    Raises:
        UserError: the file is no TOML, or cannot be written; it stays as it was.
    """
    import tomlkit

    before = _document(path)
    spelt = {name.replace("-", "_"): name for name in before}
    plain = {spelt.get(name, name): _plain(value) for name, value in values.items()}
    usual = {name: _default(name) for name in values} | dict(defaults or {})
    effective = {spelt.get(name, name): value for name, value in usual.items()} | before
    changes = {name: value for name, value in plain.items() if effective[name] != value}
    try:
        document = tomlkit.parse(read_text(path, MOST_BYTES) if before else "")
        for name, value in changes.items():
            document.pop(name) if value is None else document.update({name: value})
        if changes:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(resolved(path), tomlkit.dumps(document))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    return [*changes]


def _default(name: str) -> Any:
    """Return the default of a key; None if it has none."""
    if name in CHAT_DEFAULTS:
        return CHAT_DEFAULTS[name]
    for settings in CLASSES:
        for field in fields(settings):
            if field.name == name:
                return _plain(field.default)
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [encodable(each) for each in value]
    return encodable(value) if isinstance(value, str) else value
