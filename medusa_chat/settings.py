"""Fields of settings classes: help texts, values read from text, checks. No torch here."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import field, fields
from math import inf, isfinite
from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

T = TypeVar("T")

UNITS = {"s": 1, "m": 60, "h": 3600}


class UserError(Exception):
    """A mistake that the user can correct. Its message is one line; the exit status is 2."""


class Duration(float):
    """Seconds, written as 90s, 10m or 2h."""

    def __str__(self) -> str:
        for letter, length in reversed(UNITS.items()):
            if self and self % length == 0:
                return f"{self / length:.0f}{letter}"
        return f"{self:g}s"

    @classmethod
    def read(cls, name: str, text: str) -> Duration:
        """Read a duration, in seconds without a unit. Raises UserError that names the field."""
        length = UNITS.get(text[-1:])
        with suppress(ValueError):
            seconds = float(text[:-1] if length else text) * (length or 1)
            if 0 <= seconds < inf:
                return cls(seconds)
        raise UserError(f"{name} must be a time such as 90s, 10m or 2h, not {text!r}")


def setting(default: T, help: str, *, flag: str = "") -> T:
    """Declare a field of a settings class.

    Args:
        default: the field's default.
        help: its help text, for `--help` and `/set`.
        flag: its command-line flag, unless that is the field's name.
    """
    made: T = field(default=default, metadata={"help": help, "flag": flag})
    return made


def help_of(settings: type) -> dict[str, str]:
    """Return the help text of each field that has one."""
    return {
        each.name: each.metadata["help"] for each in fields(settings) if "help" in each.metadata
    }


def make(settings: type[T], values: Mapping[str, Any]) -> T:
    """Build settings from values by name. Raises UserError for an unknown name or a bad value."""
    check_names(settings, values)
    return settings(**values)


def check_names(settings: type, names: Iterable[str]) -> None:
    """Raise UserError for a name that is no field of a settings class."""
    known = get_type_hints(settings)
    for name in names:
        listed = ", ".join(known)
        require(name in known, f"there is no setting {name!r}; the settings are {listed}")


def parse_value(name: str, kind: Any, text: str) -> Any:
    """Read `text` as a value of a settings field. Raises UserError that names the field."""
    if get_origin(kind) in (Union, UnionType):
        kind = get_args(kind)[0]
    if kind is bool:
        if text.lower() not in ("on", "off", "true", "false", "yes", "no"):
            raise UserError(f"{name} must be on or off, not {text!r}")
        return text.lower() in ("on", "true", "yes")
    if get_origin(kind) is tuple:
        return (text.replace("\\n", "\n").replace("\\t", "\t"),) if text else ()
    if kind is Duration:
        return Duration.read(name, text)
    if kind in (int, float):
        return _parse_number(name, kind, text)
    return Path(text) if kind is Path else text


def _parse_number(name: str, kind: type[int] | type[float], text: str) -> float:
    wanted = "a whole number" if kind is int else "a number"
    try:
        value = kind(text)
    except ValueError:
        raise UserError(f"{name} must be {wanted}, not {text!r}") from None
    require(kind is int or isfinite(value), f"{name} must be a finite number, not {text!r}")
    return value


def check_choices(settings: Any) -> None:
    """Raise UserError if a Literal field has another value."""
    for name, kind in get_type_hints(type(settings)).items():
        if get_origin(kind) is Literal:
            known = get_args(kind)
            value = getattr(settings, name)
            require(value in known, f"{name} must be one of {', '.join(known)}, not {value!r}")


def require_above(settings: Any, low: float, *names: str) -> None:
    """Raise UserError unless these fields are finite and above `low`."""
    for name in names:
        value = getattr(settings, name)
        require(low < value < inf, f"{name} must be above {low}, not {value}")


def require_at_least(settings: Any, low: float, *names: str) -> None:
    """Raise UserError unless these fields are finite and `low` or more."""
    for name in names:
        value = getattr(settings, name)
        require(low <= value < inf, f"{name} must be {low} or more, not {value}")


def require_between(settings: Any, low: float, high: float, *names: str) -> None:
    """Raise UserError unless these fields are in a closed range."""
    for name in names:
        value = getattr(settings, name)
        require(low <= value <= high, f"{name} must be between {low} and {high}, not {value}")


def require(holds: bool, complaint: str) -> None:
    """Raise UserError with this complaint unless the condition holds."""
    if not holds:
        raise UserError(complaint)
