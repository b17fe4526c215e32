"""A model folder made from a GGUF file: config, tokenizer, and a pointer to the weights."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from platformdirs import user_cache_path

from medusa_chat.config import UserError
from medusa_chat.files import read_json, temporary_folder, write_json
from medusa_chat.hub.gguf.config import config_of
from medusa_chat.hub.gguf.header import Header, read_header, shards_of
from medusa_chat.hub.gguf.tokenizer import settings_of, tokenizer_of
from medusa_chat.text import is_panic, reason_of

if TYPE_CHECKING:
    from collections.abc import Iterator

WEIGHTS_FILE = "gguf.json"  # names the GGUF file; a folder that has it holds no weights itself
FORM = 1  # of the folders: older ones are not read


def is_gguf(file: Path) -> bool:
    """Recognize a GGUF file by its name."""
    return file.suffix.lower() == ".gguf" and file.is_file()


def folder_of(file: Path) -> Path:
    """Return the folder of a GGUF file in our cache, made if it is not there yet.

    Raises:
        UserError: the file cannot be read, or the cache cannot be written.
    """
    first = shards_of(file.absolute())[0]
    try:
        state = first.stat()
    except OSError as error:
        raise UserError(f"cannot load the model {first}: {error.strerror or error}") from None
    identity = f"{FORM} {first} {state.st_size} {state.st_mtime_ns}"
    name = f"{first.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    folder = user_cache_path("medusa-chat") / "gguf" / name
    if not (folder / WEIGHTS_FILE).is_file():
        _make(folder, read_header(first))
    return folder


def weights_of(folder: Path) -> Header | None:
    """Return the header of the GGUF file that a folder points to; None for any other folder."""
    pointer = _pointer(folder)
    return read_header(Path(pointer["file"])) if pointer else None


def is_quantized(folder: Path) -> bool:
    """Tell if a folder points to a GGUF file with quantized weights."""
    pointer = _pointer(folder)
    return bool(pointer and pointer["quantized"])


def _pointer(folder: Path) -> dict[str, Any] | None:
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        return None
    try:
        found: dict[str, Any] = read_json(file)
        return {"file": found["file"], "quantized": found["quantized"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged: delete the folder {folder}") from None


def _make(folder: Path, header: Header) -> None:
    """Write a folder in one move, so that none is ever half there."""
    with _metadata_errors(header.file):
        config = config_of(header)
        tokenizer = tokenizer_of(header)
        settings = settings_of(header)
    documents: dict[str, Any] = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": config["eos_token_id"]},
        "tokenizer_config.json": settings,
        WEIGHTS_FILE: {"file": str(header.file), "quantized": header.quantized},
    }
    try:
        with temporary_folder(folder.parent) as made:
            for name, document in documents.items():
                write_json(made / name, document)
            tokenizer.save(str(made / "tokenizer.json"))
            shutil.rmtree(folder, ignore_errors=True)
            made.replace(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}, which a GGUF file needs: {error.strerror or error}"
        ) from None


@contextmanager
def _metadata_errors(file: Path) -> Iterator[None]:
    """Turn what values of a wrong type or size raise into a UserError."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:  # tokenizers raises bare Exceptions, and panics
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise UserError(
            f"cannot load the model {file}: its metadata is damaged ({reason_of(error)});"
            " download it again"
        ) from None
