"""Random models of a known shape, to measure steps where nothing can be downloaded.

    python -m medusa_chat.bench.random_model SHAPE FOLDER

Only one layer is drawn. The others are copies of it, with the rows in another order (on disk) or
with other signs in the norms (in memory). So a 7B model takes seconds, and at most one layer of it
is held in 16 bits at a time.
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
from medusa_chat.files import replacing, write_json, write_text
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

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


def random_model(
    shape: Shape, *, quant: Quant, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Any:
    """Make transformers' Llama of a shape with random weights, its layers' matrices in `quant`."""
    config = llama_config(shape)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    body = model.model
    size = (shape.vocabulary, shape.hidden)
    body.embed_tokens.weight = _drawn(size, config, dtype, generator)
    model.lm_head.weight = body.embed_tokens.weight
    if not shape.tied:
        model.lm_head.weight = _drawn(size, config, dtype, generator)
    _fill_layers(body.layers, config, quant, dtype, generator)
    body.norm.weight = _drawn((shape.hidden,), config, dtype, generator)
    body.rotary_emb = type(body.rotary_emb)(config).to(device)
    if quant != "none":  # recorded as in a loaded model
        config.quantization_config = quantization_config(quant, compute_dtype(device, dtype))
    return model.eval()


def _fill_layers(
    layers: Any, config: LlamaConfig, quant: Quant, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Draw the matrices of the first layer, copy them to the others, and draw all norms."""
    first: dict[str, nn.Module] = {}
    for layer in layers:
        for name, module in list(layer.named_modules()):
            if not isinstance(module, nn.Linear):
                if hasattr(module, "weight"):  # a norm
                    module.weight = _signs(config.hidden_size, dtype, generator)
            elif name in first:
                layer.set_submodule(name, copy_linear(first[name]))
            else:
                module.weight = _drawn(tuple(module.weight.shape), config, dtype, generator)
                first[name] = quantize_linear(module, quant, generator.device)
                layer.set_submodule(name, first[name])


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
    """Make random heads for a model of that shape, with LM heads of their own or without."""
    with torch.device("meta"):
        made = MedusaHeads(heads, layers, shape.hidden, shape.vocabulary if own else None).to(dtype)
    spread = llama_config(shape).initializer_range
    generator = torch.Generator(device or "cpu").manual_seed(seed)
    made.to_empty(device=device or "cpu").requires_grad_(False)
    made.weight.normal_(0, spread, generator=generator)
    made.bias.zero_()
    if made.lm_heads is not None:
        made.lm_heads[0].normal_(0, spread, generator=generator)
        for head in range(1, heads):
            made.lm_heads[head] = made.lm_heads[0].roll(head, 0)
    return made


def write_random_model(shape: Shape, folder: Path, *, heads: int, own: bool, seed: int = 0) -> None:
    """Write a random checkpoint in bfloat16: one shard for each layer, heads, a tokenizer.

    The tokenizer is the bundled model's. Each file is written whole or not at all, config.json
    last. `heads` 0 writes no heads.

    Raises:
        UserError: the vocabulary is smaller than the tokenizer's.
        OSError: the folder cannot be written.
    """
    tokens = json.loads((BUNDLED / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    if shape.vocabulary < tokens:
        raise UserError(
            "a random model gets the bundled tokenizer, which needs a vocabulary of"
            f" {tokens} or more"
        )
    folder.mkdir(parents=True, exist_ok=True)
    config = llama_config(shape)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    for name in TOKENIZER_FILES:
        with replacing(folder / name) as temporary:
            shutil.copyfile(BUNDLED / name, temporary)
    if heads:
        write_heads(random_heads(shape, heads, own, seed=seed + 1), folder)
    _write_shards(config, folder, seed)
    write_text(folder / "config.json", config.to_json_string())


def _write_shards(config: LlamaConfig, folder: Path, seed: int) -> None:
    files: dict[str, str] = {}
    size = 0
    for shard, tensors in enumerate(_shards(config, seed), 1):
        name = f"model-{shard:05}-of-{config.num_hidden_layers + 1:05}.safetensors"
        with replacing(folder / name) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    write_json(folder / "model.safetensors.index.json", index)


def llama_config(shape: Shape) -> LlamaConfig:
    """Make transformers' config of a shape."""
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
    """Yield weights by name: all outside the layers in the first shard, then layer by layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]

    def drawn(name: str) -> Tensor:
        return _drawn(tuple(state[name].shape), config, torch.bfloat16, generator).data

    yield {name: drawn(name) for name in state if ".layers." not in name}
    prefix = "model.layers.0."
    first = [name for name in state if name.startswith(prefix)]
    layer = {name.removeprefix(prefix): drawn(name) for name in first}
    for number in range(config.num_hidden_layers):
        start = f"model.layers.{number}."
        yield {start + name: tensor.roll(number, 0) for name, tensor in layer.items()}


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
    """Write the random model that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--heads", type=int, default=5, help="Medusa heads; 0 writes none")
    parser.add_argument("--shared", action="store_true", help="heads share the backbone's LM head")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    own = not options.shared
    try:
        write_random_model(shape, options.folder, heads=options.heads, own=own, seed=options.seed)
    except (OSError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
