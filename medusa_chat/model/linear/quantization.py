"""bitsandbytes quantization: settings for a backbone, single layers, checkpoints."""

from __future__ import annotations

import copy
import logging
from importlib.util import find_spec
from typing import Any, cast, get_args

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from medusa_chat.config import Quant, UserError

# Packages that transformers needs for checkpoints in these methods.
PACKAGES = {
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel",),
    "compressed-tensors": ("compressed_tensors",),
}
OUTLIER = 6.0  # LLM.int8(): columns with larger activations are multiplied in 16 bits
ROWS_OF_A_TILE = 32  # in bitsandbytes' 4-bit layout for CPUs


def as_quant(quant: str) -> Quant:
    """Return a spec's quantization, where `auto` is none; raises UserError for an unknown one."""
    if quant == "auto":
        return "none"
    if quant not in get_args(Quant):
        raise UserError(f"quant is auto, {', '.join(get_args(Quant))}, not {quant!r}")
    return cast("Quant", quant)


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that 4-bit layers multiply in: the backbone's, or float16 before Ampere."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return dtype
    old = torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float16 if old else dtype


def quantization_config(quant: str, dtype: torch.dtype) -> Any:
    """Return the setting of from_pretrained for a backbone in `quant`; None for 16 bits.

    Args:
        quant: auto, or a Quant.
        dtype: dtype that 4-bit layers multiply in.

    Raises:
        UserError: the quantization is unknown.
    """
    if as_quant(quant) == "none":
        return None
    if quant == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    # The defaults, fp4 that computes in float32, would be less exact, and slow.
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=quant == "nf4-double",
    )


def quantize_linear(linear: nn.Linear, quant: Quant, device: torch.device) -> nn.Module:
    """Return a layer in `quant` on `device`, for inference; for `none`, the layer itself.

    A quantized layer keeps nothing of the 16-bit weights.
    """
    if quant == "none":
        return linear.to(device)
    layer = _empty_int8(linear) if quant == "int8" else _empty_4bit(linear, quant, device)
    layer.bias = linear.bias
    quantized: nn.Module = layer.to(device).eval().requires_grad_(False)  # quantizes the weights
    prepare_4bit(quantized, device, linear.weight.dtype)
    return quantized


def _empty_int8(linear: nn.Linear) -> Any:
    """Make an int8 layer whose weights are quantized when they move to their device."""
    bnb = bitsandbytes_layers()
    layer = bnb.Linear8bitLt(
        *_sizes(linear), has_fp16_weights=False, threshold=OUTLIER, device="meta"
    )
    layer.weight = bnb.Int8Params(linear.weight.data, requires_grad=False)
    return layer


def _empty_4bit(linear: nn.Linear, quant: Quant, device: torch.device) -> Any:
    """Make a 4-bit layer whose weights are quantized when they move to their device."""
    bnb = bitsandbytes_layers()
    nested = quant == "nf4-double"
    dtype = compute_dtype(device, linear.weight.dtype)
    layer = bnb.Linear4bit(*_sizes(linear), dtype, nested, "nf4", device="meta")
    layer.weight = bnb.Params4bit(
        linear.weight.data,
        requires_grad=False,
        compress_statistics=nested,
        quant_type="nf4",
        module=layer,
    )
    return layer


def _sizes(linear: nn.Linear) -> tuple[int, int, bool]:
    return linear.in_features, linear.out_features, linear.bias is not None


def check_quantization(name: str, config: Any, quant: str) -> str | None:
    """Return how a checkpoint is quantized, None if it is not.

    Args:
        name: the model's, for the message.
        config: the transformers config of the checkpoint.
        quant: the quantization asked for; auto takes that of the checkpoint.

    Raises:
        UserError: another quantization is asked for, or a package is missing.
    """
    own = quant_of(config)
    if own is None:
        return None
    if quant not in ("auto", own):
        raise UserError(
            f"the files of {name} are quantized already, in {own}: leave --quant {quant} out"
        )
    for package in PACKAGES.get(own, ()):
        if find_spec(package) is None:
            raise UserError(
                f"the files of {name} are quantized in {own}, which needs: pip install {package}"
            )
    return own


def bitsandbytes_layers() -> Any:
    """Import bitsandbytes.nn, without its messages about other backends and about every cast."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes import nn as bnb

    return bnb


def prepare_4bit(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Set the dtype that 4-bit layers multiply in, whatever their checkpoint says.

    On a CPU bitsandbytes packs layers at the first step, into a layout that multiplies in bfloat16
    and fails for some shapes. This keeps those layers from being packed.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            layer: Any = module
            layer.compute_dtype = compute_dtype(device, dtype)
            layer.compute_type_is_set = True
            if not can_pack_4bit(layer):
                layer.support_avx512bf16_for_cpu = False


def can_pack_4bit(layer: Any) -> bool:
    """Return whether a 4-bit layer fits bitsandbytes' layout for processors with AVX512-BF16."""
    state = layer.weight.quant_state
    on_cpu = layer.weight.device.type == "cpu" and layer.support_avx512bf16_for_cpu
    if state is None or not on_cpu or layer.compute_dtype != torch.bfloat16:
        return False
    whole_tiles = layer.out_features % ROWS_OF_A_TILE == 0
    return bool(whole_tiles and layer.in_features % state.blocksize == 0)


def quant_of(config: Any) -> str | None:
    """Return how the weights of a transformers config are quantized, None if they are not."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return None
    known: dict[str, Any] = settings if isinstance(settings, dict) else settings.to_dict()
    if known.get("load_in_8bit"):
        return "int8"
    if known.get("load_in_4bit"):
        kind = str(known.get("bnb_4bit_quant_type", "fp4"))
        return f"{kind}-double" if known.get("bnb_4bit_use_double_quant") else kind
    return str(known.get("quant_method", "an unnamed way"))


def copy_linear(linear: nn.Module) -> Any:
    """Copy a layer, quantized or not, so that both share nothing."""
    made: Any = copy.deepcopy(linear)
    if hasattr(made.weight, "quant_state"):  # deepcopy copies what layer and weight share twice
        made.weight.module = made
        made.quant_state = made.weight.quant_state
    elif getattr(made.weight, "CB", None) is not None:
        made.weight.CB = made.weight.data
    return made
