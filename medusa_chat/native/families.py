"""Which backbones the native step runs, and the switches that their families need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medusa_chat.native.takes import Description

SILU, GELU = 0, 1
ACTIVATIONS = {"silu": SILU, "swish": SILU, "gelu_pytorch_tanh": GELU}
LARGEST_HEAD = 256


@dataclass(frozen=True)
class Family:
    """What sets the decoders of a family apart from Llama's.

    Attributes:
        norm_offset: what is added to a norm's weights.
        post_norms: whether attention and MLP end in a norm; then the MLP's own has another name.
        attention_cap: whether scores are capped.
        by_layer_type: whether the rotary module asks for the kind of layer.
    """

    norm_offset: float = 0.0
    post_norms: bool = False
    attention_cap: bool = False
    by_layer_type: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "phi3": Family(),
    "gemma2": Family(1.0, post_norms=True, attention_cap=True),
    "gemma3_text": Family(1.0, post_norms=True, by_layer_type=True),
}


def family_of(backbone: Description) -> Family:
    """The family of a backbone that `unsupported` has nothing against."""
    return FAMILIES[backbone.config.model_type]


def activation_of(config: Any) -> str:
    """The name of the MLP's activation."""
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def unsupported(backbone: Description) -> str | None:
    """Return why the native step cannot run a backbone, in one line; None if it can."""
    config = backbone.config
    kind = config.model_type
    if backbone.device.type != "cpu":
        return f"the native step runs on a CPU, not on {backbone.device.type}"
    dtype = str(backbone.dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16"):
        return f"the native step takes float32 and bfloat16 models, not {dtype}"
    if kind not in FAMILIES:
        return f"the native step does not know {kind} models"
    if activation_of(config) not in ACTIVATIONS:
        return f"the native step has no activation {activation_of(config)}"
    if head_dim_of(config) > LARGEST_HEAD:
        return f"the native step takes heads of at most {LARGEST_HEAD} numbers"
    return None


def head_dim_of(config: Any) -> int:
    """Numbers of one attention head."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def kv_heads_of(config: Any) -> int:
    """Key and value heads of a layer."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def windows_of(config: Any) -> list[int]:
    """Positions that the rows of each layer see, themselves included; 0 for all."""
    window = int(getattr(config, "sliding_window", None) or 0)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else 0 for kind in kinds]


def layer_kinds(config: Any) -> list[str]:
    """The kinds of layers that have rotary tables of their own, at most two."""
    return sorted(set(config.layer_types))
