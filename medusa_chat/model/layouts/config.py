"""Configs in the folders of heads, and where they contradict the tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medusa_chat.config import UserError
from medusa_chat.files import read_json
from medusa_chat.text import reason_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# Keys that layouts have for each fact of heads; those of vLLM have a meaning in its configs only.
KEYS = {
    "heads": ("medusa_num_heads", "num_medusa_heads"),
    "layers": ("medusa_num_layers", "num_medusa_layers"),
}
VLLM_KEYS = {
    "heads": (*KEYS["heads"], "num_heads"),
    "layers": (*KEYS["layers"], "num_hidden_layers"),
    "shared": ("original_lm_head",),
    "biases": ("medusa_fc_bias",),
}
FLAGS = {"shared": "heads that share an LM head", "biases": "biases"}


def read_config(file: Path) -> dict[str, Any]:
    """Read a config.json; returns {} if there is none.

    Raises:
        UserError: the file cannot be read or is no JSON object.
    """
    try:
        config = read_json(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {reason_of(error)}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} is no JSON object")
    return config


def contradictions(file: Path, facts: Mapping[str, int]) -> list[str]:
    """List where a config contradicts the tensors, a line each.

    Args:
        file: the config.json, which may be missing.
        facts: `heads`, `layers`, `shared` and `biases` of the tensors.
    """
    try:
        claims = _claims(read_config(file))
    except UserError as error:
        return [str(error)]
    return [
        f"{file} claims {_described(fact, value)}, but the tensors hold"
        f" {_counted(fact, facts[fact])}; the tensors are used"
        for fact, value in claims.items()
        if value != facts[fact]
    ]


def _described(fact: str, value: Any) -> str:
    if fact not in FLAGS:
        return f"{value} {fact}"
    return FLAGS[fact] if value else f"no {FLAGS[fact]}"


def _counted(fact: str, value: int) -> str:
    if fact not in FLAGS:
        return str(value)
    return "some" if value else "none"


def _claims(config: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of heads as a config has them."""
    keys: Mapping[str, tuple[str, ...]] = KEYS
    if config.get("model_type") == "medusa":
        keys = VLLM_KEYS
    nested = config.get("medusa")
    if isinstance(nested, dict):
        config = {**config, **nested}
    claims = {
        fact: config[name]
        for fact, names in keys.items()
        for name in names
        if config.get(name) is not None
    }
    if str(config.get("version")) == "2" and "medusa_num_heads" in config:
        claims["shared"] = True
    return claims
