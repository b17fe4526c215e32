"""Tiny random models run by the native step, for the tests of it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch

from medusa_chat.native.model import NativeHeads, NativeModel
from medusa_chat.native.step import NativeStep, Team
from tests.helpers.tiny import random_backbone

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from medusa_chat.model.backbone import Backbone


# Inputs in whole blocks of nf4.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_attention_heads": 4}


def backbone_of(kind: str, weights: str, **changes: Any) -> Backbone:
    """float32 keys and values for float32 weights, bfloat16 for the others."""
    backbone = random_backbone(kind, **(WIDE | changes))
    if weights != "float32":
        backbone.model.to(torch.bfloat16)
    return backbone


class Native:
    """A backbone's native step behind an empty text."""

    def __init__(
        self,
        backbone: Backbone,
        weights: str = "float32",
        threads: int = 2,
        capacity: int = 96,
        heads: Any = None,
        heads_weights: str = "float32",
        release: bool = False,
        lm_head: str | None = None,
    ) -> None:
        self.cache = backbone.new_cache(capacity)
        model = NativeModel(backbone, weights, lm_head, release=release)
        packed = None if heads is None else NativeHeads(heads, model, heads_weights)
        self.step = NativeStep(model, packed, Team(threads), self.cache)

    def text(self, tokens: Sequence[int], seed: int | None = None) -> None:
        """Make `tokens` the text, at once or in random splits."""
        self.cache.rewind(0)
        chance, start = random.Random(seed), 0
        while start < len(tokens):
            most = len(tokens) - start
            count = most if seed is None else chance.randint(1, most)
            self.step.prefill(tokens[start : start + count])
            start += count

    def tree(self, tokens: Sequence[int], parents: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        """Hidden states [n, hidden] and logits [n, V] of rows behind the text, which stays."""
        self.step.rows(tokens, parents)
        count = len(tokens)
        return self.step.hidden[:count].clone(), self.step.logits(count).clone()


def shape(heads: int, kv_heads: int, head_dim: int, hidden: int) -> dict[str, int]:
    """A config's sizes of attention."""
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": hidden,
    }


def random_parents(count: int, seed: int) -> list[int]:
    """A tree of rows: now and then a chain, a star or something between."""
    chance = random.Random(seed)
    reach = chance.choice([1, 2, 4, count])
    return [0, *(chance.randrange(max(0, row - reach), row) for row in range(1, count))]


def path_to(row: int, parents: Sequence[int]) -> list[int]:
    """Rows from the root down to `row`."""
    path = [row]
    while path[0]:
        path.insert(0, parents[path[0]])
    return path
