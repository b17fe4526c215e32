"""Weights that hold NaN or infinity are found, and named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medusa_chat.config import UserError

if TYPE_CHECKING:
    from torch import Tensor


def check_tables(model: Any, name: str) -> None:
    """Refuse NaN and infinity in the embeddings and the LM head, of which few rows are tried.

    A damaged weight of a layer shows in any logits; see `Backbone`.
    """
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(part, "weight", None)
        if weight is not None and weight.is_floating_point() and not all_finite(weight):
            label = next(key for key, value in model.named_parameters() if value is weight)
            raise UserError(f"cannot load the model {name}: weight {label} holds NaN or infinity")


def all_finite(tensor: Tensor) -> bool:
    """Tell if a tensor has neither NaN nor infinity, without a copy of it."""
    return not tensor.numel() or all(bool(bound.isfinite()) for bound in tensor.aminmax())
