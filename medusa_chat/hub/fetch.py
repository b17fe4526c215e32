"""Local paths of folders, files and hub ids (with a revision), downloaded if necessary."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import logging as hub_logging
from platformdirs import user_data_path

from medusa_chat.config import ACCURACY_FILE, ModelSpec, UserError
from medusa_chat.files import expanded
from medusa_chat.hub.cache import Kind as Kind
from medusa_chat.hub.cache import cached, shards_in
from medusa_chat.hub.cache import weight_files as weight_files
from medusa_chat.hub.download import RETRIES, RETRY_WAIT, TIMEOUT, RemoteFile, download
from medusa_chat.hub.errors import SettingsError, UnavailableError, disk_errors, explain
from medusa_chat.hub.file_names import HEADS_FILE, model_folder
from medusa_chat.hub.gguf.choice import chosen_files
from medusa_chat.hub.gguf.folder import folder_of, is_gguf
from medusa_chat.hub.model_list import check_hub_id, is_hub_id, split_file, split_revision
from medusa_chat.hub.wheels import fetch_file, parse_source
from medusa_chat.text import reason_of, size_text

Progress = Callable[[str, int, int], None]  # repository, bytes present, bytes in all

_TEXT = re.compile(
    r"[^/]+\.(json|txt|model|jinja|tiktoken)|additional_chat_templates/[^/]+\.jinja"
    r"|(readme|licen[cs]e|notice|use_policy|copying)[^/]*",
    re.IGNORECASE,
)
_UNREACHABLE = (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError)
_BUSY = (429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Files:
    """Local paths of a model's files.

    Attributes:
        backbone: a folder that transformers can read.
        heads: a file or folder; None takes the heads in the backbone's folder, if there are any.
        notices: lines for the user.
    """

    backbone: Path
    heads: Path | None
    notices: tuple[str, ...] = ()


def fetch(spec: ModelSpec, progress: Progress | None = None) -> Files:
    """Find a spec's backbone and heads on this machine, or download them.

    Args:
        spec: names the backbone and the heads.
        progress: called while something is downloaded.

    Raises:
        UserError: they do not exist, access is refused, or the network or the disk fails.
    """
    notices: list[str] = []
    backbone = backbone_of(spec, progress, notices)
    heads = local(spec.heads, "heads", progress, notices) if spec.heads else None
    return Files(backbone, heads, tuple(notices))


def backbone_of(
    spec: ModelSpec, progress: Progress | None = None, notices: list[str] | None = None
) -> Path:
    """Return the local folder of a backbone: the hub's, or its mirror's if the hub fails.

    A mirror that is here already serves until the hub's own files are.
    """
    if not spec.mirror or expanded(spec.backbone).exists():
        return local(spec.backbone, "backbone", progress, notices)
    mirror = parse_source(spec.mirror)
    if mirror.place.is_file() and not is_cached(spec.backbone):
        return folder_of(mirror.place)
    try:
        return local(spec.backbone, "backbone", progress, notices)
    except UnavailableError as error:
        if constants.HF_HUB_OFFLINE:
            raise
        reason = str(error)
    try:
        file = fetch_file(mirror, progress)
    except UserError as error:
        raise UserError(f"{reason}; and {error}") from None
    if notices is not None:
        notices.append(f"{spec.name} is {file.name} of {mirror.package}, as the hub failed")
    return folder_of(file)


def source_of(spec: ModelSpec) -> str:
    """Say which source of a spec with a mirror serves now."""
    mirror = parse_source(spec.mirror)
    if is_cached(spec.backbone):
        return f"{spec.backbone} of the hub, in its cache"
    if mirror.place.is_file():
        return f"{mirror.package} of the package index, in {mirror.place}"
    return f"not here yet: {spec.backbone} of the hub, else {mirror.package} of the package index"


def is_here(spec: ModelSpec) -> bool:
    """Tell if the backbone of a spec with a mirror needs no download."""
    return is_cached(spec.backbone) or parse_source(spec.mirror).place.is_file()


def is_cached(source: str) -> bool:
    """Tell if the hub's cache holds all of a backbone."""
    identity, revision = split_revision(source)
    repository, file = split_file(identity)
    return cached(repository, revision, "backbone", file) is not None


def local(
    source: str,
    kind: Kind = "backbone",
    progress: Progress | None = None,
    notices: list[str] | None = None,
) -> Path:
    """Return the local path of a folder, file or hub id; see `fetch`. Adds to `notices`."""
    path = expanded(source)
    if path.exists():
        return _usable(path)
    if not is_hub_id(source):
        missing = "are no Medusa heads" if kind == "heads" else "is no model"
        raise UserError(
            f"there {missing} at {source}: no such file or folder, and no hub id (owner/name)"
        )
    check_hub_id(source)
    # Warnings about retries would break the progress line.
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    identity, revision = split_revision(source)
    repository, file = split_file(identity)
    with disk_errors(repository):
        try:
            return _usable(_Repository(repository, revision, kind, file).download(progress))
        except (*_UNREACHABLE, SettingsError) as error:
            found = cached(repository, revision, kind, file)
            if found is None:
                raise UnavailableError(explain(error, repository, revision)) from None
            if notices is not None and not isinstance(error, OfflineModeIsEnabled):
                reason = explain(error, repository, revision)
                notices.append(f"started from the cache: {reason}")
            return _usable(found)


def _usable(place: Path) -> Path:
    """Return the folder that stands for a GGUF file; any other place as it is."""
    return folder_of(place) if is_gguf(place) else place


def accuracy_file(spec: ModelSpec) -> Path:
    """Return the file of the measured accuracies of a spec's heads, which may not exist yet.

    It is next to local heads. For heads of the hub it is in the user's data folder, because the
    hub's cache holds nothing but the hub's own files.
    """
    source = spec.heads or spec.backbone
    place = expanded(source)
    if place.exists() or not is_hub_id(source):
        folder = model_folder(place) if place.is_file() else place
        return folder / ACCURACY_FILE
    return user_data_path("medusa-chat") / "accuracy" / source.replace("/", "--") / ACCURACY_FILE


class _Repository:
    """The files of a repository that are needed, with what the hub states about them."""

    def __init__(self, name: str, revision: str | None, kind: Kind, file: str) -> None:
        self._name = name
        self._revision = revision
        self._kind = kind
        self._file = file
        info = _listing(name, revision)
        assert info.sha is not None
        self._commit = info.sha
        self._files: dict[str, RemoteFile] = {}
        for found in info.siblings or ():
            content_hash = found.lfs.sha256 if found.lfs else str(found.blob_id)
            self._files[found.rfilename] = RemoteFile(
                name, info.sha, found.rfilename, found.size or 0, content_hash
            )

    def download(self, progress: Progress | None) -> Path:
        """Download the missing files; returns the folder, or the first of GGUF files."""
        if self._file:
            chosen = chosen_files(self._name, self._file, self._files)
            self._download(chosen, progress)
            return self._path(chosen[0])
        weights = weight_files(self._files, self._kind)
        if not weights:
            raise UserError(
                f"{self._name} has no {_needed(self._kind)}; it has {_some_names(self._files)}"
            )
        indexes = [name for name in weights if name.endswith(".index.json")]
        self._download(indexes, None)
        shards = [name for name in weights if name not in indexes]
        for index in indexes:
            shards += shards_in(self._path(index))
        absent = next((name for name in shards if name not in self._files), None)
        if absent:
            raise UserError(f"{self._name} lacks {absent}, which its index names")
        texts = [name for name in self._files if _TEXT.fullmatch(name)]
        self._download([*texts, *(name for name in shards if name not in texts)], progress)
        return model_folder(self._path(weights[0]), weights[0])

    def _download(self, names: Sequence[str], progress: Progress | None) -> None:
        files = [self._files[name] for name in names if not self._is_cached(name)]
        _check_disk(self._name, files)
        total = sum(file.size for file in files)
        present = 0

        def report(more: int) -> None:
            nonlocal present
            present += more
            if progress:
                progress(self._name, present, total)

        for file in files:
            download(file, self._revision, report)

    def _is_cached(self, name: str) -> bool:
        found = try_to_load_from_cache(self._name, name, revision=self._commit)
        # Also under the revision's name, by which it is found without a network.
        named = try_to_load_from_cache(self._name, name, revision=self._revision)
        return isinstance(found, str) and found == named

    def _path(self, name: str) -> Path:
        """Return the path of a file that is in the cache."""
        return Path(hf_hub_download(self._name, name, revision=self._commit))


def _listing(name: str, revision: str | None) -> ModelInfo:
    """Ask the hub for its files at a revision, again if it is busy."""
    attempt = 0
    while True:
        try:
            return HfApi().model_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT)
        except HfHubHTTPError as error:
            if attempt == RETRIES or error.response.status_code not in _BUSY:
                raise
            time.sleep(RETRY_WAIT * 2**attempt)
            attempt += 1
        except _UNREACHABLE:
            raise
        except Exception as error:  # proxies, tokens, certificates and answers of other programs
            if isinstance(error, OSError) and error.filename:  # the disk refuses a file
                raise
            raise SettingsError(reason_of(error)) from error


def _check_disk(name: str, files: Sequence[RemoteFile]) -> None:
    """Raise UserError if the disk is too small, before the download rather than at its end."""
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    needed = sum(file.missing for file in files)
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{name} needs {size_text(needed)} more, but {cache} has {size_text(free)} free;"
            " make room, or set HF_HOME to a folder on a larger disk"
        )


def _needed(kind: Kind) -> str:
    if kind == "heads":
        return f"{HEADS_FILE} or other Medusa heads"
    forms = "model.safetensors or pytorch_model.bin, whole or in shards"
    return f"weights that can be read ({forms})"


def _some_names(names: Collection[str]) -> str:
    first = sorted(name for name in names if not name.startswith("."))[:5]
    if not first:
        return "no files"
    return ", ".join(first) + (", ..." if len(names) > len(first) else "")
