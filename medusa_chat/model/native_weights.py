"""The native step on a CPU: whether a model can take it, and its weights packed for it."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medusa_chat.config import MAX_CONTEXT, LoadOptions, UserError
from medusa_chat.machine.devices import choose_dtype, usable_cores
from medusa_chat.model.linear.packed import detach_from_files
from medusa_chat.model.linear.quantization import as_quant, check_quantization, quant_of
from medusa_chat.model.pretrained import load_config, loading_errors
from medusa_chat.model.weight_files import damage, weight_paths
from medusa_chat.native import families, kept, library
from medusa_chat.native.model import NativeHeads, NativeModel
from medusa_chat.native.packed import Packed
from medusa_chat.native.step import Team
from medusa_chat.native.weights import NF4_BLOCK, Store
from medusa_chat.version import __version__

if TYPE_CHECKING:
    from medusa_chat.config import ModelSpec
    from medusa_chat.model.backbone import Backbone
    from medusa_chat.model.heads import MedusaHeads

# Formats of the layers and of the LM head, which is most of a small model and loses nothing in
# int8 that a reply would show.
FORMATS = {"int8": ("int8", "int8"), "nf4": ("nf4", "int8"), "nf4-double": ("nf4", "int8")}
SLOW = 2.0  # seconds of packing from which on the result is kept


@dataclass(frozen=True)
class StepChoice:
    """The step that will run a model.

    Attributes:
        native: the native one, else torch's.
        dtype: of weights that are not quantized, and of the cache.
        quant: how transformers loads the layers; the native step packs them by itself.
        notices: a line for the user if the native step does not run the model.
    """

    native: bool
    dtype: torch.dtype
    quant: str
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Description:
    """A model before its weights are loaded, as native.takes has it."""

    config: Any
    device: torch.device
    dtype: torch.dtype


def choose_step(spec: ModelSpec, device: torch.device, options: LoadOptions) -> StepChoice:
    """Choose between the native step and torch's.

    Args:
        spec: the model, whose backbone is a local folder.
        device: where the model will run.
        options: engine and dtype are read.

    Raises:
        UserError: the native step is asked for and cannot be had.
    """
    torchs = StepChoice(False, choose_dtype(device, options.dtype), spec.quant)
    if options.engine == "torch" or (options.engine == "auto" and device.type != "cpu"):
        return torchs
    dtype = native_dtype(device, options.dtype)
    missing = library.available()
    reason = missing or _refusal(spec, device, dtype)
    if reason is None:
        return StepChoice(True, dtype, "auto")
    if options.engine == "native":
        raise UserError(f"--engine native: {reason}")
    if missing:
        return torchs  # `doctor` says so; at each start it would be noise
    return StepChoice(False, torchs.dtype, spec.quant, (f"torch's step runs this model: {reason}",))


def native_dtype(device: torch.device, dtype: str) -> torch.dtype:
    """Return bfloat16 for `auto`: the library computes with it on every processor."""
    automatic = dtype == "auto" and device.type == "cpu"
    return torch.bfloat16 if automatic else choose_dtype(device, dtype)


def _refusal(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the native step cannot run a model, from its config alone; None if it can."""
    with loading_errors(spec.backbone):
        whole = load_config(Path(spec.backbone))
    own = check_quantization(spec.name, whole, spec.quant)
    if own not in (None, "int8", "nf4", "nf4-double"):
        return f"the native step does not read weights in {own}"
    config = whole.get_text_config()
    reason = families.unsupported(Description(config, device, dtype))
    if reason is None and own and own.startswith("nf4"):
        heads = config.num_attention_heads * families.head_dim_of(config)
        if any(size % NF4_BLOCK for size in (config.hidden_size, config.intermediate_size, heads)):
            return f"the native step reads nf4 files whose sizes are multiples of {NF4_BLOCK} only"
    return reason


def pack_native(
    backbone: Backbone,
    heads: MedusaHeads | None,
    quant: str,
    quant_heads: str,
    options: LoadOptions,
) -> NativeHeads | None:
    """Pack a backbone and heads for the native step, matrix by matrix; each lets its own go.

    Args:
        backbone: loaded plain, or as bitsandbytes quantized it.
        heads: the heads, or None.
        quant: of the backbone's layers: a Quant, or auto.
        quant_heads: of the heads' matrices.
        options: threads and context are read.

    Returns:
        The heads; `backbone.native` holds the backbone.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    detach_from_files(backbone.model)
    own = quant_of(backbone.model.config)
    layers, lm_head = formats_of(own or as_quant(quant), backbone.dtype)
    if own:
        lm_head = plain_format(backbone.dtype)  # as its files have it
    context = options.context or MAX_CONTEXT
    model = _packed_once(backbone, layers, lm_head, context)
    packed = None
    if heads is not None:
        own_heads, own_lm_heads = formats_of(as_quant(quant_heads), backbone.dtype)
        packed = NativeHeads(heads, model, own_heads, own_lm_heads)
    backbone.native = Packed(model, Team(options.threads or usable_cores()), layers)
    return packed


def _packed_once(backbone: Backbone, layers: str, lm_head: str, positions: int) -> NativeModel:
    """Pack a backbone, or map what an earlier load of the same files packed.

    Only what takes a while to pack is kept.
    """
    folder = Path(backbone.model.name_or_path)
    key = _identity(folder) if backbone.model.name_or_path else None
    names = f"{folder.resolve()} {layers} {lm_head} {backbone.dtype}"
    file = kept.folder() / f"{hashlib.sha256(names.encode()).hexdigest()[:24]}{kept.SUFFIX}"
    started = time.perf_counter()
    store = Store(kept.KeptMatrices(file, key) if key else None)
    try:
        model = NativeModel(
            backbone, layers, lm_head, positions=positions, release=True, store=store
        )
    except library.NotFiniteError:
        raise UserError(damage(folder, backbone.dtype)) from None
    if key and not store.all_read and time.perf_counter() - started > SLOW:
        kept.write(file, key, store.packed)
    store.packed.clear()
    return model


def _identity(folder: Path) -> list[Any] | None:
    """Return all that packed weights depend on but formats; None for a model without files."""
    weights = weight_paths(folder)
    if not weights:
        return None
    found: list[Any] = [__version__, library.digest()]
    for path in (folder / "config.json", *weights):
        status = path.stat()
        found.append([path.name, status.st_size, status.st_mtime_ns])
    return found


def formats_of(quant: str, dtype: torch.dtype) -> tuple[str, str]:
    """Return the formats of layers and of LM heads in a Quant."""
    plain = plain_format(dtype)
    return FORMATS.get(quant, (plain, plain))


def plain_format(dtype: torch.dtype) -> str:
    """Return the format of weights that are not quantized."""
    return "float32" if dtype == torch.float32 else "bfloat16"
