"""Models of random weights in the shape of known ones, behind the ordinary engine: step costs without weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from medusa_chat.bench.plan import RandomModel
from medusa_chat.config import Quant, UserError
from medusa_chat.decoding.engine import Engine
from medusa_chat.decoding.tree import chain
from medusa_chat.model.backbone import Backbone
from medusa_chat.model.packing import pack_linears
from medusa_chat.model.random_model import random_heads, random_model
from medusa_chat.shapes import SHAPES


def parse_shapes(text: str, quant: Quant, heads: int, own: bool) -> list[RandomModel]:
    """`vicuna-7b,vicuna-7b:nf4` as models; where no quantization is named it is `quant`."""
    found = []
    for entry in text.split(","):
        shape, _, named = entry.partition(":")
        if shape not in SHAPES:
            raise UserError(f"unknown shape {shape!r}; there are {', '.join(SHAPES)}")
        found.append(RandomModel(shape, named or quant, heads, own))  # type: ignore[arg-type]
    return found


def random_engine(wanted: RandomModel, positions: int, device: torch.device, dtype: torch.dtype) -> Engine:
    """An engine over random weights, made in memory, with room for `positions` tokens whatever the shape was made for.

    Raises UserError if the memory does not suffice.
    """
    shape = SHAPES[wanted.shape]
    shape = replace(shape, context=max(positions, shape.context))
    try:
        model = random_model(shape, quant=wanted.quant, dtype=dtype, device=device)
        heads = random_heads(shape, wanted.heads, wanted.own).to(device, dtype)
        backbone = Backbone(model)
        pack_linears(backbone.model)
        return Engine(
            backbone, heads, numbers(shape.vocabulary), name=wanted.name, tree=chain(1), context=positions,
            eos=frozenset(), probing=False,
        )  # fmt: skip
    except (torch.OutOfMemoryError, MemoryError):
        raise UserError(f"a model of shape {wanted.name} does not fit into the memory of {device}") from None


def numbers(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose every token reads as its id: random weights have no words."""
    words = models.WordLevel({str(number): number for number in range(vocabulary)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
