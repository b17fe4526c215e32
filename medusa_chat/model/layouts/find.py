"""Which file of a folder holds heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medusa_chat.config import UserError
from medusa_chat.hub.file_names import HEAD_FILES
from medusa_chat.model.layouts.names import is_heads_tensor, naming_of
from medusa_chat.model.layouts.said import read_config
from medusa_chat.model.layouts.tensors import TensorFiles, is_mappable

if TYPE_CHECKING:
    from pathlib import Path


def find_heads(folder: Path) -> Path | None:
    """The file, or the index of shards, that holds the heads in a folder of any layout; None if there are none.

    Heads in a file of their own come before those among a whole model's weights.

    Raises:
        UserError: the one file that would hold them is damaged, or they are split over several GPUs.
    """
    for name in HEAD_FILES[:2]:
        if (folder / name).is_file():
            return folder / name
    if (folder / "rank1.safetensors").is_file():
        raise UserError(
            f"the heads in {folder} are split over several GPUs (rank1.safetensors); convert them for one"
        )
    heads_alone = read_config(folder / "config.json").get("model_type") == "medusa"
    for name in HEAD_FILES[2:]:
        file = folder / name
        if file.is_file() and (heads_alone or _has_heads(file)):
            return file
    return None


def _has_heads(file: Path) -> bool:
    if file.suffix == ".bin" and not is_mappable(file):
        return False  # from before torch 1.6, and so before Medusa: a whole model would be read into memory
    return any(is_heads_tensor(tensor) or naming_of(tensor) for tensor in TensorFiles(file).files)
