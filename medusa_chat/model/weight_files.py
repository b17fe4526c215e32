"""The files of a backbone's weights, checked before transformers reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medusa_chat.config import UserError
from medusa_chat.hub.file_names import WEIGHTS
from medusa_chat.model.layouts.tensors import TensorFiles, formats

if TYPE_CHECKING:
    from pathlib import Path

FLOATS = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")


def check_weight_files(model: str, folder: Path, quantized: bool) -> None:
    """Check the names in an index, the headers of all files, and the number formats.

    Without a quantization that the config names, transformers would cast any numbers to floats.

    Raises:
        UserError: names the model, the file and the fault.
    """
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
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
