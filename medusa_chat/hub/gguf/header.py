"""Metadata of a GGUF file, and where its tensors are, without reading their data.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from math import prod
from mmap import ACCESS_READ, mmap
from typing import TYPE_CHECKING, Any

from medusa_chat.config import UserError
from medusa_chat.text import size_text

if TYPE_CHECKING:
    from pathlib import Path

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # unless the metadata has another
MOST_DIMENSIONS = 4
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
PLAIN = ("F32", "F16", "BF16", "F64")  # types that are no quantization
_NUMBERS = dict(enumerate("BbHhIif?"))  # type of a value: its struct format
_NUMBERS |= {10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9


@dataclass(frozen=True)
class TensorInfo:
    """Place and form of a tensor.

    Attributes:
        shape: rows first, as torch has it.
        type: ggml's name of the number format, such as Q4_K.
        start: of its bytes in `file`.
        size: in bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    file: Path
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """All that a GGUF file says before its data. `tensors` includes those of all shards."""

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """The family's name in GGUF."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def quantized(self) -> bool:
        """True if a tensor is in another form than plain floats."""
        return any(tensor.type not in PLAIN for tensor in self.tensors.values())

    def of_family(self, key: str, default: Any = None) -> Any:
        """Return a value of the family's own part of the metadata."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def read_header(file: Path) -> Header:
    """Read a GGUF file's header, and those of the other shards.

    Args:
        file: a whole file, or any shard of a series.

    Raises:
        UserError: a file is missing, no GGUF file, cut off, or of an unknown version or type.
    """
    parts = [_read_part(each) for each in shards_of(file)]
    metadata, tensors = parts[0]
    for _, more in parts[1:]:
        tensors |= more
    return Header(file, metadata, tensors)


def shards_of(file: Path) -> list[Path]:
    """Return all files of a series, or the file itself."""
    found = SHARD.search(file.name)
    if found is None:
        return [file]
    count = int(found[2])
    stem = file.name[: found.start()]
    return [file.with_name(f"{stem}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]


def _read_part(file: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    try:
        with file.open("rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as content:
            return _Reader(file, content).read()
    except FileNotFoundError:
        raise UserError(f"cannot load the model {file}: there is no such file") from None
    except OSError as error:
        raise UserError(f"cannot load the model {file}: {error.strerror or error}") from None
    except (struct.error, ValueError, OverflowError, MemoryError, RecursionError):
        raise UserError(
            f"cannot load the model {file}: its header is cut off or damaged; download it again"
        ) from None


class _Reader:
    """Reads one file from its beginning."""

    def __init__(self, file: Path, content: mmap) -> None:
        self._file = file
        self._content = content
        self._place = 0

    def read(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        """Return metadata and tensors."""
        if self._content[:4] != MAGIC:
            raise UserError(f"cannot load the model {self._file}: it is no GGUF file")
        self._place = 4
        version, tensors, entries = self._numbers("IQQ")
        if version not in VERSIONS:
            raise UserError(
                f"cannot load the model {self._file}: its GGUF version is {version}, and"
                f" {' and '.join(map(str, VERSIONS))} can be read"
            )
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._text()
            metadata[key] = self._value(self._numbers("I")[0])
        table = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise ValueError("the alignment is no size")
        data = -(-self._place // alignment) * alignment
        return metadata, {name: self._info(name, data, *rest) for name, *rest in table}

    def _numbers(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self._content, self._place)
        self._place += struct.calcsize(f"<{form}")
        return values

    def _text(self) -> str:
        length: int = self._numbers("Q")[0]
        end = self._place + length
        if end > len(self._content):
            raise ValueError("a text ends after the file")
        text = self._content[self._place : end].decode(errors="replace")
        self._place = end
        return text

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._numbers(_form(kind))[0]
        inner, count = self._numbers("IQ")
        if inner in (_STRING, _ARRAY):
            return [self._value(inner) for _ in range(count)]
        return list(self._numbers(f"{count}{_form(inner)}"))

    def _tensor(self) -> tuple[Any, ...]:
        name = self._text()
        dimensions: int = self._numbers("I")[0]
        if dimensions > MOST_DIMENSIONS:
            raise ValueError("a tensor has too many dimensions")
        sizes = self._numbers(f"{dimensions}Q")
        kind, offset = self._numbers("IQ")
        return name, tuple(reversed(sizes)), kind, offset

    def _info(
        self, name: str, data: int, shape: tuple[int, ...], kind: int, offset: int
    ) -> TensorInfo:
        """Describe a tensor; refuse one of an unknown type or beyond the end of the file."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            known = GGMLQuantizationType(kind)
        except ValueError:
            raise UserError(
                f"cannot load the model {self._file}: tensor {name} has the unknown type {kind}"
            ) from None
        block, width = GGML_QUANT_SIZES[known]
        size = prod(shape) // block * width
        start = data + offset
        if start + size > len(self._content):
            whole = size_text(start + size)
            raise UserError(
                f"cannot load the model {self._file}: it is cut off, as it has"
                f" {size_text(len(self._content))} of at least {whole}; download it again"
            )
        return TensorInfo(name, shape, known.name, self._file, start, size)


def _form(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError("a value has an unknown type")
    return _NUMBERS[kind]
