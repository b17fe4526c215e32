"""What a run leaves: heads, and for a joint recipe the backbone with its adapter merged, as a model of its own."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

from medusa_chat.config import ACCURACY_FILE, ModelSpec, Quant, Recipe
from medusa_chat.model.heads import MedusaHeads
from medusa_chat.model.layouts import write_heads
from medusa_chat.model.pretrained import load_pretrained
from medusa_chat.training.evaluate import perplexity
from medusa_chat.training.trainee import adapt

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from medusa_chat.training.data import PackedRows


def export_heads(state: dict[str, Tensor], like: MedusaHeads, out: Path) -> Path:
    """Write the heads of a trainee's state; returns the file."""
    (out / ACCURACY_FILE).unlink(missing_ok=True)  # what `calibrate` measured of other heads
    vocabulary = None if like.lm_heads is None else like.lm_heads.shape[1]
    heads = MedusaHeads(like.heads, like.layers, like.weight.shape[-1], vocabulary)
    heads.load_state_dict(_under("heads.", state))
    return write_heads(heads, out)


def export_backbone(state: dict[str, Tensor], spec: ModelSpec, recipe: Recipe, out: Path) -> None:
    """Write the trained backbone and its tokenizer, in the precision that its files had.

    An adapter is merged in float32 into weights of full precision, also where it was trained on quantized ones.
    """
    backbone, tokenizer = load_pretrained(spec, None)
    dtype = backbone.dtype
    backbone.float()
    adapter = adapt(backbone, recipe) if recipe.lora_rank else None
    trained = {
        name: tensor
        for name, tensor in _under("backbone.", state).items()
        if not adapter or "lora_" in name
    }
    strangers = backbone.load_state_dict(trained, strict=False).unexpected_keys
    assert trained and not strangers, strangers
    merged = adapter.merge_and_unload() if adapter else backbone
    merged.to(dtype).save_pretrained(out)
    tokenizer.save_pretrained(out)


def perplexity_of(spec: ModelSpec, rows: PackedRows, quant: Quant, device: torch.device) -> float:
    """Perplexity of a model's backbone, loaded for this alone and as it was trained: quantized or not."""
    gc.collect()  # of models in use before, whose parts refer to each other
    backbone, _ = load_pretrained(spec, None, quant.replace("none", "auto"), device)
    return perplexity(backbone, rows)


def _under(prefix: str, state: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
