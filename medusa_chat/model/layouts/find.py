"""Which file of a folder holds heads."""

from __future__ import annotations

from pathlib import Path

from medusa_chat.config import UserError
from medusa_chat.model.layouts.names import is_heads_tensor, naming_of
from medusa_chat.model.layouts.said import read_config
from medusa_chat.model.layouts.tensors import TensorFiles
from medusa_chat.model.layouts.write import HEADS_FILE

PICKLE_FILE = "medusa_lm_head.pt"
# Weights of a model as transformers looks for them, an index after the whole file.
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
# Where heads may lie, the likeliest first: in a file of their own, among a model's weights, in an adapter's, in an
# engine's of TensorRT-LLM.
HEAD_FILES = (
    HEADS_FILE, PICKLE_FILE, *WEIGHTS, "adapter_model.safetensors", "adapter_model.bin", "rank0.safetensors",
)  # fmt: skip


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
        raise UserError(f"the heads in {folder} are split over several GPUs (rank1.safetensors); convert them for one")
    heads_alone = read_config(folder / "config.json").get("model_type") == "medusa"
    for name in HEAD_FILES[2:]:
        file = folder / name
        if file.is_file() and (
            heads_alone or any(is_heads_tensor(tensor) or naming_of(tensor) for tensor in TensorFiles(file).files)
        ):
            return file
    return None
