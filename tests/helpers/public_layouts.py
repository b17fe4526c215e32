"""Files of heads as other programs write them, with names spelled out as the reference."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from pathlib import Path

    from medusa_chat.model.heads import MedusaHeads

BLOCKS = {
    "official": "{h}.{b}.linear.{kind}",
    "v1.0": "medusa_head.{h}.{b}.linear.{kind}",
    "modelopt": "medusa_heads.{h}.{b}.linear.{kind}",
    "tensorrt-llm engine": "medusa_heads.{h}.medusa_layers.{b}.linear.{kind}",
    "vllm": "blocks.{h}.layers.{b}.{kind}",
}
LM_HEADS = {
    "official": "{h}.{b}.weight",
    "v1.0": "medusa_head.{h}.{b}.weight",
    "modelopt": "medusa_heads.{h}.{b}.weight",
    "tensorrt-llm engine": "medusa_heads.{h}.lm_head.weight",
    "vllm": "lm_heads.{h}.weight",
}


def tensors_of(heads: MedusaHeads, layout: str, biases: bool = True) -> dict[str, Tensor]:
    """Return tensors by the names of a layout; `official` is v0.1 or v2, as the heads are."""
    found = {}
    for h in range(heads.heads):
        for b in range(heads.layers):
            found[BLOCKS[layout].format(h=h, b=b, kind="weight")] = heads.weight[b, h].clone()
            if biases:
                found[BLOCKS[layout].format(h=h, b=b, kind="bias")] = heads.bias[b, h].clone()
        if heads.lm_heads is not None:
            found[LM_HEADS[layout].format(h=h, b=heads.layers)] = heads.lm_heads[h].clone()
    return found


def logits_of(heads: MedusaHeads, lm_head: Tensor) -> Tensor:
    """Guess for fixed hidden states, alike whoever owns the LM heads: [K, n, V]."""
    hidden = torch.randn(5, heads.weight.shape[-1], generator=torch.Generator().manual_seed(3))
    own = [lm_head] * heads.heads if heads.lm_heads is None else heads.lm_heads
    with torch.no_grad():
        pairs = zip(heads.float().features(hidden), own, strict=True)
        return torch.stack([functional.linear(x, w.float()) for x, w in pairs])


def put(tensors: dict[str, Tensor], file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        save_file(tensors, file, {"format": "pt"})
    else:
        torch.save(tensors, file)
    return file


def put_shards(
    shards: list[dict[str, Tensor]], folder: Path, stem: str = "model", suffix: str = ".safetensors"
) -> Path:
    """Write shards of a model and their index; returns the index."""
    names = [f"{stem}-{i:05}-of-{len(shards):05}{suffix}" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        put(shard, folder / name)
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def with_heads(folder: Path, heads: MedusaHeads, layout: str = "v1.0") -> Path:
    """Add heads to the one file of a model folder, as Medusa-2 does."""
    file = folder / "model.safetensors"
    return put(load_file(file) | tensors_of(heads, layout), file)


def settings(folder: Path, **config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config))
