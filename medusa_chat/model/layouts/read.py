"""Heads read tensor by tensor into the stacks that decode, each tensor checked on the way."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.config import LAYOUTS, UserError
from medusa_chat.model.heads import MedusaHeads
from medusa_chat.model.layouts.checked import CheckedTensors
from medusa_chat.model.layouts.config import contradictions
from medusa_chat.model.layouts.lm_heads import LMHeads
from medusa_chat.model.layouts.names import NAMINGS, PARENT_BIAS, Parts, sort_names
from medusa_chat.model.layouts.tensors import TensorFiles
from medusa_chat.model.parent_bias import ParentBias

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from medusa_chat.model.head_vocabulary import HeadVocabulary

# Layouts whose files look like those of others.
SAME_FILES = {"tgi": ("v0.1", "v2"), "tensorrt-llm": ("v0.1", "tensorrt-llm engine")}


@dataclass(frozen=True)
class ReadHeads:
    """Heads of a file.

    Attributes:
        heads: the heads.
        layout: one of config.LAYOUTS, or "tensorrt-llm engine". Heads of v0.1 or v2 may also be
            TGI's or the input of TensorRT-LLM.
        notices: lines for the user: padding was cut or added, the config contradicts, and so on.
    """

    heads: MedusaHeads
    layout: str
    notices: tuple[str, ...] = ()


def read_heads(
    path: Path,
    hidden: int,
    vocabulary: int,
    *,
    dtype: torch.dtype | None = None,
    lm_head: Tensor | None = None,
    layout: str = "",
) -> ReadHeads:
    """Read heads of any public layout and check them against the backbone.

    Args:
        path: a safetensors file, a pickle of tensors, or the index of shards; see `find_heads`.
        hidden: the backbone's hidden size.
        vocabulary: rows of the backbone's LM head.
        dtype: of the heads; None keeps the file's.
        lm_head: [V, hidden], the backbone's, to compare with one that a file's heads share.
        layout: the one of config.LAYOUTS that is expected; another one is worth a notice.

    Raises:
        UserError: the file is missing or damaged, a tensor is unknown or missing, a shape does
            not fit, or a number is NaN or infinite.
    """
    files = TensorFiles(path)
    tensors = CheckedTensors(files)
    parts = sort_names(str(path), files.files)
    biases = _check_complete(tensors, parts)
    lm_heads = LMHeads(tensors, parts, hidden, vocabulary)
    own = lm_heads.own(lm_head)
    with _default_dtype(dtype or _stored_dtype(tensors, parts)):  # no float32 copy first
        rows = lm_heads.rows if own else None
        cut = lm_heads.heads_vocabulary
        heads = MedusaHeads(parts.heads, parts.layers, hidden, rows, vocabulary=cut)
        if parts.parent_bias:
            heads.parent_bias = _read_parent_bias(tensors, vocabulary, cut)
    _fill(heads, tensors, parts, lm_heads)
    found = _layout(parts, own)
    notices = [
        *lm_heads.notices,
        *contradictions(path.parent / "config.json", _facts(parts, own, biases)),
        *_unexpected(found, layout),
        *_left_out(parts, biases),
    ]
    return ReadHeads(heads, found, tuple(notices))


def _fill(heads: MedusaHeads, tensors: CheckedTensors, parts: Parts, lm_heads: LMHeads) -> None:
    """Copy a file's blocks and LM heads to heads of their sizes."""
    heads.requires_grad_(False)
    for (head, layer, kind), name in parts.blocks.items():
        stack = heads.weight if kind == "weight" else heads.bias
        tensors.fill(name, stack[layer, head])
    if heads.lm_heads is not None:
        lm_heads.fill(heads.lm_heads)
    heads.requires_grad_(True)


def _check_complete(tensors: CheckedTensors, parts: Parts) -> bool:
    """Check that no block or LM head is missing; returns whether blocks have biases."""
    naming = NAMINGS[parts.naming]
    heads, layers = range(parts.heads), range(parts.layers)
    biases = any(kind == "bias" for *_, kind in parts.blocks)
    kinds = ("weight", "bias") if biases else ("weight",)
    # Lazily: a damaged name may count to a billion heads.
    every = ((head, layer, kind) for head in heads for layer in layers for kind in kinds)
    for key in every:
        if key not in parts.blocks:
            raise tensors.fault(f"tensor {naming.block_name(*key)} is missing")
    place = parts.layers if "{layer}" in naming.lm_head else None
    for (head, layer), name in parts.lm_heads.items():
        if head not in heads or layer != place:
            raise tensors.fault(f"LM head {name} belongs to no head")
    for head in heads:
        if parts.lm_heads and (head, place) not in parts.lm_heads:
            name = naming.lm_head_name(head, parts.layers)
            raise tensors.fault(f"tensor {name} is missing")
    return biases


def _read_parent_bias(
    tensors: CheckedTensors, vocabulary: int, cut: HeadVocabulary | None
) -> ParentBias:
    """Read the bias by the parent's token, in the default dtype."""
    for name in PARENT_BIAS:
        if name not in tensors.files.files:
            raise tensors.fault(f"tensor {name} is missing")
    first, second = PARENT_BIAS
    found = tensors.get(first)
    if found.ndim != 2 or not found.shape[1]:
        raise tensors.fault(f"tensor {first} has shape {list(found.shape)}, not [tokens, rank]")
    rank = found.shape[1]
    rows = vocabulary if cut is None else len(cut)
    bias = ParentBias(torch.empty(rows + (cut is not None), rank), torch.empty(rows, rank), cut)
    bias.requires_grad_(False)
    tensors.fill(first, bias.first)
    tensors.fill(second, bias.second)
    return bias


def _stored_dtype(tensors: CheckedTensors, parts: Parts) -> torch.dtype:
    """Return the dtype that holds the numbers of all tensors."""
    names = [*parts.blocks.values(), *parts.lm_heads.values(), *sorted(parts.parent_bias)]
    if parts.shared:
        names.append(parts.shared)
    return reduce(torch.promote_types, [tensors.get(name).dtype for name in names])


def _layout(parts: Parts, own: bool) -> str:
    if parts.naming != "official":
        return parts.naming
    return "v0.1" if own else "v2"


def _facts(parts: Parts, own: bool, biases: bool) -> dict[str, int]:
    """Facts that a config may contradict."""
    shared = not own or parts.shared is not None
    return {"heads": parts.heads, "layers": parts.layers, "shared": shared, "biases": biases}


def _unexpected(layout: str, expected: str) -> Iterator[str]:
    """Notices if a file has another layout than expected.

    Raises:
        UserError: the expected layout is unknown.
    """
    if expected and expected not in LAYOUTS:
        raise UserError(f"unknown layout {expected!r} of heads; there are {', '.join(LAYOUTS)}")
    if expected and layout not in SAME_FILES.get(expected, (expected,)):
        yield f"the heads were expected in the layout {expected}, and are in {layout}"


def _left_out(parts: Parts, biases: bool) -> Iterator[str]:
    """Notices of what is missing or left out."""
    if not biases:
        yield "the heads have no biases, which some converters drop: they may guess worse for it"
    if parts.replaced:
        yield f"tensors that training replaced ({parts.replaced} original_module) are left out"
    if parts.lora:
        yield (
            f"an adapter's tensors ({parts.lora}) are left out: the heads were trained with it on"
        )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
