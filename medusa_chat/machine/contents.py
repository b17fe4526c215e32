"""The weights of a model, counted in its files' headers or taken from its entry. No torch."""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors import SafetensorError, safe_open

from medusa_chat.config import BUNDLED, ModelSpec
from medusa_chat.files import read_json
from medusa_chat.hub.file_names import OWN_HEADS
from medusa_chat.hub.gguf.folder import WEIGHTS_FILE, weights_of
from medusa_chat.shapes import SHAPES, Shape

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_LAYER = re.compile(r"\.\d+\.")
_HEADS = re.compile(r"medusa_heads?\.|\d+\.\d+\.")
_BACKBONE = ("layers", "plain")  # parts
_PLAIN_FORMATS = ("F64", "F32", "F16", "BF16")  # the names that safetensors has


@dataclass(frozen=True)
class Contents:
    """Numbers of weights, grouped by what quantization does to them.

    Attributes:
        layers: in the matrices of the layers, which bitsandbytes quantizes.
        plain: in embeddings, LM head and norms, which stay unquantized.
        largest: in the largest matrix of a layer.
        packed: bytes of the tensors that the files hold quantized.
        heads: in the Medusa heads, with their parent bias.
        largest_head: in the largest matrix of a head.
        parent_bias: in the bias by the parent's token, which stays unquantized.
        head_tokens: tokens that the heads rank; 0 for all.
        unpacked: True if the files (GGUF) hold them in a form that loading turns into plain ones.
    """

    shape: Shape
    layers: int
    plain: int
    largest: int
    packed: int = 0
    heads: int = 0
    largest_head: int = 0
    parent_bias: int = 0
    head_tokens: int = 0
    unpacked: bool = False


class _Tensor(NamedTuple):
    name: str
    format: str
    size: list[int]

    @property
    def part(self) -> str:
        """The part of the model that a tensor belongs to, by its name."""
        if self.name.startswith("parent_bias."):
            return "parent bias"
        if self.name.removeprefix("medusa_heads.") == "token_map":
            return "token map"
        if _HEADS.match(self.name):
            return "heads"
        return "layers" if _LAYER.search(self.name) else "plain"

    @property
    def weights(self) -> int:
        """How many numbers it holds."""
        return prod(self.size)


def contents_of(spec: ModelSpec) -> Contents | None:
    """Count a model's weights in the headers of its files, else take them from its entry.

    Returns:
        None if neither says.
    """
    folder = BUNDLED if spec.backbone == "bundled" else Path(spec.backbone)
    shape = _shape(folder) or SHAPES.get(spec.shape)
    if shape is None:
        return None
    tensors = list(_tensors_of(folder)) if folder.is_dir() else []
    backbone = [tensor for tensor in tensors if tensor.part in _BACKBONE]
    if any(tensor.part == "layers" for tensor in backbone):
        contents = _counted(shape, backbone)
    else:
        contents = Contents(
            shape,
            layers=shape.linear_parameters,
            plain=shape.parameters - shape.linear_parameters,
            largest=shape.hidden * max(shape.intermediate, shape.heads * shape.head_dim),
        )
    if spec.heads and Path(spec.heads).exists():
        heads = _heads_in(Path(spec.heads))
    else:
        heads = [tensor for tensor in tensors if tensor.part not in _BACKBONE]
    return _with_heads(contents, heads or _heads_of_entry(spec, shape), folder)


def _with_heads(contents: Contents, tensors: list[_Tensor], folder: Path) -> Contents:
    """Add the heads to what a folder's backbone holds."""
    sizes: dict[str, list[int]] = {"parent bias": [], "token map": [], "heads": []}
    for tensor in tensors:
        sizes.get(tensor.part, sizes["heads"]).append(tensor.weights)
    bias = sum(sizes["parent bias"])
    # A pickle counts as one number, but its matrices are no larger than an LM head.
    limit = max(contents.shape.embedding_parameters, contents.shape.hidden**2)
    return replace(
        contents,
        heads=sum(sizes["heads"]) + bias,
        largest_head=min(max(sizes["heads"], default=0), limit),
        parent_bias=bias,
        head_tokens=sum(sizes["token map"]),
        unpacked=(folder / WEIGHTS_FILE).is_file(),
    )


def _shape(folder: Path) -> Shape | None:
    try:
        config = read_json(folder / "config.json")
        shape = Shape.of(config.get("text_config") or config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None  # loading it will say what is wrong
    sizes = [value for value in astuple(shape) if not isinstance(value, bool)]
    return shape if all(isinstance(size, int) and size > 0 for size in sizes) else None


def _tensors_of(folder: Path) -> Iterator[_Tensor]:
    """Yield the tensors of a model's folder; those of a GGUF file count as unpacked."""
    header = weights_of(folder)
    if header is None:
        yield from _tensors(_weight_files(folder))
        return
    for tensor in header.tensors.values():
        yield _Tensor(tensor.name, "F16", list(tensor.shape))


def _weight_files(folder: Path) -> list[Path]:
    """Return a folder's safetensors files, with that of heads in a folder of their own."""
    heads = folder / OWN_HEADS
    return [*sorted(folder.glob("*.safetensors")), *([heads] if heads.is_file() else [])]


def _tensors(files: Iterable[Path]) -> Iterator[_Tensor]:
    """Yield the tensors of safetensors files. Loading them will report damaged ones."""
    for file in files:
        try:
            with safe_open(file, "numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    entry = opened.get_slice(name)
                    yield _Tensor(name, entry.get_dtype(), entry.get_shape())
        except (OSError, SafetensorError):
            continue


def _counted(shape: Shape, tensors: Iterable[_Tensor]) -> Contents:
    layers = 0
    plain = 0
    packed = 0
    largest = 0
    for tensor in tensors:
        # bitsandbytes' scales of a weight have a plain format, and .weight. in their names
        if tensor.format not in _PLAIN_FORMATS or ".weight." in tensor.name:
            packed += tensor.weights * _width(tensor.format)
        elif tensor.part == "layers" and len(tensor.size) > 1:
            layers += tensor.weights
            largest = max(largest, tensor.weights)
        else:
            plain += tensor.weights
    return Contents(shape, layers, plain, largest, packed)


def _width(name: str) -> int:
    """Return the bytes of a number by safetensors' name of its format: F32, I64, U8, F8_E4M3."""
    bits = re.search(r"\d+", name)
    return int(bits[0]) // 8 if bits else 1


def _heads_in(place: Path) -> list[_Tensor]:
    """List the tensors of the heads in a file or folder of their own; a pickle counts as one."""
    files = [place] if place.is_file() else _weight_files(place)
    tensors = list(_tensors(files))
    # A model's folder names the heads among other weights; a file of heads may name them freely.
    if any(tensor.part == "heads" for tensor in tensors):
        tensors = [tensor for tensor in tensors if tensor.part not in _BACKBONE]
    pickles = [] if files else list(place.glob("*.pt"))
    if place.suffix == ".pt":
        pickles = [place]
    unread = [_Tensor(file.name, "F16", [file.stat().st_size // 2]) for file in pickles]
    return tensors + unread


def _heads_of_entry(spec: ModelSpec, shape: Shape) -> list[_Tensor]:
    sizes = [[shape.hidden, shape.hidden + 1]] * spec.medusa_heads
    if spec.lm_heads == "own":
        sizes += [[shape.hidden, shape.vocabulary]] * spec.medusa_heads
    return [_Tensor(spec.name, "F16", size) for size in sizes]
