"""The files that a run leaves: heads, and for a joint recipe the trained backbone."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from medusa_chat.config import ACCURACY_FILE, ModelSpec, Quant, Recipe
from medusa_chat.files import digest
from medusa_chat.model.heads import MedusaHeads
from medusa_chat.model.layouts import OWN_HEADS, write_heads
from medusa_chat.model.pretrained import load_pretrained
from medusa_chat.training.evaluate import perplexity
from medusa_chat.training.trainee import adapt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from medusa_chat.training.data import PackedRows

State = dict[str, Any]  # a trainee's trained weights by name


def save_heads(state: State, like: MedusaHeads, out: Path) -> Path:
    """Write the heads of a trainee's state in the sizes of `like`; returns the file.

    What the state lacks was frozen, and is as in `like`. Accuracies that were measured with other
    heads are removed.
    """
    before = digest(out / OWN_HEADS)
    own = None if like.lm_heads is None else like.lm_heads.shape[1]
    bias = like.parent_bias
    heads = MedusaHeads(
        like.heads,
        like.layers,
        like.weight.shape[-1],
        own,
        vocabulary=like.vocabulary,
        parent_bias=0 if bias is None else bias.rank,
        size=None if bias is None else len(bias.first),
    )
    heads.load_state_dict(like.state_dict() | _part(state, "heads."))
    file = write_heads(heads, out)
    if digest(file) != before:
        (out / ACCURACY_FILE).unlink(missing_ok=True)
    return file


def save_backbone(state: State, spec: ModelSpec, recipe: Recipe, out: Path) -> None:
    """Write the trained backbone and its tokenizer in the precision of the backbone's files.

    An adapter is merged in float32 into weights of full precision, even if it was trained on
    quantized ones.
    """
    backbone, tokenizer = load_pretrained(spec, None)
    dtype = backbone.dtype
    backbone.float()
    adapter = adapt(backbone, recipe) if recipe.lora_rank else None
    trained = _part(state, "backbone.")
    if adapter:
        trained = {name: tensor for name, tensor in trained.items() if "lora_" in name}
    unknown = backbone.load_state_dict(trained, strict=False).unexpected_keys
    assert trained
    assert not unknown, unknown
    merged = adapter.merge_and_unload() if adapter else backbone
    with TemporaryDirectory(dir=out, prefix=".backbone-") as folder:
        merged.to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _move_into(out, Path(folder))


def _move_into(out: Path, folder: Path) -> None:
    """Move files to `out`, config.json last: a folder without it is no model."""
    for file in sorted(folder.iterdir(), key=lambda file: file.name == "config.json"):
        if file.is_dir():  # additional chat templates
            shutil.copytree(file, out / file.name, dirs_exist_ok=True)
        else:
            os.replace(file, out / file.name)


def perplexity_of(spec: ModelSpec, rows: PackedRows, quant: Quant, device: torch.device) -> float:
    """Perplexity of a model's backbone, loaded for this and quantized as it was trained."""
    gc.collect()  # models before it, which refer to themselves
    backbone, _ = load_pretrained(spec, None, quant.replace("none", "auto"), device)
    return perplexity(backbone, rows)


def _part(state: State, prefix: str) -> dict[str, Tensor]:
    names = [name for name in state if name.startswith(prefix)]
    return {name.removeprefix(prefix): state[name] for name in names}
