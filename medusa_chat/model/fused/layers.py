"""Modules that take the place of transformers' norms, MLPs and attention on a GPU.

They hold the modules that they replace, whose weights they use. `Backbone` checks afterwards that
the model still gives its own logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medusa_chat.model.attention.tree_attention import tree_attention
from medusa_chat.model.cache import KVCache
from medusa_chat.model.fused import plain

if TYPE_CHECKING:
    from medusa_chat.model.fused.plain import Activation, NormKind, Operations

ACTIVATION_OF: dict[str, Activation] = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
}
# Their forward is: project, maybe norm, rotate the halves of a head, write, attend, project.
ATTENTIONS = {
    f"{family}Attention" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3")
}

SOFTCAPPED = "Gemma2Attention"  # Gemma 3 has the setting, and does without

Replaced = list[tuple[nn.Module, str, nn.Module]]  # parent, name, and the child of that name


def fuse_layers(model: nn.Module, operations: Operations) -> Replaced:
    """Replace the modules whose work the operations can do; returns what was replaced."""
    replaced: Replaced = []
    known: dict[tuple[type, torch.dtype], NormKind | None] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            fused = _fused(child, operations, known)
            if fused is not None:
                setattr(parent, name, fused)
                replaced.append((parent, name, child))
    return replaced


def restore(replaced: Replaced) -> None:
    """Put the modules of a `fuse_layers` back."""
    for parent, name, child in replaced:
        setattr(parent, name, child)


def _fused(
    module: Any, operations: Operations, known: dict[tuple[type, torch.dtype], NormKind | None]
) -> nn.Module | None:
    name = type(module).__name__
    if name.endswith("RMSNorm"):
        identity = type(module), module.weight.dtype
        if identity not in known:
            known[identity] = norm_kind(module)
        kind = known[identity]
        return kind and FusedNorm(module.weight, eps_of(module), kind, operations)
    if name.endswith("MLP") and hasattr(module, "gate_proj"):
        activation = ACTIVATION_OF.get(type(module.act_fn).__name__)
        return activation and FusedMLP(module, activation, operations)
    return FusedAttention(module, operations) if name in ATTENTIONS else None


def eps_of(norm: Any) -> float:
    """Return the constant of a norm, under either of its names."""
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)


@torch.inference_mode()
def norm_kind(norm: Any) -> NormKind | None:
    """Find the rule that a norm follows, by its result; None for another rule."""
    weight = norm.weight
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, len(weight), generator=generator).to(weight.device, weight.dtype)
    expected = norm(rows)
    for kind in plain.NORMS:
        if torch.equal(plain.norm(rows, weight, eps_of(norm), kind), expected):
            return kind
    return None


class FusedNorm(nn.Module):
    """A norm in one kernel."""

    def __init__(
        self, weight: nn.Parameter, eps: float, kind: NormKind, operations: Operations
    ) -> None:
        super().__init__()
        self.weight = weight
        self._eps = eps
        self._kind = kind
        self._operations = operations

    def forward(self, rows: Tensor) -> Tensor:
        """Normalize rows [..., size]."""
        return self._operations.norm(rows, self.weight, self._eps, self._kind)


class FusedMLP(nn.Module):
    """A gated MLP, with the gate in one kernel."""

    def __init__(self, mlp: Any, activation: Activation, operations: Operations) -> None:
        super().__init__()
        self.gate_proj = mlp.gate_proj
        self.up_proj = mlp.up_proj
        self.down_proj = mlp.down_proj
        self._activation = activation
        self._operations = operations

    def forward(self, rows: Tensor) -> Tensor:
        """Apply the MLP: [..., hidden] -> [..., hidden]."""
        gates = self.gate_proj(rows)
        gated = self._operations.gate(gates, self.up_proj(rows), self._activation)
        product: Tensor = self.down_proj(gated)
        return product


@dataclass(frozen=True)
class Call:
    """What a decoder layer gives its attention, under the names of any version."""

    cache: Any
    mask: Any
    turn: Any

    @classmethod
    def of(cls, named: dict[str, Any]) -> Call:
        """Read the arguments of a call."""
        cache = named.get("cache", named.get("past_key_values"))
        return cls(cache, named.get("attention_mask"), named.get("position_embeddings"))


class FusedAttention(nn.Module):
    """Attention whose rotary positions and cache write are one kernel."""

    def __init__(self, attention: Any, operations: Operations) -> None:
        super().__init__()
        self.own = attention
        self._operations = operations
        self._softcap: float | None = None
        if type(attention).__name__ == SOFTCAPPED:
            self._softcap = attention.attn_logit_softcapping

    def forward(self, hidden_states: Tensor, **named: Any) -> tuple[Tensor, Any]:
        """Attend from rows [1, n, hidden]; without our cache, as the module itself does."""
        call = Call.of(named)
        if not isinstance(call.cache, KVCache) or len(hidden_states) > 1:
            result: tuple[Tensor, Any] = self.own(hidden_states=hidden_states, **named)
            return result
        own, rows = self.own, hidden_states.shape[1]
        query, key, value = self._projected(hidden_states)
        keys, values, places, stop = call.cache.rows_of(own.layer_idx, rows)
        query = self._operations.rotate(query, (key, value), call.turn, (keys, values, places))
        mixed, _ = tree_attention(
            own,
            query,
            keys[:, :, :stop],
            values[:, :, :stop],
            call.mask,
            scaling=own.scaling,
            softcap=self._softcap,
        )
        return own.o_proj(mixed.flatten(2)), None

    def _projected(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, [1, heads, n, head_dim] each, normed if the model is."""
        own = self.own
        shape = (*hidden_states.shape[:2], -1, own.head_dim)
        query = own.q_proj(hidden_states).view(shape)
        key = own.k_proj(hidden_states).view(shape)
        value = own.v_proj(hidden_states).view(shape)
        if hasattr(own, "q_norm"):
            query, key = own.q_norm(query), own.k_norm(key)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
