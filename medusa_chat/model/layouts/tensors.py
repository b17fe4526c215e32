"""Named tensors of one file or of shards with an index, safetensors or pickle.

Each tensor is mapped into memory anew and freed after use, so that a process never holds a file
twice.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from medusa_chat.config import UserError
from medusa_chat.files import read_json
from medusa_chat.text import reason_of

PICKLES = (".pt", ".bin", ".pth")
INDEX = ".index.json"


class TensorFiles:
    """The tensors of a file, or of the shards that an index names.

    Attributes:
        path: the file, or the index.
        files: the file of each tensor, by name.
    """

    def __init__(self, path: Path) -> None:
        """Read the names.

        Raises:
            UserError: a file is missing, damaged, or holds more than tensors.
        """
        self.path = path
        self._unmappable: dict[Path, dict[str, Tensor]] = {}  # pickles of before torch 1.6
        if path.name.endswith(INDEX):
            self.files = {name: path.parent / file for name, file in _weight_map(path).items()}
        else:
            self.files = dict.fromkeys(_names(path), path)

    def get(self, name: str) -> Tensor:
        """Return a tensor, mapped from its file.

        Raises:
            UserError: the file is damaged, or the tensor is not in the shard that the index names.
        """
        file = self.files[name]
        if file.suffix not in PICKLES:
            try:
                with safe_open(file, "pt") as opened:
                    tensor: Tensor = opened.get_tensor(name)
                    return tensor
            except (OSError, SafetensorError, ValueError) as error:
                raise _unreadable(file, error) from None
        found = self._unmappable.get(file) or _unpickle(file)
        if not is_mappable(file):
            self._unmappable[file] = found
        if name not in found:
            raise UserError(
                f"cannot read {file}: the tensor {name} that {self.path.name} places there is"
                " missing"
            )
        return found[name]


def is_mappable(path: Path) -> bool:
    """Return whether a pickle is in the format that torch has written since 1.6."""
    return zipfile.is_zipfile(path)


def _names(path: Path) -> list[str]:
    if path.suffix in PICKLES:
        return list(_unpickle(path))
    try:
        with safe_open(path, "pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(path, error) from None


def formats(path: Path) -> dict[str, str]:
    """Return the number format of each tensor of a file, as the file's kind names it.

    Raises:
        UserError: the file is missing, damaged, or holds more than tensors.
    """
    if path.suffix in PICKLES:
        return {name: str(t.dtype).removeprefix("torch.") for name, t in _unpickle(path).items()}
    try:
        with safe_open(path, "pt") as opened:
            names = opened.keys()
            return {name: opened.get_slice(name).get_dtype() for name in names}
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(path, error) from None


def _weight_map(path: Path) -> dict[str, str]:
    """Return the file of each tensor from an index of shards."""
    try:
        index = read_json(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"cannot read {path}: it has no weight_map of names to files")
    for file in files.values():
        if Path(file).name != file:
            raise UserError(f"cannot read {path}: {file!r} is no file of its folder")
    return files


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a pickle, mapped if the format allows; nothing else in it is run."""
    try:
        found = _load(path)
    except pickle.UnpicklingError as error:
        called = re.search(r"GLOBAL (\S+)", str(error))
        fault = f"it calls {called[1]}" if called else "it is damaged, or torch did not write it"
        raise UserError(
            f"cannot read {path}: {fault}; only pickles of tensors alone are opened"
        ) from None
    except UserError:
        raise
    except Exception as error:  # damaged pickles fail in many ways, in torch and in the unpickler
        raise _unreadable(path, error) from None
    if not isinstance(found, dict):
        raise UserError(
            f"cannot read {path}: it holds a {type(found).__name__}, not tensors by name"
        )
    for name, value in found.items():
        _check_tensor(path, name, value)
    return found


def _load(path: Path) -> Any:
    mapped = path.is_file() and is_mappable(path)
    if mapped:
        with zipfile.ZipFile(path) as archive:
            kinds = {record.compress_type for record in archive.infolist()}
        # torch stores records as they are; compressed ones could grow without bounds.
        if kinds - {zipfile.ZIP_STORED}:
            raise UserError(
                f"cannot read {path}: its records are compressed, which torch never does"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _check_tensor(path: Path, name: Any, value: Any) -> None:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise UserError(f"cannot read {path}: {name!r} is a {type(value).__name__}, not a tensor")
    if value.layout is not torch.strided or value.device.type != "cpu":
        raise UserError(
            f"cannot read {path}: {name!r} is a {value.layout} tensor on {value.device}: no plain"
            " one"
        )


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, OSError) and error.strerror:
        return UserError(f"cannot read {path}: {error.strerror}")
    return UserError(
        f"cannot read {path}: {reason_of(error)}; the file is damaged or not what its name says"
    )
