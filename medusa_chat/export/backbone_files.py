"""The files of a backbone, read and copied without loading it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from medusa_chat.config import UserError
from medusa_chat.files import write_json
from medusa_chat.hub.file_names import WEIGHTS
from medusa_chat.hub.gguf.folder import weights_of
from medusa_chat.model.layouts import is_heads_tensor
from medusa_chat.model.layouts.config import read_config
from medusa_chat.model.layouts.tensors import TensorFiles
from medusa_chat.model.layouts.write import write_tensors
from medusa_chat.model.pretrained import empty_model, load_config, loading_errors

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

# All that transformers needs of a language model and its tokenizer, besides weights and
# config.json. No code.
COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
)
# Keys of config.json that describe heads, in any layout of whole models.
HEADS_KEYS = {
    "medusa",
    "medusa_num_heads",
    "medusa_num_layers",
    "num_medusa_heads",
    "num_medusa_layers",
}


@dataclass(frozen=True)
class BackboneFiles:
    """A local folder that holds a backbone.

    Attributes:
        weights: the file, or index, that transformers would load.
        vocabulary: rows of the LM head.
        lm_head_names: names that the LM head's weight may have; tied ones also have that of the
            embeddings.
    """

    folder: Path
    config: dict[str, Any]
    weights: Path
    hidden: int
    vocabulary: int
    lm_head_names: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path) -> BackboneFiles:
        """Read a folder; raises UserError if it holds no causal LM of transformers."""
        if weights_of(folder) is not None:
            raise UserError("heads for a GGUF file cannot be exported: name its original model")
        with loading_errors(str(folder)):
            model = empty_model(load_config(folder))
        weight = model.get_output_embeddings().weight
        named = model.named_parameters(remove_duplicate=False)
        names = tuple(name for name, parameter in named if parameter is weight)
        files = (folder / name for name in WEIGHTS)
        weights = next((file for file in files if file.is_file()), None)
        if weights is None:
            raise UserError(f"there are no weights in {folder}: none of {', '.join(WEIGHTS)}")
        rows, hidden = weight.shape
        return cls(folder, read_config(folder / "config.json"), weights, hidden, rows, names)

    def lm_head(self) -> Tensor:
        """Read the LM head's weight only, [V, hidden].

        Raises:
            UserError: the files hold no LM head, or a quantized one.
        """
        tensors = TensorFiles(self.weights)
        name = next((name for name in self.lm_head_names if name in tensors.files), None)
        if name is None:
            names = ", ".join(self.lm_head_names)
            raise UserError(f"{self.weights} holds no LM head: none of {names}")
        weight = tensors.get(name)
        if not weight.is_floating_point() or tuple(weight.shape) != (self.vocabulary, self.hidden):
            raise UserError(
                f"{self.weights}: the LM head {name} is quantized; only one of 16 or 32 bits can be"
                " copied"
            )
        return weight

    def copy_with(self, heads: dict[str, Tensor], out: Path, config: dict[str, Any]) -> None:
        """Copy the backbone, with heads as its last shard in place of any that it has.

        Args:
            heads: by their names in the weights.
            out: the folder to write.
            config: further keys for config.json.

        Raises:
            OSError: a file cannot be copied.
            UserError: a file cannot be read or written.
        """
        for file in sorted(self.folder.iterdir()):
            if file.is_file() and any(fnmatch(file.name, pattern) for pattern in COPIED):
                shutil.copyfile(file, out / file.name)
        kept = {key: value for key, value in self.config.items() if key not in HEADS_KEYS}
        write_json(out / "config.json", kept | config, indent=2)
        self._copy_weights(heads, out)

    def _copy_weights(self, heads: dict[str, Tensor], out: Path) -> None:
        tensors = TensorFiles(self.weights)
        shards = self._shards(tensors)
        suffix = next(iter(shards)).suffix
        stem = "model" if suffix == ".safetensors" else "pytorch_model"
        count = len(shards) + 1
        weight_map: dict[str, str] = {}
        for number, (file, kept) in enumerate(shards.items(), 1):
            name = f"{stem}-{number:05}-of-{count:05}{suffix}"
            _copy_shard(tensors, file, kept, out / name)
            weight_map |= dict.fromkeys(kept, name)
        last = f"{stem}-{count:05}-of-{count:05}{suffix}"
        write_tensors(heads, out / last)
        size = sum(tensor.nbytes for tensor in heads.values())
        size += sum(tensors.get(name).nbytes for name in weight_map)
        weight_map |= dict.fromkeys(heads, last)
        placed = dict(sorted(weight_map.items()))
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        write_json(out / f"{stem}{suffix}.index.json", index, indent=2)

    def _shards(self, tensors: TensorFiles) -> dict[Path, list[str]]:
        """Names of the backbone's own tensors, by file."""
        shards: dict[Path, list[str]] = {}
        for name, file in sorted(tensors.files.items(), key=lambda item: item[1]):
            if not is_heads_tensor(name):
                shards.setdefault(file, []).append(name)
        if not shards:
            raise UserError(f"{self.weights} holds no backbone")
        return shards


def _copy_shard(tensors: TensorFiles, file: Path, kept: list[str], copy: Path) -> None:
    """Copy a file if all its tensors are kept, else write those that are."""
    if len(kept) == list(tensors.files.values()).count(file):
        shutil.copyfile(file, copy)
    else:
        write_tensors({name: tensors.get(name) for name in kept}, copy)
