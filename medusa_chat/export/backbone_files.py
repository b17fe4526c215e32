"""The files of a backbone, read and copied without loading it."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from medusa_chat.config import UserError
from medusa_chat.files import replacing, write_json
from medusa_chat.hub.file_names import WEIGHTS
from medusa_chat.model.layouts import is_heads_tensor
from medusa_chat.model.layouts.said import read_config
from medusa_chat.model.layouts.tensors import TensorFiles
from medusa_chat.model.loading import one_line
from medusa_chat.text import first_line

if TYPE_CHECKING:
    from pathlib import Path

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
# Beside the weights and config.json: all that transformers needs of a language model and its tokenizer. No code.
_WITH_THE_WEIGHTS = (
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


@dataclass(frozen=True)
class BackboneFiles:
    """A local folder that holds a backbone.

    Attributes:
        config: of config.json; weights: the file, or index, that transformers would load.
        lm_head_names: what the LM head's weight may be called: by the embeddings' name too where they are tied.
    """

    folder: Path
    config: dict[str, Any]
    weights: Path
    hidden: int
    vocabulary: int
    lm_head_names: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path) -> BackboneFiles:
        """Raises UserError for a folder that holds no model, or none of transformers' causal LMs."""
        with one_line(str(folder)):
            config = AutoConfig.from_pretrained(folder)
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        weight = model.get_output_embeddings().weight
        names = [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]
        files = (folder / name for name in WEIGHTS)
        weights = next((file for file in files if file.is_file()), None)
        if weights is None:
            raise UserError(f"there are no weights in {folder}: none of {', '.join(WEIGHTS)}")
        rows, hidden = weight.shape
        return cls(folder, read_config(folder / "config.json"), weights, hidden, rows, tuple(names))

    def lm_head(self) -> Tensor:
        """The LM head's weight alone, [V, hidden]; raises UserError if the files hold it quantized."""
        tensors = TensorFiles(self.weights)
        name = next((name for name in self.lm_head_names if name in tensors.files), None)
        if name is None:
            raise UserError(
                f"{self.weights} holds no LM head: none of {', '.join(self.lm_head_names)}"
            )
        weight = tensors.get(name)
        if not weight.is_floating_point() or tuple(weight.shape) != (self.vocabulary, self.hidden):
            raise UserError(
                f"{self.weights}: the LM head {name} is quantized; only one of 16 or 32 bits can be copied"
            )
        return weight

    def copy_with(self, heads: dict[str, Tensor], out: Path, config: dict[str, Any]) -> None:
        """Copy the backbone as it is, with heads as its last shard in place of any that it has.

        Args:
            heads: by their names in the weights; config: what config.json gets besides.

        Raises:
            OSError, UserError: the files cannot be read or written.
        """
        for file in sorted(self.folder.iterdir()):
            if file.is_file() and any(fnmatch(file.name, pattern) for pattern in _WITH_THE_WEIGHTS):
                shutil.copyfile(file, out / file.name)
        old = {
            "medusa",
            "medusa_num_heads",
            "medusa_num_layers",
            "num_medusa_heads",
            "num_medusa_layers",
        }
        kept = {key: value for key, value in self.config.items() if key not in old}
        write_json(out / "config.json", kept | config, indent=2)
        self._copy_weights(heads, out)

    def _copy_weights(self, heads: dict[str, Tensor], out: Path) -> None:
        tensors = TensorFiles(self.weights)
        shards: dict[Path, list[str]] = {}
        for name, file in tensors.files.items():
            shards.setdefault(file, [])
            if not is_heads_tensor(name):
                shards[file].append(name)
        used = [file for file in sorted(shards) if shards[file]]
        if not used:
            raise UserError(f"{self.weights} holds no backbone")
        suffix = used[0].suffix
        stem = "model" if suffix == ".safetensors" else "pytorch_model"
        names = [f"{stem}-{i:05}-of-{len(used) + 1:05}{suffix}" for i in range(1, len(used) + 2)]
        placed = dict.fromkeys(heads, names[-1])
        for file, name in zip(used, names, strict=False):
            if len(shards[file]) == sum(file == other for other in tensors.files.values()):
                shutil.copyfile(file, out / name)
            else:
                write_tensors({kept: tensors.get(kept) for kept in shards[file]}, out / name)
            placed |= dict.fromkeys(shards[file], name)
        write_tensors(heads, out / names[-1])
        size = sum(t.nbytes for t in heads.values()) + sum(
            tensors.get(n).nbytes for f in used for n in shards[f]
        )
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
        write_json(out / f"{stem}{suffix}.index.json", index, indent=2)


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write safetensors, or a pickle of tensors for any other ending, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    plain = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    try:
        with replacing(file) as temporary:
            if file.suffix == ".safetensors":
                save_file(plain, temporary, {"format": "pt"})
                temporary.chmod(0o666 & ~_umask())  # safetensors ignores the umask
            else:
                torch.save(plain, temporary)
    except (SafetensorError, RuntimeError) as error:  # both raise these for a full disk
        raise UserError(f"cannot write {file}: {first_line(error)}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
