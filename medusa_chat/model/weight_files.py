"""The files of a backbone's weights, checked before transformers reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medusa_chat.config import UserError
from medusa_chat.hub.file_names import WEIGHTS
from medusa_chat.model.finite import all_finite
from medusa_chat.model.layouts.tensors import TensorFiles, formats

if TYPE_CHECKING:
    from pathlib import Path

    import torch

FLOATS = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")


def check_weight_files(model: str, folder: Path, quantized: bool) -> None:
    """Check the names in an index, the headers of all files, and the number formats.

    Without a quantization that the config names, transformers would cast any numbers to floats.

    Raises:
        UserError: names the model, the file and the fault.
    """
    path = _weights(folder)
    if path is None:
        return  # transformers knows other forms, or says that there are none
    try:
        for file in sorted(set(TensorFiles(path).files.values())):
            _check_formats(file, quantized)
    except UserError as error:
        raise UserError(f"cannot load the model {model}: {error}") from None


def _check_formats(file: Path, quantized: bool) -> None:
    found = formats(file)
    odd = [name for name in found if name.endswith(".weight") and found[name] not in FLOATS]
    if odd and not quantized:
        name = min(odd)
        raise UserError(
            f"{file}: weight {name} holds {found[name]} numbers, and no quantization in config.json"
            " says what they mean"
        )


def weight_paths(folder: Path) -> list[Path]:
    """List a backbone's index, if it has one, and the files of its weights; none if unreadable."""
    path = _weights(folder)
    if path is None:
        return []
    try:
        return sorted({path, *TensorFiles(path).files.values()})
    except UserError:
        return []


def damage(folder: Path, dtype: torch.dtype) -> str:
    """Say why a model gives logits that are NaN or infinite: which weight of its files is."""
    path = _weights(folder)
    tensors = TensorFiles(path) if path else None
    if tensors:
        for name in sorted(tensors.files):
            weight = tensors.get(name)
            if weight.is_floating_point() and not all_finite(weight):
                return f"cannot load the model {folder}: weight {name} holds NaN or infinity"
    short = str(dtype).removeprefix("torch.")
    return f"the model in {folder} gives NaN or infinity in {short}: try another --dtype"


def _weights(folder: Path) -> Path | None:
    """Return the file, or the index, that transformers would load."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
