"""Any transformers causal LM whose attention can be rewound, as a runner of tree nodes."""

from __future__ import annotations

import inspect
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medusa_chat.config import UserError, out_of_memory
from medusa_chat.model.attention import tree_attention as attention
from medusa_chat.model.attention.rule import Choice, Shape, choose_attention
from medusa_chat.model.cache import KVCache
from medusa_chat.model.fused.layers import fuse_layers, restore
from medusa_chat.model.fused.rule import choose_operations
from medusa_chat.model.logits import LogitRule
from medusa_chat.model.positions import context_of, fix_positions
from medusa_chat.model.weight_files import damage

if TYPE_CHECKING:
    from medusa_chat.native.packed import Packed

FULL, SLIDING = "full_attention", "sliding_attention"  # the kinds of layers that can be rewound


def may_be_recurrent(model_class: Any) -> bool:
    """Tell if a transformers class has recurrent layers in some of its models.

    Such a class takes masks by the kind of layer, and its own masks do not look at positions.
    """
    return bool(getattr(model_class, "_is_stateful", False))


def check_rewindable(model_class: Any, config: Any) -> None:
    """Raise UserError for a backbone whose state cannot drop rejected tokens.

    A class for recurrent layers may hold a model without any, as dense Granite 4.0.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    others = kinds - {FULL, SLIDING}
    if others or (may_be_recurrent(model_class) and not kinds):
        names = ", ".join(sorted(others)) or "recurrent state"
        raise UserError(
            f"{config.model_type} models have layers ({names}) that cannot take back rejected"
            " guesses; Medusa needs plain or sliding-window attention in every layer"
        )


class Backbone:
    """A causal LM with its masks and the shapes of its cache.

    Attributes:
        model: the transformers model, in eval mode, with tree attention.
        config: the config of its text part.
        attention: the implementation of attention over a fixed span, for `hidden_at`.
        operations: the kernels of its norms, gates and rotary positions; None where transformers'
            own layers run.
        operations_reason: why they run on a GPU.
        native: the weights as the native step reads them. Then the model has none of its own but
            embeddings and norms, and only that step runs it; None otherwise.
    """

    def __init__(self, model: Any, *, own_attention: bool = False) -> None:
        """Switch a transformers model to tree attention.

        Args:
            model: the transformers model.
            own_attention: leave its attention as it is, for a model that is about to be packed for
                the native step. It is not run either: that would touch all weights once more, and
                bitsandbytes lays 4-bit ones out anew at their first forward.

        Raises:
            UserError: the model cannot be rewound, or does not follow tree attention.
        """
        config = model.config.get_text_config()
        check_rewindable(type(model), config)
        self.model = model.eval().requires_grad_(False)
        self.config = config
        fix_positions(model)
        kinds = set(getattr(config, "layer_types", None) or ())
        self._by_name = len(kinds) > 1 or may_be_recurrent(type(model))
        sliding = not kinds or SLIDING in kinds
        self._window = getattr(config, "sliding_window", None) if sliding else None
        self._logit_rule = LogitRule.of(config)
        self.attention: Choice = choose_attention(self.device, self.attention_shape)
        parameters = inspect.signature(model.base_model.forward).parameters
        # transformers 5.24 renamed it.
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self.operations, self.operations_reason = choose_operations(self.device, self.dtype)
        self.native: Packed | None = None
        if not own_attention:
            self._use_tree_attention(self._own_logits())

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states and cache."""
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    @property
    def threads(self) -> int:
        """Threads of a step on a CPU."""
        return self.native.threads if self.native else torch.get_num_threads()

    @property
    def step_name(self) -> str:
        """The way in which steps are computed, for people to read."""
        if self.device.type != "cpu":
            return f"torch, {self.attention.name} attention"
        name = f"native ({self.native.variant})" if self.native else "torch"
        return f"{name}, {self.threads} threads"

    @property
    def hidden_size(self) -> int:
        """Width of a hidden state."""
        return int(self.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        """Rows of the LM head, which may be more than the tokenizer has tokens."""
        return int(self.lm_head.out_features)

    @property
    def lm_head(self) -> Any:
        """The linear layer from hidden states to logits."""
        return self.model.get_output_embeddings()

    @property
    def context(self) -> int:
        """Positions that the model was made for, with one encoding of them."""
        return context_of(self.config)

    def new_cache(self, capacity: int) -> KVCache:
        """Make an empty cache of `capacity` positions."""
        shape = self.attention_shape
        layers = self.config.num_hidden_layers
        return KVCache(layers, shape.kv_heads, shape.head_dim, capacity, self.dtype, self.device)

    @property
    def attention_shape(self) -> Shape:
        """Sizes of a layer's attention."""
        config = self.config
        heads = config.num_attention_heads
        return Shape(
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            self.dtype,
            getattr(config, "attn_logit_softcapping", None),
            self._window,
        )

    def hidden(
        self, tokens: Tensor, positions: Tensor, ancestors: Tensor | None, cache: KVCache
    ) -> Tensor:
        """Run n rows after the cached text.

        Args:
            tokens: [n].
            positions: [n], the text position of each row.
            ancestors: additive [n, n], which row sees which; None for a single row.
            cache: gets the rows' keys and values, which are not committed yet.

        Returns:
            [n, hidden]: the last hidden states, after the final norm.
        """
        masks = self._masks(ancestors, positions, cache.length)
        return self._forward(tokens, positions, masks, cache)

    def hidden_at(
        self,
        tokens: Tensor,
        positions: Tensor,
        ancestors: Tensor,
        start: Tensor,
        span: int,
        cache: KVCache,
    ) -> Tensor:
        """Run n rows as `hidden` does, with shapes that do not depend on the text's length.

        Args:
            tokens: [n].
            positions: [n], the text position of each row.
            ancestors: bool [n, n], which row sees which.
            start: [], the text's length, which is read on the device only.
            span: positions of the cache that are read, at least start + n.
            cache: gets the rows' keys and values.

        Returns:
            [n, hidden]
        """
        mask = attention.TreeMask.of(
            ancestors, positions, start, span, self.dtype, self.attention.attend
        )
        near = mask if self._window is None else mask.with_window(self._window)
        places = start + torch.arange(len(tokens), device=tokens.device)
        with cache.at(places, span):
            return self._forward(tokens, positions, self._by_kind(mask, near), cache)

    def hidden_of_text(self, tokens: Tensor) -> Tensor:
        """Run a whole text, apart from any conversation: [n] -> [n, hidden]."""
        n = len(tokens)
        chain = attention.chain_mask(n, self.dtype, self.device)
        positions = torch.arange(n, device=self.device)
        return self.hidden(tokens, positions, chain, self.new_cache(n))

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the LM head as the model's own forward does: [n, hidden] -> [n, V]."""
        return self._logit_rule(self.lm_head(hidden))

    def _forward(self, tokens: Tensor, positions: Tensor, masks: Any, cache: KVCache) -> Tensor:
        output = self.model.base_model(
            input_ids=tokens[None],
            position_ids=positions[None],
            attention_mask=masks,
            use_cache=True,
            **{self._cache_argument: cache},
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def _masks(self, ancestors: Tensor | None, positions: Tensor, length: int) -> Any:
        """The model's attention_mask for rows after `length` positions."""
        if ancestors is None:
            ancestors = torch.zeros(1, 1, dtype=self.dtype, device=self.device)
        mask = near = attention.full_mask(ancestors, length)
        # No row's position exceeds length + n, so a shorter text cannot outgrow the window.
        if self._window is not None and mask.shape[-1] > self._window:
            near = attention.windowed(mask, positions, length, self._window)
        return self._by_kind(mask, near)

    def _by_kind(self, mask: Tensor, near: Tensor) -> Any:
        """One mask, or one for each kind of layer if the model takes them by name."""
        return {FULL: mask, SLIDING: near} if self._by_name else near

    @torch.inference_mode()
    def _own_logits(self) -> Tensor:
        """Logits that the model itself gives the text (0, 1, 1): [3, V], all of them finite."""
        text = torch.tensor([[0, 1, 1]], device=self.device)
        logits: Tensor = self.model(input_ids=text, use_cache=False).logits[0].float()
        if not logits.isfinite().all():
            raise UserError(damage(Path(self.model.name_or_path), self.dtype))
        return logits

    @torch.inference_mode()
    def _use_tree_attention(self, expected: Tensor) -> None:
        """Switch to tree attention, and refuse a model that would then give wrong text.

        The text (0, 1, 1) is run as a tree with another 0 next to the second token. Its logits
        have to be those of the model's own attention over the text. Fused layers that change them
        give way to the model's own.
        """
        if self.operations is not None:
            replaced = fuse_layers(self.model, self.operations)
            with suppress(UserError):
                if self._follows(expected):
                    return
            restore(replaced)
            self.operations = None
            self.operations_reason = "they change the logits of this model"
        if not self._follows(expected):
            kind = self.config.model_type
            raise UserError(f"{kind} models attend or make logits in a way that is not supported")

    def _follows(self, expected: Tensor) -> bool:
        """Tell if the tree's logits are the expected ones; raise UserError if there are none."""
        try:
            self.model.set_attn_implementation(attention.register())
            logits = self._logits_of_tree()
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            if out_of_memory(error):
                raise
            kind = self.config.model_type
            raise UserError(f"{kind} models do not take tree attention: {error!r}") from None
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.05
        worst = (logits - expected).abs().max()
        return bool(worst <= tolerance * expected.abs().max())

    def _logits_of_tree(self) -> Tensor:
        """Logits of the tree's nodes that spell the text (0, 1, 1): [3, V]."""
        tokens, positions = torch.tensor([[0, 1, 0, 1], [0, 1, 1, 2]], device=self.device)
        ancestors = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]])
        mask = attention.additive(ancestors.bool().to(self.device), self.dtype)
        logits = self.logits(self.hidden(tokens, positions, mask, self.new_cache(4)))
        return logits[torch.tensor([0, 1, 3], device=self.device)].float()
