"""Names of the files that hold weights, for search and download. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

HEADS_FILE = "medusa_lm_head.safetensors"
# Heads that medusa-chat writes have a folder of their own: transformers, vLLM and the converter of
# llama.cpp take any safetensors file next to a model's weights for a part of them.
HEADS_FOLDER = "medusa_heads"
OWN_HEADS = f"{HEADS_FOLDER}/{HEADS_FILE}"
PICKLE_FILE = "medusa_lm_head.pt"
# A model's weights in the order in which transformers looks for them.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Places of heads, the likeliest first: a file of their own, a model's weights, an adapter, and an
# engine of TensorRT-LLM.
HEAD_FILES = (
    OWN_HEADS,
    HEADS_FILE,
    PICKLE_FILE,
    *WEIGHTS,
    "adapter_model.safetensors",
    "adapter_model.bin",
    "rank0.safetensors",
)


def model_folder(file: Path, name: str = OWN_HEADS) -> Path:
    """Return the folder of the model that a file of weights belongs to.

    Args:
        file: its path.
        name: its name in that folder, which may have a folder in it.
    """
    folder, _, _ = name.rpartition("/")
    return file.parent.parent if folder and file.parent.name == folder else file.parent
