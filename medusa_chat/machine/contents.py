"""What a model holds, counted in the headers of its files or told by its entry in models.yaml. No torch."""

from __future__ import annotations

import json
import re
from dataclasses import astuple, dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from medusa_chat.config import BUNDLED, ModelSpec
from medusa_chat.shapes import SHAPES, Shape

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_LAYER = re.compile(r"\.\d+\.")
_HEADS = re.compile(r"medusa_heads?\.|\d+\.\d+\.")


@dataclass(frozen=True)
class Contents:
    """How many weights a model has, by what quantization does to them.

    Attributes:
        layers: in the matrices of the layers, which bitsandbytes quantizes.
        plain: in embeddings, LM head and norms, which stay as they are.
        packed: bytes of what the files hold quantized already.
        heads: in the Medusa heads.
        largest, largest_head: of the largest matrix of a layer and of a head.
    """

    shape: Shape
    layers: int
    plain: int
    largest: int
    packed: int = 0
    heads: int = 0
    largest_head: int = 0


def contents_of(spec: ModelSpec) -> Contents | None:
    """What a spec's model holds: counted in its files, or as its entry says; None if neither is known.

    Headers are read, no weights.
    """
    folder = BUNDLED if spec.backbone == "bundled" else Path(spec.backbone)
    shape = _shape(folder) or SHAPES.get(spec.shape)
    if shape is None:
        return None
    tensors = list(_tensors(folder.glob("*.safetensors"))) if folder.is_dir() else []
    backbone = [
        (name, kind, size) for name, kind, size in tensors if _part(name) in ("layers", "plain")
    ]
    if not any(_part(name) == "layers" for name, *_ in backbone):
        counted = Contents(
            shape, shape.linear_parameters, shape.parameters - shape.linear_parameters, 0
        )
        counted = replace(
            counted, largest=shape.hidden * max(shape.intermediate, shape.heads * shape.head_dim)
        )
    else:
        counted = _counted(shape, backbone)
    return _with_heads(
        counted, spec, folder, [prod(size) for name, _, size in tensors if _part(name) == "heads"]
    )


def _shape(folder: Path) -> Shape | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shape = Shape.of(config.get("text_config") or config)
        sizes = [value for value in astuple(shape) if not isinstance(value, bool)]
        return shape if all(isinstance(size, int) and size > 0 for size in sizes) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None  # whoever loads it says what is wrong


def _tensors(files: Iterable[Path]) -> Iterator[tuple[str, str, list[int]]]:
    """Name, number format and shape of each tensor in safetensors files. Damaged ones are left to the loader."""
    for file in files:
        try:
            with safe_open(file, "numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    entry = opened.get_slice(name)
                    yield name, entry.get_dtype(), entry.get_shape()
        except (OSError, SafetensorError):
            continue


def _part(name: str) -> str:
    """What a tensor of a model's folder belongs to, by its name."""
    if _HEADS.match(name):
        return "heads"
    return "layers" if _LAYER.search(name) else "plain"


def _counted(shape: Shape, tensors: Iterable[tuple[str, str, list[int]]]) -> Contents:
    layers, plain, packed, largest = 0, 0, 0, 0
    for name, kind, size in tensors:
        count = prod(size)
        if (
            kind not in ("F64", "F32", "F16", "BF16") or ".weight." in name
        ):  # or bitsandbytes' scales of a weight
            packed += count * _width(kind)
        elif _part(name) == "layers" and len(size) > 1:
            layers, largest = layers + count, max(largest, count)
        else:
            plain += count
    return Contents(shape, layers, plain, largest, packed)


def _width(kind: str) -> int:
    """Bytes of a number in safetensors' name of its format: F32, I64, U8, F8_E4M3, BOOL."""
    bits = re.search(r"\d+", kind)
    return int(bits[0]) // 8 if bits else 1


def _with_heads(contents: Contents, spec: ModelSpec, folder: Path, inside: list[int]) -> Contents:
    """The contents with the heads: those in the backbone's files, in files of their own, or as the entry says."""
    place = Path(spec.heads) if spec.heads else folder
    if place.exists() and spec.heads:
        files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
        tensors = [(name, prod(size)) for name, _, size in _tensors(files)]
        # A whole model with its heads names them; where heads are alone they may have any name.
        inside = [count for name, count in tensors if _part(name) == "heads"] or [
            count for _, count in tensors
        ]
        pickled = (
            [place] if place.suffix == ".pt" else list(place.glob("*.pt")) if not files else []
        )
        inside += [file.stat().st_size // 2 for file in pickled]
    if not inside and spec.medusa_heads:
        hidden, vocabulary = contents.shape.hidden, contents.shape.vocabulary
        inside = [hidden * (hidden + 1)] * spec.medusa_heads
        inside += [hidden * vocabulary] * spec.medusa_heads if spec.lm_heads == "own" else []
    # A pickle is one number: its matrices are no larger than an LM head.
    largest = min(
        max(inside, default=0), max(contents.shape.embedding_parameters, contents.shape.hidden**2)
    )
    return replace(contents, heads=sum(inside), largest_head=largest)
