"""Named tensors of one file or of shards behind an index, safetensors or pickle, read one at a time.

Every tensor is mapped into memory anew and let go after use, so that a process never holds a file twice.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from medusa_chat.config import UserError

PICKLES = (".pt", ".bin", ".pth")
INDEX = ".index.json"


class TensorFiles:
    """The tensors of a file, or of the shards that an index names.

    Attributes:
        path: the file, or the index.
        files: the file of each tensor, by name.
    """

    def __init__(self, path: Path) -> None:
        """Read the names; raises UserError for a file that is missing, damaged, or holds more than tensors."""
        self.path = path
        if path.name.endswith(INDEX):
            self.files = {name: path.parent / file for name, file in _weight_map(path).items()}
        else:
            self.files = dict.fromkeys(_names(path), path)

    def get(self, name: str) -> Tensor:
        """A tensor of a file that has it, mapped from there; raises UserError for one that is not in its shard."""
        file = self.files[name]
        if file.suffix in PICKLES:
            found = self._old[file] if file in self._old else _unpickle(file)
            if not is_mappable(file):
                self._old[file] = found
            if name not in found:
                raise UserError(
                    f"cannot read {file}: the tensor {name} that {self.path.name} places there is missing"
                )
            tensor = found[name]
        else:
            try:
                with safe_open(file, "pt") as opened:
                    tensor = opened.get_tensor(name)
            except (OSError, SafetensorError, ValueError) as error:
                raise _unreadable(file, error) from None
        return tensor

    @cached_property
    def _old(self) -> dict[Path, dict[str, Tensor]]:
        """Pickles in the format of before torch 1.6, which cannot be mapped."""
        return {}


def _names(path: Path) -> list[str]:
    if path.suffix in PICKLES:
        return list(_unpickle(path))
    try:
        with safe_open(path, "pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(path, error) from None


def _weight_map(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from None
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"cannot read {path}: it has no weight_map of names to files")
    if strange := next((file for file in files.values() if Path(file).name != file), None):
        raise UserError(f"cannot read {path}: {strange!r} is no file of its folder")
    return files


def is_mappable(path: Path) -> bool:
    """Whether a pickle is in the format that torch has written since 1.6."""
    return zipfile.is_zipfile(path)


def _unpickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, mapped where the format allows; nothing else in it is ever run or built."""
    mapped = path.is_file() and is_mappable(path)
    try:
        if mapped:
            with zipfile.ZipFile(path) as archive:
                # torch stores records as they are; compressed ones could grow without bounds.
                if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                    raise UserError(
                        f"cannot read {path}: its records are compressed, which torch never does"
                    )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        called = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it calls {called[1]}" if called else "it is damaged, or not what torch writes"
        raise UserError(
            f"cannot read {path}: {what}; only pickles of tensors alone are opened"
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
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"cannot read {path}: {name!r} is a {type(value).__name__}, not a tensor"
            )
        if value.layout is not torch.strided or value.device.type != "cpu":
            raise UserError(
                f"cannot read {path}: {name!r} is a {value.layout} tensor on {value.device}: no plain one"
            )
    return found


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, OSError) and error.strerror:
        return UserError(f"cannot read {path}: {error.strerror}")
    reason = next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
    return UserError(f"cannot read {path}: {reason}; the file is damaged or not what its name says")
