"""What a config says of heads, to be compared with what their tensors are."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from medusa_chat.config import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def read_config(file: Path) -> dict[str, Any]:
    """A config.json; raises UserError for one that is there and cannot be read. {} if there is none."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {file}: {str(error).splitlines()[0]}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no settings by name")
    return config


def said_otherwise(file: Path, facts: Mapping[str, int]) -> list[str]:
    """Where a config contradicts the tensors beside it, a line each.

    Args:
        facts: heads, layers, shared, biases, as the tensors have them.
    """
    try:
        said = _said(read_config(file))
    except UserError as error:
        return [str(error)]
    lines = []
    for what, value in said.items():
        if value != facts[what]:
            shown = (
                f"{value} {what}"
                if what in ("heads", "layers")
                else ("" if value else "no ") + _WORDS[what]
            )
            found = (
                str(facts[what])
                if what in ("heads", "layers")
                else "some"
                if facts[what]
                else "none"
            )
            lines.append(
                f"{file} says that there are {shown}; the tensors tell {found}, and are believed"
            )
    return lines


_WORDS = {"shared": "heads that share an LM head", "biases": "biases"}


def _said(config: Mapping[str, Any]) -> dict[str, Any]:
    vllm = config.get("model_type") == "medusa"
    nested = config.get("medusa") if isinstance(config.get("medusa"), dict) else {}
    keys = {
        "heads": ["medusa_num_heads", "num_medusa_heads", *(["num_heads"] if vllm else [])],
        "layers": [
            "medusa_num_layers",
            "num_medusa_layers",
            *(["num_hidden_layers"] if vllm else []),
        ],
        "shared": ["original_lm_head"] if vllm else [],
        "biases": ["medusa_fc_bias"] if vllm else [],
    }
    merged = {**config, **(nested or {})}
    found = {
        what: merged[key]
        for what, names in keys.items()
        for key in names
        if merged.get(key) is not None
    }
    if str(config.get("version")) == "2" and "medusa_num_heads" in config:
        found["shared"] = True
    return found
