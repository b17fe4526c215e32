"""Any transformers causal LM with rewindable attention behind hidden(tokens, positions, mask) and logits(hidden)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from medusa_chat.config import UserError
from medusa_chat.model.attention import tree_attention as attention
from medusa_chat.model.attention.choice import FasterAttention
from medusa_chat.model.cache import KVCache

_REWINDABLE = {"full_attention", "sliding_attention"}


def check_rewindable(model_class: Any, config: Any) -> None:
    """Raise UserError for a backbone whose state cannot drop rejected tokens."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(model_class, "_is_stateful", False) or kinds - _REWINDABLE:
        odd = ", ".join(sorted(kinds - _REWINDABLE)) or "recurrent state"
        raise UserError(
            f"{config.model_type} models have layers ({odd}) that cannot take back rejected guesses;"
            " Medusa needs plain or sliding-window attention in every layer"
        )


class Backbone:
    """A causal LM, its masks and its cache shapes.

    Attributes:
        model: the transformers model, in eval mode, loaded with the attention function of model/attention/tree_attention.py.
        attend: how `hidden_at` attends.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        check_rewindable(type(model), config)
        self.model = model.eval().requires_grad_(False)
        self.config = config
        kinds = getattr(config, "layer_types", None) or ()
        self._window = getattr(config, "sliding_window", None)
        if kinds and "sliding_attention" not in kinds:
            self._window = None
        self._mixed = len(set(kinds)) > 1
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self.attend: attention.Attend = (
            FasterAttention() if self.device.type == "cuda" else attention.plain
        )
        takes = inspect.signature(model.base_model.forward).parameters
        self._cache_argument = (
            "cache" if "cache" in takes else "past_key_values"
        )  # renamed in transformers 5.24
        self._set_attention()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def hidden_size(self) -> int:
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
        """Positions that the backbone was made for, with one encoding: longrope switches where its first part ends."""
        made_for = int(getattr(self.config, "max_position_embeddings", None) or 4096)
        scaling = getattr(self.config, "rope_parameters", None) or {}
        if scaling.get("rope_type") == "longrope":
            return min(made_for, int(scaling["original_max_position_embeddings"]))
        return made_for

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache of `capacity` positions."""
        config = self.config
        head_dim = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return KVCache(
            config.num_hidden_layers, kv_heads, head_dim, capacity, self.dtype, self.device
        )

    def hidden(
        self, tokens: Tensor, positions: Tensor, ancestors: Tensor | None, cache: KVCache
    ) -> Tensor:
        """Run n rows behind the cached text.

        Args:
            tokens: [n]; positions: [n], the text position of each row.
            ancestors: additive [n, n], which row sees which; None for a single row.

        Returns:
            [n, hidden]: the last hidden states, after the final norm. Their keys and values stand in the cache,
            not yet committed.
        """
        return self._forward(
            tokens, positions, self._masks(ancestors, positions, cache.length), cache
        )

    def hidden_at(
        self,
        tokens: Tensor,
        positions: Tensor,
        ancestors: Tensor,
        start: Tensor,
        span: int,
        cache: KVCache,
    ) -> Tensor:
        """The same with shapes that do not depend on the text, whose length `start` [] is read on the device alone.

        Args:
            ancestors: bool [n, n]; span: positions of the cache that are read, start + n at least.
        """
        mask = attention.TreeMask.of(ancestors, positions, start, span, self.dtype, self.attend)
        near = mask if self._window is None else mask.within(self._window)
        masks = {"full_attention": mask, "sliding_attention": near} if self._mixed else near
        places = start + torch.arange(len(tokens), device=tokens.device)
        with cache.at(places, span):
            return self._forward(tokens, positions, masks, cache)

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

    def hidden_of_text(self, tokens: Tensor) -> Tensor:
        """Last hidden states of a whole text, apart from any conversation: [n] -> [n, hidden]."""
        n, device = len(tokens), self.device
        chain = attention.chain_mask(n, self.dtype, device)
        return self.hidden(tokens, torch.arange(n, device=device), chain, self.new_cache(n))

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, V], as the model's own forward gives them."""
        logits: Tensor = self.lm_head(hidden)
        if self._softcap:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def _masks(self, ancestors: Tensor | None, positions: Tensor, length: int) -> Any:
        """What the model takes as attention_mask: one mask, or one for each kind of layer."""
        if ancestors is None:
            ancestors = torch.zeros(1, 1, dtype=self.dtype, device=self.device)
        mask = attention.full_mask(ancestors, length)
        if self._window is None:
            return mask
        # No row lies further along than length + n, so a shorter text can't outgrow the window.
        near = (
            mask
            if mask.shape[-1] <= self._window
            else attention.windowed(mask, positions, length, self._window)
        )
        return {"full_attention": mask, "sliding_attention": near} if self._mixed else near

    @torch.inference_mode()
    def _set_attention(self) -> None:
        """Switch to tree attention, and refuse a model that it would not follow before it gives wrong text.

        The text (0, 1, 1) is run as a tree with a stray 0 beside the second token: the logits have to be those
        of the model's own attention over the text alone.
        """
        text, rows = [0, 1, 1], torch.tensor([0, 1, 3], device=self.device)
        ancestors = torch.tensor(
            [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], device=self.device
        ).bool()
        theirs = (
            self.model(input_ids=torch.tensor([text], device=self.device), use_cache=False)
            .logits[0]
            .float()
        )
        try:
            self.model.set_attn_implementation(attention.register())
            tokens, positions = torch.tensor([[0, 1, 0, 1], [0, 1, 1, 2]], device=self.device)
            mask = attention.additive(ancestors, self.dtype)
            ours = self.logits(self.hidden(tokens, positions, mask, self.new_cache(4)))[
                rows
            ].float()
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.config.model_type} models do not take tree attention: {error!r}"
            ) from None
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.05
        if not (ours - theirs).abs().max() <= tolerance * theirs.abs().max():
            raise UserError(
                f"{self.config.model_type} models attend or make logits in a way that is not supported"
            )
