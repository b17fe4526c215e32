"""The file of a folder that holds heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medusa_chat.config import UserError
from medusa_chat.hub.file_names import HEAD_FILES, HEADS_FILE, OWN_HEADS, PICKLE_FILE
from medusa_chat.model.layouts.config import read_config
from medusa_chat.model.layouts.names import is_heads_tensor, naming_of
from medusa_chat.model.layouts.tensors import TensorFiles, is_mappable

if TYPE_CHECKING:
    from pathlib import Path

OWN_FILES = (OWN_HEADS, HEADS_FILE, PICKLE_FILE)  # they hold heads and nothing else
SECOND_RANK = "rank1.safetensors"


def find_heads(folder: Path) -> Path | None:
    """Find the file, or the index of shards, that holds the heads of a folder in any layout.

    Heads in a file of their own come before those among a whole model's weights.

    Returns:
        The path; None if there are no heads.

    Raises:
        UserError: the one file that could hold them is damaged, or they are split over several
            GPUs.
    """
    for name in OWN_FILES:
        if (folder / name).is_file():
            return folder / name
    if (folder / SECOND_RANK).is_file():
        raise UserError(
            f"the heads in {folder} are split over several GPUs ({SECOND_RANK}); convert them for"
            " one"
        )
    heads_alone = read_config(folder / "config.json").get("model_type") == "medusa"
    for name in HEAD_FILES:
        file = folder / name
        if file.is_file() and (heads_alone or _has_heads(file)):
            return file
    return None


def _has_heads(file: Path) -> bool:
    if file.suffix == ".bin" and not is_mappable(file):
        # The format is older than Medusa, and would be read into memory as a whole.
        return False
    return any(is_heads_tensor(name) or naming_of(name) for name in TensorFiles(file).files)
