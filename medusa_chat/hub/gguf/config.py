"""config.json from the metadata of a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medusa_chat.config import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from medusa_chat.hub.gguf.header import Header

CONTROL = 3  # the type of tokens that stand for no text
ROPE_BASE = 10_000.0  # where the file has none
# Tokens that end a reply by their name, as llama.cpp has them: a file names one or two.
ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<EOT>",
    "</s>",
)
LLAMA3_CONTEXT = 8192  # that of Llama 3, from which 3.1 and later are stretched
LARGEST_GEMMAS = {46: 144, 62: 168}  # layers of the 27B models: what attention is scaled by


@dataclass(frozen=True)
class Family:
    """How transformers names a family, and the settings that only it has."""

    model_type: str
    class_name: str
    own: Callable[[Header, dict[str, Any]], dict[str, Any]]


def config_of(header: Header) -> dict[str, Any]:
    """Return the config.json of a model.

    Raises:
        UserError: the family is unknown, a size is missing, or the model has parts that
            medusa-chat does not build.
    """
    family = FAMILIES.get(header.architecture)
    if family is None:
        raise _refusal(
            header,
            f"GGUF files of the family {header.architecture or 'without a name'} cannot be read;"
            f" those of {', '.join(FAMILIES)} can",
        )
    if header.of_family("expert_count"):
        raise _refusal(header, "mixtures of experts cannot be read from GGUF")
    try:
        config = _sizes(header)
    except KeyError as error:
        raise _refusal(header, f"its metadata lacks {error.args[0]}") from None
    config |= {"model_type": family.model_type, "architectures": [family.class_name]}
    config |= _rope_scaling(header)
    return config | _special(header) | family.own(header, config)


def _end_ids(header: Header) -> list[int]:
    """Return the tokens that end a reply: those that the file names, and those known by name."""
    named = (header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    kinds = header.metadata.get("tokenizer.ggml.token_type") or []
    tokens = header.metadata.get("tokenizer.ggml.tokens") or []
    known = {
        index
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind == CONTROL and token in ENDS
    }
    return sorted(known | {int(each) for each in named if each is not None})


def _refusal(header: Header, fault: str) -> UserError:
    return UserError(f"cannot load the model {header.file}: {fault}")


def _sizes(header: Header) -> dict[str, Any]:
    family = header.architecture

    def need(key: str) -> Any:
        return header.metadata[f"{family}.{key}"]

    hidden = int(need("embedding_length"))
    heads = int(need("attention.head_count"))
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise KeyError("the tensor token_embd.weight")
    return {
        "hidden_size": hidden,
        "num_hidden_layers": int(need("block_count")),
        "intermediate_size": int(need("feed_forward_length")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(header.of_family("attention.head_count_kv", heads)),
        "head_dim": int(header.of_family("attention.key_length", hidden // heads)),
        "max_position_embeddings": int(need("context_length")),
        "rms_norm_eps": float(need("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(header.of_family("rope.freq_base", ROPE_BASE)),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "dtype": _dtype(header),
    }


def _dtype(header: Header) -> str:
    """Return the number format that keeps what the file has."""
    types = {tensor.type for tensor in header.tensors.values()}
    if types <= {"F32", "F64"}:
        return "float32"
    return "float16" if types <= {"F16", "F32"} else "bfloat16"


def _special(header: Header) -> dict[str, Any]:
    """Return the special tokens; an absent one is null, not the family's default."""
    ends: list[int] = _end_ids(header)
    bos = header.metadata.get("tokenizer.ggml.bos_token_id")
    pad = header.metadata.get("tokenizer.ggml.padding_token_id")
    return {"bos_token_id": bos, "pad_token_id": pad, "eos_token_id": ends or None}


def _rope_scaling(header: Header) -> dict[str, Any]:
    """Return how positions are stretched, from the metadata or from a tensor of factors."""
    kind = header.of_family("rope.scaling.type")
    if "rope_factors_long.weight" in header.tensors:
        raise _refusal(header, "its positions are stretched (longrope) in a way that is not read")
    if kind in ("linear", "yarn"):
        scaling: dict[str, Any] = {"rope_type": kind}
        scaling["factor"] = float(header.of_family("rope.scaling.factor", 1.0))
        if kind == "yarn" and (known := header.of_family("rope.scaling.original_context_length")):
            scaling["original_max_position_embeddings"] = int(known)
        return {"rope_scaling": scaling}
    if kind not in (None, "none"):
        raise _refusal(header, f"its positions are stretched ({kind}) in a way that is not read")
    if "rope_freqs.weight" in header.tensors:
        return {"rope_scaling": _llama3_scaling(header)}
    return {}


def _llama3_scaling(header: Header) -> dict[str, Any]:
    """Return Llama 3.1's scaling; its factor is the largest of those in the file."""
    import numpy as np

    tensor = header.tensors["rope_freqs.weight"]
    if tensor.type != "F32":
        raise _refusal(header, f"rope_freqs.weight is in {tensor.type}, not F32")
    count = tensor.size // 4
    factors = np.fromfile(tensor.file, np.float32, count, offset=tensor.start)
    return {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }


def _llama(header: Header, config: dict[str, Any]) -> dict[str, Any]:
    turned = int(header.of_family("rope.dimension_count", config["head_dim"]))
    head_dim = int(header.of_family("attention.key_length", turned))
    if turned != head_dim:
        raise _refusal(header, "its heads are turned in part only, which Llama's are not")
    return {"head_dim": head_dim, "attention_bias": "blk.0.attn_q.bias" in header.tensors}


def _qwen(header: Header, config: dict[str, Any]) -> dict[str, Any]:
    del header, config
    return {"use_sliding_window": False}


def _phi3(header: Header, config: dict[str, Any]) -> dict[str, Any]:
    turned = int(header.of_family("rope.dimension_count", config["head_dim"]))
    return {
        "partial_rotary_factor": turned / config["head_dim"],
        "original_max_position_embeddings": config["max_position_embeddings"],
        "sliding_window": header.of_family("attention.sliding_window"),
    }


def _gemma(header: Header, config: dict[str, Any]) -> dict[str, Any]:
    scale = LARGEST_GEMMAS.get(config["num_hidden_layers"], config["head_dim"])
    return {
        "query_pre_attn_scalar": scale,
        "attn_logit_softcapping": header.of_family("attn_logit_softcapping"),
        "final_logit_softcapping": header.of_family("final_logit_softcapping"),
        "sliding_window": int(header.of_family("attention.sliding_window", 4096)),
        "tie_word_embeddings": True,
    }


def _gemma3(header: Header, config: dict[str, Any]) -> dict[str, Any]:
    base = header.of_family("rope.freq_base", 1_000_000.0)
    return _gemma(header, config) | {"rope_theta": float(base), "rope_local_base_freq": 10_000.0}


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", _llama),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _qwen),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _qwen),
    "phi3": Family("phi3", "Phi3ForCausalLM", _phi3),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", _gemma),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", _gemma3),
}
