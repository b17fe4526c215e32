"""Positions of a text: how many a model takes, with one encoding of them."""

from __future__ import annotations

from typing import Any

from medusa_chat.config import MAX_CONTEXT, UserError

UNKNOWN_CONTEXT = 4096  # positions of a model whose config has no number of them


def context_of(config: Any) -> int:
    """Return the positions that a model was made for.

    Longrope switches to another encoding where its first part ends.
    """
    positions = int(getattr(config, "max_position_embeddings", None) or UNKNOWN_CONTEXT)
    scaling = getattr(config, "rope_parameters", None) or {}
    if scaling.get("rope_type") == "longrope":
        return min(positions, int(scaling["original_max_position_embeddings"]))
    return positions


def usable_context(wanted: int | None, most: int, model: str) -> int:
    """Return the positions to use of the `most` that a model has.

    Raises:
        UserError: the model cannot hold as many as are wanted.
    """
    context = min(most, MAX_CONTEXT) if wanted is None else wanted
    if not 1 < context <= most:
        raise UserError(f"the context of {model} can hold 2 to {most} tokens, not {context}")
    return context


def fix_positions(model: Any) -> None:
    """Keep longrope and dynamic RoPE from looking at the positions in each forward.

    They change their frequencies for texts that are longer than `context_of` allows.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, dict):  # one for each type of layer
            module.rope_type = dict.fromkeys(kinds, "default")
        elif isinstance(kinds, str):
            module.rope_type = "default"
