"""From what a spec names (folders, files, hub ids with a revision) to local paths, downloaded where need be."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, ModelInfo, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import logging as hub_logging
from platformdirs import user_data_path

from medusa_chat.config import ACCURACY_FILE, ModelSpec, UserError
from medusa_chat.hub.download import PATIENCE, PAUSE, RETRIES, RemoteFile, bring
from medusa_chat.hub.errors import disk_errors, reason
from medusa_chat.hub.file_names import HEAD_FILES, WEIGHTS
from medusa_chat.hub.model_list import check_hub_id, is_hub_id, split_revision
from medusa_chat.text import size_text

Kind = Literal["backbone", "heads"]
Progress = Callable[[str, int, int], None]  # name of the repository, bytes there, bytes in all

_TEXT = re.compile(
    r"[^/]+\.(json|txt|model|jinja|tiktoken)|additional_chat_templates/[^/]+\.jinja"
    r"|(readme|licen[cs]e|notice|use_policy|copying)[^/]*",
    re.IGNORECASE,
)
_BUSY = (429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Files:
    """Where a spec's files lie.

    Attributes:
        backbone: a folder as transformers reads it.
        heads: a file or folder; None: what lies in the backbone's folder, if anything.
        notices: what the user should know, a line each.
    """

    backbone: Path
    heads: Path | None
    notices: tuple[str, ...] = ()


def fetch(spec: ModelSpec, progress: Progress | None = None) -> Files:
    """Have a spec's backbone and heads on this machine.

    Args:
        progress: is called while something is downloaded.

    Raises:
        UserError: there is no such thing, it may not be had, or network or disk fail; one line.
    """
    notices: list[str] = []
    backbone = local(spec.backbone, "backbone", progress, notices)
    heads = local(spec.heads, "heads", progress, notices) if spec.heads else None
    return Files(backbone, heads, tuple(notices))


def local(
    source: str,
    kind: Kind = "backbone",
    progress: Progress | None = None,
    notices: list[str] | None = None,
) -> Path:
    """The local path of a folder, file or hub id; see `fetch`. Adds to `notices`."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not is_hub_id(source):
        what = "are no Medusa heads" if kind == "heads" else "is no model"
        raise UserError(
            f"there {what} at {source}: no such file or folder, and no hub id (owner/name)"
        )
    check_hub_id(source)
    hub_logging.set_verbosity_error()  # its warnings of what it tries again would break the line that tells progress
    repository, revision = split_revision(source)
    with disk_errors(repository):
        try:
            return _Repository(repository, revision, kind).bring(progress)
        except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
            cached = _cached(repository, revision, kind)
            if cached is None:
                raise UserError(reason(error, repository, revision)) from None
            if notices is not None and not isinstance(error, OfflineModeIsEnabled):
                notices.append(f"started from the cache: {reason(error, repository, revision)}")
            return cached


def accuracy_file(spec: ModelSpec) -> Path:
    """Where the measured accuracies of a spec's heads are kept: beside local heads; for heads from the hub in the
    user's data folder, as the hub's cache holds what the hub says and nothing else.
    """
    source = spec.heads or spec.backbone
    place = Path(source).expanduser()
    if place.exists() or not is_hub_id(source):
        return (place.parent if place.is_file() else place) / ACCURACY_FILE
    return user_data_path("medusa-chat") / "accuracy" / source.replace("/", "--") / ACCURACY_FILE


class _Repository:
    """What the hub says of a repository, and the files of it that are needed."""

    def __init__(self, name: str, revision: str | None, kind: Kind) -> None:
        self._name, self._revision, self._kind = name, revision, kind
        info = _listing(name, revision)
        assert info.sha is not None
        self._commit = info.sha
        self._files = {
            file.rfilename: RemoteFile(
                name,
                info.sha,
                file.rfilename,
                file.size or 0,
                file.lfs.sha256 if file.lfs else str(file.blob_id),
            )
            for file in info.siblings or ()
        }

    def bring(self, progress: Progress | None) -> Path:
        """Download what is missing; returns the folder."""
        weights = weight_files(self._files, self._kind)
        if not weights:
            raise UserError(
                f"{self._name} has no {_needed(self._kind)}; it has {_shown(self._files)}"
            )
        for index in (name for name in weights if name.endswith(".index.json")):
            self._bring([index], None)
        shards = [name for name in weights for name in self._shards(name)]
        absent = next((name for name in shards if name not in self._files), None)
        if absent:
            raise UserError(f"{self._name} lacks {absent}, which its index names")
        texts = [name for name in self._files if _TEXT.fullmatch(name)]
        self._bring([*texts, *(name for name in shards if name not in texts)], progress)
        return self._path(weights[0]).parent

    def _shards(self, name: str) -> list[str]:
        return _indexed(self._path(name)) if name.endswith(".index.json") else [name]

    def _bring(self, names: Sequence[str], progress: Progress | None) -> None:
        files = [self._files[name] for name in names if self._cached(name) is None]
        _check_room(self._name, files)
        total, there = sum(file.size for file in files), 0

        def report(more: int) -> None:
            nonlocal there
            there += more
            if progress:
                progress(self._name, there, total)

        for file in files:
            bring(file, self._revision, report)

    def _cached(self, name: str) -> str | None:
        found = try_to_load_from_cache(self._name, name, revision=self._commit)
        # Also by the name of the revision, or it would not be found without a network.
        known = try_to_load_from_cache(self._name, name, revision=self._revision)
        return found if isinstance(found, str) and found == known else None

    def _path(self, name: str) -> Path:
        """Of a file that is there."""
        return Path(hf_hub_download(self._name, name, revision=self._commit))


def weight_files(names: Collection[str], kind: Kind) -> list[str]:
    """The files among `names` that hold a backbone's or heads' tensors, each in one form only; an index stands for
    its shards. Of a backbone, heads that lie beside it too.
    """
    heads = [name for name in HEAD_FILES if name in names][:1]
    if kind == "heads":
        # Of an engine for several GPUs every rank, so that it is refused for what it is.
        return (
            sorted(name for name in names if name.startswith("rank"))
            if heads == ["rank0.safetensors"]
            else heads
        )
    model = [name for name in WEIGHTS if name in names][:1]
    return [*model, *(name for name in heads if name not in WEIGHTS)] if model else []


def _indexed(index: Path) -> list[str]:
    """The shards that an index names."""
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is damaged: it names no shards") from None


def _listing(name: str, revision: str | None) -> ModelInfo:
    """What the hub has at a revision; a hub that is busy is asked again."""
    for attempt in range(RETRIES + 1):
        try:
            return HfApi().model_info(
                name, revision=revision, files_metadata=True, timeout=PATIENCE
            )
        except HfHubHTTPError as error:
            if attempt == RETRIES or error.response.status_code not in _BUSY:
                raise
            time.sleep(PAUSE * 2**attempt)
    raise AssertionError


def _cached(name: str, revision: str | None, kind: Kind) -> Path | None:
    """The snapshot in the cache, if it holds all that is needed."""
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    folder = Path(config).parent if isinstance(config, str) else _snapshot(name, revision)
    if folder is None or not folder.is_dir():
        return None
    weights = weight_files({file.name for file in folder.iterdir() if file.exists()}, kind)
    shards = [
        shard
        for file in weights
        if file.endswith(".index.json")
        for shard in _indexed(folder / file)
    ]
    return folder if weights and all((folder / shard).exists() for shard in shards) else None


def _snapshot(name: str, revision: str | None) -> Path | None:
    """The snapshot of a repository without a config.json."""
    for file in HEAD_FILES:
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _check_room(name: str, files: Sequence[RemoteFile]) -> None:
    """Better before the download than at its end."""
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    needed, free = sum(file.missing for file in files), shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{name} needs {size_text(needed)} more, but {cache} has {size_text(free)} free; make room, or set HF_HOME"
            " to a folder on a larger disk"
        )


def _needed(kind: Kind) -> str:
    forms = "model.safetensors or pytorch_model.bin, whole or in shards"
    return (
        f"{HEAD_FILES[0]} or other Medusa heads"
        if kind == "heads"
        else f"weights that can be read ({forms})"
    )


def _shown(names: Collection[str]) -> str:
    first = sorted(name for name in names if not name.startswith("."))[:5]
    return ", ".join(first) + (", ..." if len(names) > len(first) else "") if first else "no files"
