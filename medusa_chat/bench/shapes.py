"""Models of random weights in the shape of known ones, behind the ordinary engine: step costs without weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from medusa_chat.bench.plan import RandomModel
from medusa_chat.bench.random_model import random_heads, random_model
from medusa_chat.config import ModelSpec, Quant, UserError
from medusa_chat.decoding.engine import Engine
from medusa_chat.decoding.trees.tree import chain
from medusa_chat.machine import memory
from medusa_chat.machine.devices import free_memory
from medusa_chat.model.backbone import Backbone
from medusa_chat.model.heads import decoding_heads
from medusa_chat.model.linear.joined import fuse_linears
from medusa_chat.model.linear.packed import pack_linears
from medusa_chat.shapes import SHAPES

SHAPE_CONTEXTS = (512, 2048)
SHAPES_OF_GPU = (RandomModel("vicuna-7b"), RandomModel("vicuna-7b", "nf4"))


def parse_shapes(text: str, quant: Quant, **heads: Any) -> list[RandomModel]:
    """`vicuna-7b,vicuna-7b:nf4` as models; where no quantization is named it is `quant`.

    heads: the fields of RandomModel that concern the heads.
    """
    found, quants = [], get_args(Quant)
    for entry in text.split(","):
        shape, colon, named = entry.partition(":")
        if shape not in SHAPES:
            raise UserError(f"unknown shape {shape!r}; there are {', '.join(SHAPES)}")
        if colon and named not in quants:
            raise UserError(
                f"--shape {entry}: behind the colon stands {', '.join(quants)}, not {named!r}"
            )
        found.append(RandomModel(shape, named if colon else quant, **heads))  # type: ignore[arg-type]
    return found


def random_engine(
    wanted: RandomModel, positions: int, device: torch.device, dtype: torch.dtype
) -> Engine:
    """An engine over random weights, made in memory, with room for `positions` tokens whatever the shape was made for.

    Raises UserError if the memory does not suffice.
    """
    shape = SHAPES[wanted.shape]
    shape = replace(shape, context=max(positions, shape.context))
    needed, free = memory_plan(wanted, positions, device, dtype).total, free_memory(str(device))
    if needed > free:  # a system without the memory may end the process instead of raising
        raise UserError(
            f"a model of shape {wanted.name} takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free;"
            " --quant nf4 or a smaller --shape takes less"
        )
    try:
        model = random_model(shape, quant=wanted.quant, dtype=dtype, device=device)
        if wanted.fused:
            fuse_linears(model)
        backbone = Backbone(model)
        drawn = random_heads(shape, wanted.heads, wanted.own, dtype=dtype, device=device)
        heads = decoding_heads(drawn, wanted.quant_heads, device, dtype, backbone.lm_head)
        pack_linears(backbone.model)
        return Engine(
            backbone,
            heads,
            numbers(shape.vocabulary),
            name=wanted.name,
            tree=chain(1),
            context=positions,
            eos=frozenset(),
            probing=False,
        )
    except (torch.OutOfMemoryError, MemoryError):
        raise UserError(
            f"a model of shape {wanted.name} does not fit into the memory of {device}"
        ) from None


def memory_plan(
    wanted: RandomModel, positions: int, device: torch.device, dtype: torch.dtype
) -> memory.MemoryPlan:
    """What such a model needs, as memory.plan foretells it of a real one."""
    spec = ModelSpec(
        wanted.name,
        wanted.name,
        shape=wanted.shape,
        medusa_heads=wanted.heads,
        lm_heads="own" if wanted.own else "shared",
    )
    contents = memory.contents_of(spec)
    assert contents is not None
    load = memory.Load(str(device), wanted.quant, wanted.quant_heads, positions, dtype.itemsize)
    return memory.plan(contents, load)


def numbers(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose every token reads as its id: random weights have no words."""
    words = models.WordLevel({str(number): number for number in range(vocabulary)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
