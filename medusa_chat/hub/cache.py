"""What huggingface_hub's cache holds of a repository, and which of its files are weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name

from medusa_chat.config import UserError
from medusa_chat.files import read_json
from medusa_chat.hub.file_names import HEAD_FILES, OWN_HEADS, WEIGHTS, model_folder
from medusa_chat.hub.gguf.choice import chosen_files
from medusa_chat.hub.gguf.header import shards_of

if TYPE_CHECKING:
    from collections.abc import Collection

Kind = Literal["backbone", "heads"]


def weight_files(names: Collection[str], kind: Kind) -> list[str]:
    """Return the files among `names` that hold a backbone's or heads' tensors, in one form only.

    An index represents its shards. Files of a backbone include the heads in the same folder.
    """
    heads = [name for name in HEAD_FILES if name in names][:1]
    if kind == "heads":
        if heads == ["rank0.safetensors"]:  # all ranks: the reader then sees that there are several
            return sorted(name for name in names if name.startswith("rank"))
        return heads
    model = [name for name in WEIGHTS if name in names][:1]
    return [*model, *(name for name in heads if name not in WEIGHTS)] if model else []


def shards_in(index: Path) -> list[str]:
    """Return the shards that an index names."""
    try:
        return sorted(set(read_json(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is damaged: it names no shards") from None


def cached(name: str, revision: str | None, kind: Kind, file: str) -> Path | None:
    """Return the snapshot in the cache, or its GGUF file, if everything that is needed is there."""
    if file:
        return _cached_gguf(name, revision, file)
    folder = _snapshot(name, revision)
    if folder is None or not folder.is_dir():
        return None
    names = {file.name for file in folder.iterdir() if file.exists()}
    if (folder / OWN_HEADS).exists():
        names.add(OWN_HEADS)
    weights = weight_files(names, kind)
    for file in weights:
        if file.endswith(".index.json"):
            shards = shards_in(folder / file)
            if not all((folder / shard).exists() for shard in shards):
                return None
    return folder if weights else None


def _snapshot(name: str, revision: str | None) -> Path | None:
    """Return the folder of a repository in the cache; heads may have no config.json."""
    for file in ("config.json", *HEAD_FILES):
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return model_folder(Path(found), file)
    return None


def _cached_gguf(name: str, revision: str | None, file: str) -> Path | None:
    """Return a GGUF file, or the first of its shards, if the cache holds all of it."""
    repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    reference = repository / "refs" / (revision or constants.DEFAULT_REVISION)
    commit = reference.read_text().strip() if reference.is_file() else revision
    if commit is None:
        return None
    folder = repository / "snapshots" / commit
    present = [path for path in folder.rglob("*") if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in present]
    try:
        chosen = folder / chosen_files(name, file, names)[0]
    except UserError:
        return None
    return chosen if all(part.is_file() for part in shards_of(chosen)) else None
