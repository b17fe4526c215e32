"""Checks of a config's values that transformers leaves to whoever computes with them."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from medusa_chat.config import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COUNTS = ("num_hidden_layers", "max_position_embeddings")
MOST = 1 << 31  # more layers or positions than any model has


def check_values(file: Path, config: Any) -> None:
    """Raise UserError, with the file's name, for a value that no step could compute with."""
    text = config.get_text_config()
    if not isinstance(text, PretrainedConfig):
        raise UserError(f"cannot read {file}: text_config is no JSON object of a known model")
    for name in COUNTS:
        count = getattr(text, name, None)
        if count is not None and not 1 <= count < MOST:
            raise UserError(f"cannot read {file}: {name} must be 1 or more, and less than {MOST:,}")
    if not isinstance(getattr(text, "sliding_window", None), int | None):
        raise UserError(f"cannot read {file}: sliding_window must be a whole number or null")
    for base in _rotary_bases(getattr(text, "rope_parameters", None)):
        if not (isinstance(base, int | float) and 0 < base < inf):
            raise UserError(f"cannot read {file}: rope_theta must be a number above 0")


def _rotary_bases(parameters: Any) -> Iterator[Any]:
    """Yield the bases of rotary positions, of all layers or of each kind of layers."""
    for name, value in parameters.items() if isinstance(parameters, dict) else ():
        if name == "rope_theta":
            yield value
        else:
            yield from _rotary_bases(value)
