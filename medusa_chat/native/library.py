"""The compiled library as ctypes sees it: its structures, its functions, or why it is not there."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from medusa_chat.native.build import DIGEST_FILE, FAILURE_FILE, LIBRARY_FOLDER, library_name

if TYPE_CHECKING:
    from pathlib import Path

FLOAT32, BFLOAT16, INT8, NF4 = range(4)
FORMATS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "int8": INT8, "nf4": NF4}
MOST_ROWS = 256  # of a step
MOST_GUESSES = 64  # of a head


class Matrix(ctypes.Structure):
    """mc_matrix of matmul.h."""

    _fields_ = (
        ("format", c_int),
        ("outputs", c_int),
        ("inputs", c_int),
        ("packed", c_void_p),
        ("bias", c_void_p),
    )


class Layer(ctypes.Structure):
    """mc_layer of step.h."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("attention_post", c_void_p),
        ("mlp_norm", c_void_p),
        ("mlp_post", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("qkv", Matrix),
        ("output", Matrix),
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("window", c_int32),
        ("rope", c_int32),
    )


class Model(ctypes.Structure):
    """mc_model of step.h."""

    _fields_ = (
        ("hidden", c_int32),
        ("layers", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("rotary", c_int32),
        ("intermediate", c_int32),
        ("vocabulary", c_int32),
        ("positions", c_int32),
        ("activation", c_int32),
        ("epsilon", c_float),
        ("attention_scale", c_float),
        ("attention_cap", c_float),
        ("final_cap", c_float),
        ("embedding_scale", c_float),
        ("embedding_format", c_int32),
        ("embedding", c_void_p),
        ("final_norm", c_void_p),
        ("lm_head", Matrix),
        ("layer", POINTER(Layer)),
        ("cosine", c_void_p * 2),
        ("sine", c_void_p * 2),
    )


class HeadsOf(ctypes.Structure):
    """mc_heads of step.h."""

    _fields_ = (
        ("heads", c_int32),
        ("layers", c_int32),
        ("block", POINTER(Matrix)),
        ("lm_head", POINTER(Matrix)),
    )


class CacheOf(ctypes.Structure):
    """mc_cache of step.h."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("layer_stride", c_int64),
        ("head_stride", c_int64),
        ("capacity", c_int32),
        ("format", c_int32),
    )


class Step(ctypes.Structure):
    """mc_step of step.h."""

    _fields_ = (
        ("rows", c_int32),
        ("start", c_int32),
        ("tokens", c_void_p),
        ("table", c_void_p),
        ("root", c_int32),
        ("ranked", c_int32),
        ("parents", c_void_p),
        ("texts", c_void_p),
        ("places", c_void_p),
        ("last", c_void_p),
        ("guesses", c_void_p),
        ("log_p", c_void_p),
        ("row_tokens", c_void_p),
        ("hidden", c_void_p),
        ("logits", c_void_p),
        ("argmax", c_void_p),
        ("first_logits", c_int32),
        ("accept", c_int32),
        ("accepted", c_int32),
        ("next", c_int32),
        ("heads_seconds", c_double),
        ("rows_seconds", c_double),
    )


STRUCTURES = (Matrix, Layer, Model, HeadsOf, CacheOf, Step)


class Rule(ctypes.Structure):
    """mc_rule of rules.h."""

    _fields_ = (
        ("logits", c_void_p),
        ("tokens", c_void_p),
        ("parents", c_void_p),
        ("token_keys", c_void_p),
        ("counts", c_void_p),
        ("scores", c_void_p),
        ("position", c_int64),
        ("seed", c_int64),
        ("top_p", c_double),
        ("min_p", c_double),
        ("epsilon", c_double),
        ("delta", c_double),
        ("temperature", c_float),
        ("repetition", c_float),
        ("presence", c_float),
        ("frequency", c_float),
        ("top_k", c_int32),
        ("kind", c_int32),
        ("rows", c_int32),
        ("vocabulary", c_int32),
        ("row", c_int32),
        ("next", c_int32),
    )


# Result and arguments of each function.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "mc_structure_sizes": (None, c_void_p),
    "mc_packed_bytes": (c_size_t, c_int, c_int, c_int),
    "mc_pack": (None, c_int, c_int, c_int, c_int, c_int, c_void_p, c_int, c_void_p),
    "mc_pack_int8": (None, c_int, c_int, c_int, c_int, c_void_p, c_void_p, c_void_p),
    "mc_pack_nf4": (None, c_int, c_int, c_int, c_int, c_void_p, c_void_p, c_void_p),
    "mc_team_new": (c_void_p, c_int),
    "mc_team_free": (None, c_void_p),
    "mc_use": (c_int, ctypes.c_char_p),
    "mc_variant": (ctypes.c_char_p,),
    "mc_variants": (ctypes.c_char_p,),
    "mc_check": (c_int,),
    "mc_engine_new": (c_void_p, POINTER(Model), POINTER(HeadsOf), c_void_p, c_int),
    "mc_engine_free": (None, c_void_p),
    "mc_engine_step": (c_int, c_void_p, POINTER(CacheOf), POINTER(Step)),
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
