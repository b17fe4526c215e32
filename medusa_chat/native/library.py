"""The compiled library as ctypes sees it: its functions, or why it is not there."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_int, c_int32, c_size_t, c_void_p
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from medusa_chat.native.build import DIGEST_FILE, FAILURE_FILE, LIBRARY_FOLDER, library_name
from medusa_chat.native.structures import (
    STRUCTURES,
    CacheOf,
    Candidates,
    Choice,
    HeadsOf,
    Matrix,
    Model,
    Rule,
    Step,
)

if TYPE_CHECKING:
    from pathlib import Path

# Result and arguments of each function.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "mc_structure_sizes": (None, c_void_p),
    "mc_packed_bytes": (c_size_t, c_int, c_int, c_int),
    "mc_pack": (None, c_int, c_int, c_int, c_int, c_int, c_void_p, c_int, c_void_p),
    "mc_pack_int8": (None, c_int, c_int, c_int, c_int, c_void_p, c_void_p, c_void_p),
    "mc_pack_nf4": (None, c_int, c_int, c_int, c_int, c_void_p, c_void_p, c_void_p),
    "mc_pack_rows": (c_int, POINTER(Matrix), c_void_p, c_int, c_void_p),
    "mc_team_new": (c_void_p, c_int),
    "mc_team_free": (None, c_void_p),
    "mc_use": (c_int, ctypes.c_char_p),
    "mc_variant": (ctypes.c_char_p,),
    "mc_variants": (ctypes.c_char_p,),
    "mc_check": (c_int,),
    "mc_engine_new": (c_void_p, POINTER(Model), POINTER(HeadsOf), c_void_p, c_int),
    "mc_engine_free": (None, c_void_p),
    "mc_engine_step": (c_int, c_void_p, POINTER(CacheOf), POINTER(Step)),
    "mc_choose": (c_int, POINTER(Choice), POINTER(Candidates), c_int32),
    "mc_rule_size": (c_int32,),
    "mc_decide": (c_int, POINTER(Rule)),
    "mc_cache_keep": (None, POINTER(CacheOf), c_int, c_int, c_int, c_int, c_void_p, c_int),
}


def digest() -> str:
    """Return what identifies the library's sources, for files that depend on them."""
    file = LIBRARY_FOLDER / DIGEST_FILE
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""


class UnavailableError(Exception):
    """The native step cannot be used; the message is one line that says why."""


class NotFiniteError(Exception):
    """A weight to pack, or its scale, is NaN or infinite."""


@lru_cache(maxsize=1)
def load() -> Any:
    """Load the library once, and check that it computes right on this processor.

    Raises:
        UnavailableError: there is no library that works here.
    """
    if os.environ.get("MEDUSA_CHAT_NATIVE") == "off":
        raise UnavailableError("MEDUSA_CHAT_NATIVE is off")
    file = _file()
    try:
        library = ctypes.CDLL(str(file))
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise UnavailableError(f"the native library cannot be loaded: {error}") from None
    sizes = (c_int32 * len(STRUCTURES))()
    library.mc_structure_sizes(sizes)
    expected = [ctypes.sizeof(structure) for structure in STRUCTURES]
    if list(sizes) != expected or library.mc_rule_size() != ctypes.sizeof(Rule):
        raise UnavailableError(
            f"{file.name} was built from other sources: install medusa-chat again"
        )
    _check(library)
    return library


def _check(library: Any) -> None:
    """Use the best variant whose results agree with those of the portable one."""
    variants = library.mc_variants().decode().split()
    while not library.mc_check():
        variants.remove(library.mc_variant().decode())
        if not variants:
            raise UnavailableError("the native library computes wrong results on this processor")
        library.mc_use(variants[-1].encode())


def available() -> str | None:
    """Return why the library cannot be used, in one line; None if it can."""
    try:
        load()
    except UnavailableError as error:
        return str(error)
    return None


def likely(device: str, engine: str) -> bool:
    """Tell if the native step will probably run a model, before its config is there."""
    return device == "cpu" and engine != "torch" and available() is None


def _file() -> Path:
    file = LIBRARY_FOLDER / library_name()
    if file.exists():
        return file
    failure = LIBRARY_FOLDER / FAILURE_FILE
    if failure.exists():
        reason = failure.read_text(encoding="utf-8").strip()
        raise UnavailableError(f"the native library could not be built: {reason}")
    raise UnavailableError("the native library was not built when medusa-chat was installed")
