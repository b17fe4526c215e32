"""A transformers backbone and Medusa heads as the native step reads them: packed weights."""

from __future__ import annotations

from ctypes import pointer
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medusa_chat.native import families
from medusa_chat.native.library import UnavailableError
from medusa_chat.native.structures import BFLOAT16, FLOAT32, HeadsOf, Layer, Matrix, Model
from medusa_chat.native.weights import (
    Rows,
    Store,
    all_rows,
    check_finite,
    pack,
    pack_some,
)

if TYPE_CHECKING:
    from medusa_chat.native.takes import Backbone, Heads, HeadVocabulary, ParentBias


class NativeModel:
    """A backbone for the native step.

    Attributes:
        structure: what the library reads.
        store: owns the packed weights.
        looked_up: bytes of tables of which a step reads a few rows: embedding and rotary positions.
    """

    def __init__(
        self,
        backbone: Backbone,
        weights: str,
        lm_head: str | None = None,
        *,
        positions: int | None = None,
        release: bool = False,
        store: Store | None = None,
    ) -> None:
        """Pack a backbone, layer by layer.

        Args:
            backbone: the model, in bfloat16 or float32.
            weights: the format of layers that are not quantized already: a key of FORMATS.
            lm_head: that of the LM head, by default the same.
            positions: of the rotary tables, by default as many as the backbone was made for.
            release: let go of each layer's own weights once they are packed; the backbone's torch
                step can't run any more.
            store: where to put the packed weights; one that reads them from a file packs none.

        Raises:
            UnavailableError: for backbones and formats that the native step does not have.
            NotFiniteError: a weight or a scale is NaN or infinite.
        """
        reason = families.unsupported(backbone)
        if reason:
            raise UnavailableError(reason)
        self.backbone, self.store = backbone, store or Store()
        self.looked_up = 0
        self._weights, self._release = weights, release
        self._family = families.family_of(backbone)
        body = backbone.model.base_model
        self._body = getattr(body, "language_model", body)
        self._layers = (Layer * len(self._body.layers))()
        self.structure = self._structure(lm_head or weights, positions or backbone.context)
        del self.backbone, self._body  # the store keeps what is still needed of them

    @property
    def step_bytes(self) -> int:
        """Bytes that a forward reads."""
        return self.store.bytes - self.looked_up

    def _structure(self, lm_head: str, positions: int) -> Model:
        """The embedding is read before the LM head's weights are let go, which may be the same."""
        model, config = Model(), self.backbone.config
        positions = min(positions, self.backbone.context)
        model.hidden, model.layers = config.hidden_size, len(self._layers)
        model.heads = config.num_attention_heads
        model.kv_heads = families.kv_heads_of(config)
        model.head_dim = families.head_dim_of(config)
        model.intermediate = config.intermediate_size
        model.vocabulary = self.backbone.vocabulary
        model.positions = positions
        model.activation = families.ACTIVATIONS[families.activation_of(config)]
        model.final_cap = getattr(config, "final_logit_softcapping", None) or 0.0
        self._set_embedding(model)
        self._set_attention(model)
        self._set_rotary(model, positions)
        model.final_norm = self._norm(self._body.norm)
        model.lm_head = self._matrix([all_rows(self.backbone.lm_head)], lm_head)
        windows = families.windows_of(config)
        for index, module in enumerate(self._body.layers):
            self._set_layer(self._layers[index], module)
            self._layers[index].window = windows[index]
        model.layer = self._layers
        return model

    def _set_embedding(self, model: Model) -> None:
        embedding = self._body.embed_tokens
        weight = embedding.weight
        scale = getattr(embedding, "embed_scale", None)
        model.embedding_scale = 1.0 if scale is None else float(scale.to(weight.dtype))
        model.embedding_format = FLOAT32 if weight.dtype == torch.float32 else BFLOAT16
        model.embedding = self.store.keep(weight)
        self.looked_up += weight.nbytes

    def _set_attention(self, model: Model) -> None:
        attention = self._body.layers[0].self_attn
        norm = self._body.norm
        epsilon = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        model.epsilon, model.attention_scale = epsilon, attention.scaling
        if self._family.attention_cap:
            model.attention_cap = attention.attn_logit_softcapping or 0.0

    def _set_rotary(self, model: Model, positions: int) -> None:
        kinds = families.layer_kinds(self.backbone.config) if self._family.by_layer_type else [""]
        for table, kind in enumerate(kinds):
            cosine, sine = _rotary(self._body.rotary_emb, positions, kind)
            model.rotary = 2 * cosine.shape[1]
            self.looked_up += cosine.nbytes + sine.nbytes
            model.cosine[table], model.sine[table] = self.store.keep(cosine), self.store.keep(sine)
        if kinds[0]:
            for layer, kind in zip(self._layers, self.backbone.config.layer_types, strict=True):
                layer.rope = kinds.index(kind)

    def _set_layer(self, layer: Layer, module: Any) -> None:
        attention, mlp = module.self_attn, module.mlp
        layer.attention_norm = self._norm(module.input_layernorm)
        if self._family.post_norms:
            layer.attention_post = self._norm(module.post_attention_layernorm)
            layer.mlp_norm = self._norm(module.pre_feedforward_layernorm)
            layer.mlp_post = self._norm(module.post_feedforward_layernorm)
        else:
            layer.mlp_norm = self._norm(module.post_attention_layernorm)
        if hasattr(attention, "q_norm"):
            layer.query_norm = self._norm(attention.q_norm)
            layer.key_norm = self._norm(attention.k_norm)
        layer.qkv = self._matrix(_qkv(attention), self._weights)
        gate, up = _gate_and_up(mlp)
        layer.gate = self._matrix([gate], self._weights)
        layer.up = self._matrix([up], self._weights, last_use=True)
        layer.output = self._matrix([all_rows(attention.o_proj)], self._weights)
        layer.down = self._matrix([all_rows(mlp.down_proj)], self._weights)

    def _norm(self, module: Any) -> int:
        return self.store.floats(module.weight.detach().float() + self._family.norm_offset)

    def _matrix(self, parts: list[Rows], weights: str, last_use: bool = False) -> Matrix:
        matrix = pack(parts, weights, self.store)
        whole = last_use or sum(part.count for part in parts) == parts[0].linear.out_features
        if self._release and (whole or len(parts) > 1):
            for part in parts:
                _let_go(part.linear, self._body.embed_tokens.weight)
        return matrix


class NativeHeads:
    """Medusa heads for the native step.

    Attributes:
        heads: how many.
        own_lm_heads: they have LM heads of their own.
        cut: they share a part of the backbone's LM head, which is copied for them.
        vocabulary: the tokens that they rank; None for all.
        parent_bias: what the token before a guess adds to its logits; None if nothing.
        structure: what the library reads.
        store: owns the packed weights.
    """

    def __init__(
        self, heads: Heads, model: NativeModel, weights: str, lm_head: str | None = None
    ) -> None:
        """Pack heads.

        Args:
            heads: the heads.
            model: the backbone's; heads that share its LM head read it as it is packed.
            weights: the format of the blocks.
            lm_head: that of LM heads of their own, by default the same.

        Raises:
            NotFiniteError: a weight is NaN or infinite.
        """
        self.heads, self.store = heads.heads, Store()
        self.own_lm_heads = heads.lm_heads is not None
        self.cut = heads.vocabulary is not None and not self.own_lm_heads
        self.vocabulary, self.parent_bias = heads.vocabulary, heads.parent_bias
        self._tables = Store()  # of which a step reads a few rows
        self.structure = HeadsOf(heads.heads, heads.layers, vocabulary=model.structure.vocabulary)
        blocks = [
            _plain(heads.weight[layer, head], heads.bias[layer, head])
            for layer in range(heads.layers)
            for head in range(heads.heads)
        ]
        self._blocks = self._matrices(blocks, weights)
        self.structure.block = self._blocks
        if heads.vocabulary is not None:
            self._set_vocabulary(heads.vocabulary, model.structure.lm_head)
        if heads.lm_heads is not None:
            own = [_plain(weight) for weight in heads.lm_heads]
            self._lm_heads = self._matrices(own, lm_head or weights)
            self.structure.lm_head = self._lm_heads
        if heads.parent_bias is not None:
            self._set_bias(heads.parent_bias)

    def _set_vocabulary(self, vocabulary: HeadVocabulary, lm_head: Matrix) -> None:
        tokens = vocabulary.tokens.int()
        self.structure.vocabulary = len(tokens)
        self.structure.tokens = self._tables.keep(tokens)
        if self.cut:
            self._shared = pack_some(lm_head, tokens, self.store)
            self.structure.shared = pointer(self._shared)

    def _set_bias(self, given: ParentBias) -> None:
        first, second = given.first.detach(), given.second.detach()
        for table in (first, second):
            check_finite(table)
        bias = self.structure.bias
        bias.rank, bias.parents, bias.tokens = first.shape[1], len(first), len(second)
        bias.format = FLOAT32 if first.dtype == torch.float32 else BFLOAT16
        bias.first, bias.second = self._tables.keep(first), self._tables.keep(second)
        if given.rows is not None:
            bias.rows = self._tables.keep(given.rows.int())

    def _matrices(self, linears: list[nn.Linear], weights: str) -> Any:
        made = (Matrix * len(linears))()
        for index, linear in enumerate(linears):
            made[index] = pack([all_rows(linear)], weights, self.store)
        return made


def _plain(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _qkv(attention: Any) -> list[Rows]:
    if hasattr(attention, "qkv_proj"):
        return [all_rows(attention.qkv_proj)]
    query = attention.q_proj
    if hasattr(query, "joined"):
        return [all_rows(query.joined.whole)]
    return [all_rows(linear) for linear in (query, attention.k_proj, attention.v_proj)]


def _gate_and_up(mlp: Any) -> tuple[Rows, Rows]:
    if hasattr(mlp, "gate_up_proj"):
        whole = mlp.gate_up_proj
    elif hasattr(mlp.gate_proj, "joined"):
        whole = mlp.gate_proj.joined.whole
    else:
        return all_rows(mlp.gate_proj), all_rows(mlp.up_proj)
    half = whole.out_features // 2
    return Rows(whole, 0, half), Rows(whole, half, half)


def _rotary(module: Any, positions: int, kind: str) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all positions: [positions, rotary / 2] each, float32."""
    places = torch.arange(positions)[None]
    cosine, sine = module(torch.zeros(1), places, *([kind] if kind else []))
    half = cosine.shape[-1] // 2
    for table in (cosine, sine):
        if not torch.equal(table[..., :half], table[..., half:]):
            raise UnavailableError("the native step does not know this model's rotary positions")
    return cosine[0, :, :half].contiguous(), sine[0, :, :half].contiguous()


def _let_go(linear: Any, kept: Tensor) -> None:
    if linear.weight is not kept:
        linear.weight = None
