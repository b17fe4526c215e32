"""Tiny models written as GGUF files, as llama.cpp's converter writes real ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from gguf.quants import quantize

from tests.helpers.tiny import CHAT_TEMPLATE, END, SPECIAL, tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FAMILIES = {"gemma3_text": "gemma3"}  # transformers' name: llama.cpp's
CONTROL = 3


def write_gguf(
    file: Path,
    model: Any,
    template: str | None = CHAT_TEMPLATE,
    kind: str = "F32",
    shards: int = 0,
    changed: Mapping[str, tuple[Any, gguf.GGUFValueType]] | None = None,
    **metadata: Any,
) -> Path:
    """Write a transformers model with the tests' tokenizer; matrices of whole blocks in `kind`.

    Args:
        file: its place.
        model: a model of a family that GGUF knows.
        template: the chat template, or None.
        kind: ggml's name of a number format.
        shards: split into this many files, of which the first is returned.
        changed: values of any key and type, which replace those of the model.
        metadata: further values of the family, dots written as `__`.
    """
    config = model.config.get_text_config()
    family = FAMILIES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(file, family, split_max_tensors=_per_shard(model, shards))
    _write_sizes(writer, config)
    for name, value in metadata.items():
        writer.add_float32(f"{family}.{name.replace('__', '.')}", value)
    _write_tokenizer(writer, config.vocab_size, template)
    for key, value in (changed or {}).items():
        writer.kv_data[0][key] = gguf.GGUFValue(*value)
    for name, weight in _tensors(model, family):
        whole = weight.ndim > 1 and weight.shape[-1] % 32 == 0
        form = gguf.GGMLQuantizationType[kind if whole else "F32"]
        writer.add_tensor(name, quantize(weight, form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file if not shards else next(iter(sorted(file.parent.glob(f"{file.stem}-00001-of-*"))))


def _per_shard(model: Any, shards: int) -> int:
    if not shards:
        return 0
    return -(-len(model.state_dict()) // shards)


def _write_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if cap := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(cap)
    if cap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(cap)


def _write_tokenizer(writer: gguf.GGUFWriter, vocabulary: int, template: str | None) -> None:
    own = tokenizer().get_vocab()
    names = {index: name for name, index in own.items()}
    tokens = [names.get(index, f"<unused {index}>") for index in range(vocabulary)]
    special = [CONTROL if token in SPECIAL else 1 for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(special)
    if vocabulary > END:
        writer.add_eos_token_id(END)
    if template:
        writer.add_chat_template(template)


def _tensors(model: Any, family: str) -> list[tuple[str, Any]]:
    config = model.config.get_text_config()
    arch = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    mapping = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    found = []
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        place = mapping.get_name(name, try_suffixes=(".weight", ".bias"))
        assert place is not None, name
        found.append((place, _changed(weight.float().numpy(), name, family, config)))
    return found


def _changed(weight: Any, name: str, family: str, config: Any) -> Any:
    """Change a weight as llama.cpp does: rotary pairs side by side, Gemma's norms plus 1."""
    if family == "llama" and (".q_proj" in name or ".k_proj" in name):
        heads = config.num_attention_heads
        if ".k_proj" in name:
            heads = config.num_key_value_heads
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
    if family.startswith("gemma") and name.endswith("norm.weight"):
        return weight + 1
    return weight
