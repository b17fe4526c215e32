"""Random models of a known shape, to measure what a step costs where nothing can be downloaded.

    python -m medusa_chat.bench.random_model SHAPE FOLDER

One layer is drawn; the others are that layer with its rows in another order (on disk) or with other signs in the norms
(in memory). So a 7B model takes seconds, and never more than one layer of it is held in 16 bits beside the result.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_chat.config import BUNDLED, Quant, UserError
from medusa_chat.model.heads import MedusaHeads
from medusa_chat.model.layouts import write_heads
from medusa_chat.model.linear.quantization import (
    compute_dtype,
    copy_linear,
    quantization_config,
    quantize_linear,
)
from medusa_chat.shapes import SHAPES, Shape

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


def random_model(
    shape: Shape, *, quant: Quant, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Any:
    """Transformers' Llama of a shape with random weights on `device`, the layers' matrices in `quant`."""
    config = llama_config(shape)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    body, size = model.model, (shape.vocabulary, shape.hidden)
    body.embed_tokens.weight = _drawn(size, config, dtype, generator)
    model.lm_head.weight = (
        body.embed_tokens.weight if shape.tied else _drawn(size, config, dtype, generator)
    )
    first: dict[str, nn.Module] = {}
    for layer in body.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                if name in first:
                    layer.set_submodule(name, copy_linear(first[name]))
                    continue
                module.weight = _drawn(tuple(module.weight.shape), config, dtype, generator)
                first[name] = quantize_linear(module, quant, device)
                layer.set_submodule(name, first[name])
            elif hasattr(module, "weight"):  # a norm
                module.weight = _signs(shape.hidden, dtype, generator)
    body.norm.weight = _drawn((shape.hidden,), config, dtype, generator)
    body.rotary_emb = type(body.rotary_emb)(config).to(device)
    if quant != "none":
        config.quantization_config = quantization_config(
            quant, compute_dtype(device, dtype)
        )  # as a loaded model's
    return model.eval()


def random_heads(
    shape: Shape,
    heads: int,
    own: bool,
    *,
    layers: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | None = None,
    seed: int = 0,
) -> MedusaHeads:
    """Random heads for a model of that shape, with LM heads of their own or without."""
    with torch.device("meta"):
        made = MedusaHeads(heads, layers, shape.hidden, shape.vocabulary if own else None).to(dtype)
    config, generator = llama_config(shape), torch.Generator(device or "cpu").manual_seed(seed)
    made.to_empty(device=device or "cpu").requires_grad_(False)
    made.weight.normal_(0, config.initializer_range, generator=generator)
    made.bias.zero_()
    if made.lm_heads is not None:
        made.lm_heads[0].normal_(0, config.initializer_range, generator=generator)
        for head in range(1, heads):
            made.lm_heads[head] = made.lm_heads[0].roll(head, 0)
    return made


def write_random_model(shape: Shape, folder: Path, *, heads: int, own: bool, seed: int = 0) -> None:
    """Write a random model of a shape as a checkpoint in bfloat16, a shard a layer, with heads and a tokenizer.

    The tokenizer is the bundled model's. `heads` 0 writes no heads.

    Raises:
        UserError: the vocabulary is smaller than the tokenizer's.
        OSError: the disk is full, or the folder can't be written.
    """
    tokens = json.loads((BUNDLED / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    if shape.vocabulary < tokens:
        raise UserError(
            f"a random model gets the bundled tokenizer, which needs a vocabulary of {tokens} or more"
        )
    folder.mkdir(parents=True, exist_ok=True)
    config = llama_config(shape)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copyfile(BUNDLED / name, folder / name)
    places: dict[str, str] = {}
    size = 0
    for shard, tensors in enumerate(_shards(config, seed), 1):
        file = f"model-{shard:05}-of-{shape.layers + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=1), encoding="utf-8"
    )
    if heads:
        write_heads(random_heads(shape, heads, own, seed=seed + 1), folder)


def llama_config(shape: Shape) -> LlamaConfig:
    """Transformers' config of a shape."""
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
    )


def _shards(config: LlamaConfig, seed: int) -> Iterator[dict[str, Tensor]]:
    """The weights by name: a shard for what lies around the layers, and one for each layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        sizes = {
            name: tuple(tensor.shape)
            for name, tensor in LlamaForCausalLM(config).state_dict().items()
        }
    if config.tie_word_embeddings:
        del sizes["lm_head.weight"]
    first = "model.layers.0."
    around = {name: size for name, size in sizes.items() if ".layers." not in name}
    yield {
        name: _drawn(size, config, torch.bfloat16, generator).data for name, size in around.items()
    }
    drawn = {
        name.removeprefix(first): _drawn(size, config, torch.bfloat16, generator).data
        for name, size in sizes.items()
        if name.startswith(first)
    }
    for layer in range(config.num_hidden_layers):
        yield {
            f"model.layers.{layer}.{name}": tensor.roll(layer, 0) for name, tensor in drawn.items()
        }


def _drawn(
    size: tuple[int, ...], config: LlamaConfig, dtype: torch.dtype, generator: torch.Generator
) -> nn.Parameter:
    """A matrix as transformers initializes it, or the ones of a norm."""
    made = torch.empty(size, dtype=dtype, device=generator.device)
    if len(size) == 1:
        made.fill_(1)
    else:
        made.normal_(0, config.initializer_range, generator=generator)
    return nn.Parameter(made, requires_grad=False)


def _signs(size: int, dtype: torch.dtype, generator: torch.Generator) -> nn.Parameter:
    signs = torch.randint(0, 2, (size,), device=generator.device, generator=generator) * 2 - 1
    return nn.Parameter(signs.to(dtype), requires_grad=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--heads", type=int, default=5, help="Medusa heads; 0 writes none (default: 5)"
    )
    parser.add_argument("--shared", action="store_true", help="heads share the backbone's LM head")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        write_random_model(
            SHAPES[options.shape],
            options.folder,
            heads=options.heads,
            own=not options.shared,
            seed=options.seed,
        )
    except (OSError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
