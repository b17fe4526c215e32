"""The ordinary engine over random weights in the shape of a known model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from medusa_chat.bench.random_model import random_heads, random_model
from medusa_chat.config import LoadOptions, ModelSpec, Quant, UserError
from medusa_chat.decoding.engine import Engine
from medusa_chat.machine import memory
from medusa_chat.machine.contents import contents_of
from medusa_chat.machine.devices import free_memory
from medusa_chat.model.backbone import Backbone
from medusa_chat.model.heads import decoding_heads
from medusa_chat.model.linear.joined import join_linears
from medusa_chat.model.linear.packed import pack_linears
from medusa_chat.shapes import SHAPES, Shape

if TYPE_CHECKING:
    from medusa_chat.model.heads import Heads


@dataclass(frozen=True)
class RandomModel:
    """A model of random weights.

    Attributes:
        shape: a name of medusa_chat.shapes.SHAPES.
        heads: number of Medusa heads.
        own: the heads have LM heads of their own.
        fused: join the matrices that read the same rows, as in a loaded model.
    """

    shape: str
    quant: Quant = "none"
    quant_heads: Quant = "none"
    heads: int = 5
    own: bool = False
    fused: bool = True

    @property
    def name(self) -> str:
        """The shape, with its quantization if there is one."""
        return self.shape if self.quant == "none" else f"{self.shape}:{self.quant}"


SHAPE_CONTEXTS = (512, 2048)
SHAPES_OF_GPU = (RandomModel("vicuna-7b"), RandomModel("vicuna-7b", "nf4"))


def parse_shapes(text: str, quant: Quant, **heads: Any) -> list[RandomModel]:
    """Read a list such as `vicuna-7b,vicuna-7b:nf4`; `quant` is for shapes that name none."""
    found = []
    quants = get_args(Quant)
    for entry in text.split(","):
        shape, colon, named = entry.partition(":")
        if shape not in SHAPES:
            raise UserError(f"unknown shape {shape!r}; there are {', '.join(SHAPES)}")
        if colon and named not in quants:
            raise UserError(f"--shape {entry}: {named!r} is none of {', '.join(quants)}")
        found.append(RandomModel(shape, named if colon else quant, **heads))  # type: ignore[arg-type]
    return found


def random_engine(
    wanted: RandomModel, positions: int, device: torch.device, dtype: torch.dtype
) -> Engine:
    """Make an engine over random weights in memory, with a context of `positions` tokens.

    Raises:
        UserError: the memory does not suffice.
    """
    shape = SHAPES[wanted.shape]
    shape = replace(shape, context=max(positions, shape.context))
    needed = memory_plan(wanted, positions, device, dtype).total
    free = free_memory(str(device))
    # Checked first: some systems end the process instead of raising an error.
    if needed > free:
        raise UserError(
            f"a model of shape {wanted.name} takes {needed / 2**30:.1f} GiB, and"
            f" {free / 2**30:.1f} GiB are free; --quant nf4 or a smaller --shape takes less"
        )
    try:
        backbone, heads = _weights(wanted, shape, device, dtype)
        return Engine(
            backbone,
            heads,
            numbers(shape.vocabulary),
            LoadOptions(tree="chain-1", context=positions, probing=False),
            name=wanted.name,
            eos=frozenset(),
        )
    except (torch.OutOfMemoryError, MemoryError):
        fault = f"a model of shape {wanted.name} does not fit into the memory of {device}"
        raise UserError(fault) from None


def _weights(
    wanted: RandomModel, shape: Shape, device: torch.device, dtype: torch.dtype
) -> tuple[Backbone, Heads]:
    model = random_model(shape, quant=wanted.quant, dtype=dtype, device=device)
    if wanted.fused:
        join_linears(model)
    backbone = Backbone(model)
    plain = random_heads(shape, wanted.heads, wanted.own, dtype=dtype, device=device)
    heads = decoding_heads(plain, wanted.quant_heads, device, dtype, backbone.lm_head)
    pack_linears(backbone.model)
    return backbone, heads


def memory_plan(
    wanted: RandomModel, positions: int, device: torch.device, dtype: torch.dtype
) -> memory.MemoryPlan:
    """Memory that such a model needs, computed as for a real model."""
    spec = ModelSpec(
        wanted.name,
        wanted.name,
        shape=wanted.shape,
        medusa_heads=wanted.heads,
        lm_heads="own" if wanted.own else "shared",
    )
    contents = contents_of(spec)
    assert contents is not None
    load = memory.Load(str(device), wanted.quant, wanted.quant_heads, positions, dtype.itemsize)
    return memory.plan(contents, load)


def numbers(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are their ids as text: random weights have no words."""
    words = models.WordLevel({str(number): number for number in range(vocabulary)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
