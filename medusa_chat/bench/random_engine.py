"""The ordinary engine over random weights in the shape of a known model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from medusa_chat.bench.random_model import random_heads, random_model
from medusa_chat.config import LoadOptions, ModelSpec, Quant, UserError
from medusa_chat.decoding.engine import Engine
from medusa_chat.machine import plans
from medusa_chat.machine.contents import contents_of
from medusa_chat.machine.devices import choose_dtype, free_memory, prepare_allocator
from medusa_chat.model.backbone import Backbone
from medusa_chat.model.heads import decoding_heads
from medusa_chat.model.linear.joined import join_linears
from medusa_chat.model.linear.packed import pack_linears
from medusa_chat.model.native_weights import native_dtype, pack_native
from medusa_chat.native import library
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
        chosen = cast("Quant", named if colon else quant)
        found.append(RandomModel(shape, chosen, **heads))
    return found


def random_engine(
    wanted: RandomModel, positions: int, device: torch.device, options: LoadOptions
) -> Engine:
    """Make an engine over random weights in memory, with a context of `positions` tokens.

    Args:
        wanted: the model.
        positions: tokens of its context.
        device: where to make it.
        options: dtype, engine and threads are read.

    Raises:
        UserError: the memory does not suffice.
    """
    shape = SHAPES[wanted.shape]
    shape = replace(shape, context=max(positions, shape.context))
    prepare_allocator(device)
    native = takes_native(device, options)
    dtype = native_dtype(device, options.dtype) if native else choose_dtype(device, options.dtype)
    needed = memory_plan(wanted, positions, device, dtype, native=native).total
    free = free_memory(str(device))
    # Checked first: some systems end the process instead of raising an error.
    if needed > free:
        raise UserError(
            f"a model of shape {wanted.name} takes {needed / 2**30:.1f} GiB, and"
            f" {free / 2**30:.1f} GiB are free; --quant nf4 or a smaller --shape takes less"
        )
    try:
        options = replace(options, context=positions)
        if native:
            backbone, heads = _native_weights(wanted, shape, dtype, options)
        else:
            backbone, heads = _weights(wanted, shape, device, dtype)
        return Engine(
            backbone,
            heads,
            numbers(shape.vocabulary),
            replace(options, tree="chain-1", probing=False),
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


def takes_native(device: torch.device, options: LoadOptions) -> bool:
    """Tell if the native step runs a random model; all of them are Llamas.

    Raises:
        UserError: it is asked for and cannot be had.
    """
    wrong = library.available()
    if device.type != "cpu":
        wrong = f"the native step runs on a CPU, not on {device.type}"
    elif native_dtype(device, options.dtype) == torch.float16:
        wrong = "the native step takes float32 and bfloat16 models, not float16"
    if options.engine == "native" and wrong:
        raise UserError(f"--engine native: {wrong}")
    return options.engine != "torch" and not wrong


def _native_weights(
    wanted: RandomModel, shape: Shape, dtype: torch.dtype, options: LoadOptions
) -> tuple[Backbone, Heads | None]:
    """Make plain weights, and pack them in the wanted quantization."""
    cpu = torch.device("cpu")
    model = random_model(shape, quant="none", dtype=dtype, device=cpu)
    backbone = Backbone(model, own_attention=True)
    plain = random_heads(shape, wanted.heads, wanted.own, dtype=dtype, device=cpu)
    return backbone, pack_native(backbone, plain, wanted.quant, wanted.quant_heads, options)


def memory_plan(
    wanted: RandomModel,
    positions: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    native: bool = False,
) -> plans.MemoryPlan:
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
    # The native step packs weights that were drawn whole before.
    quants = ("none", "none") if native else (wanted.quant, wanted.quant_heads)
    load = plans.Load(str(device), *quants, positions, dtype.itemsize, native)
    return plans.plan(contents, load)


def numbers(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are their ids as text: random weights have no words."""
    words = models.WordLevel({str(number): number for number in range(vocabulary)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
