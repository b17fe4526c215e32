"""Shapes of well-known backbones, to count weights and cache before loading. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like decoder: gated MLP, grouped-query attention.

    Attributes:
        context: positions that the model was trained for.
        head_dim: 0 is hidden / heads.
        tied: the LM head is the embedding matrix.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int = 4096
    head_dim: int = 0
    tied: bool = False

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden // self.heads)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Read the shape of a config.json; raises KeyError if a size is missing."""
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            vocabulary=config["vocab_size"],
            context=config.get("max_position_embeddings") or 4096,
            head_dim=config.get("head_dim") or 0,
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def linear_parameters(self) -> int:
        """Weights of the matrices inside the layers, which bitsandbytes quantizes."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding matrix; the LM head has as many."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights, those of the norms included."""
        norms = self.hidden * (2 * self.layers + 1)
        matrices = 1 if self.tied else 2
        return self.linear_parameters + matrices * self.embedding_parameters + norms

    def adapter_parameters(self, rank: int) -> int:
        """Weights of a LoRA adapter of all linear layers, and of the LM head if it is not tied."""
        heads = self.head_dim * (self.heads + self.kv_heads)
        layer = 4 * self.hidden + 2 * heads + 3 * (self.hidden + self.intermediate)
        lm_head = 0 if self.tied else self.hidden + self.vocabulary
        return rank * (self.layers * layer + lm_head)

    def cache_bytes(self, positions: int, width: int = 2) -> int:
        """Bytes of the keys and values of `positions` tokens, with `width` bytes per number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * positions * width


SHAPES = {
    "llama-1b": Shape(16, 2048, 8192, 32, 8, 128256, 131072, tied=True),
    "llama-8b": Shape(32, 4096, 14336, 32, 8, 128256, 8192),
    "vicuna-7b": Shape(32, 4096, 11008, 32, 32, 32000, 2048),
    "vicuna-7b-v1.5": Shape(32, 4096, 11008, 32, 32, 32000, 4096),
    "vicuna-13b": Shape(40, 5120, 13824, 40, 40, 32000, 2048),
    "vicuna-13b-v1.5": Shape(40, 5120, 13824, 40, 40, 32000, 4096),
    "vicuna-33b": Shape(60, 6656, 17920, 52, 52, 32000, 2048),
    "mistral-7b": Shape(32, 4096, 14336, 32, 8, 32000, 32768),
    "qwen2.5-0.5b": Shape(24, 896, 4864, 14, 2, 151936, 32768, tied=True),
    "qwen2.5-1.5b": Shape(28, 1536, 8960, 12, 2, 151936, 32768, tied=True),
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 49152, 8192, tied=True),
    "smollm2-360m": Shape(32, 960, 2560, 15, 5, 49152, 8192, tied=True),
    "qwen3-0.6b": Shape(28, 1024, 3072, 16, 8, 151936, 40960, head_dim=128, tied=True),
    "gemma-7b": Shape(28, 3072, 24576, 16, 16, 256000, 8192, head_dim=256, tied=True),
}
