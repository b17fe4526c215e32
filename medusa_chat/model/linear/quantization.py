"""bitsandbytes settings for a backbone, and single layers quantized and laid out for the device that runs them."""

from __future__ import annotations

import copy
import logging
from importlib.util import find_spec
from typing import Any, get_args

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from medusa_chat.config import Quant, UserError

# Packages that transformers needs for checkpoints in these methods.
_PACKAGES = {
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel",),
    "compressed-tensors": ("compressed_tensors",),
}


def as_quant(quant: str) -> Quant:
    """A spec's quantization, where auto is none."""
    if quant == "auto":
        return "none"
    for known in get_args(Quant):
        if quant == known:
            return known
    raise UserError(f"quant is auto, {', '.join(get_args(Quant))}, not {quant!r}")


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What 4-bit layers multiply in: float16 where a GPU is too old for bfloat16 (Turing), else the backbone's own."""
    if (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return torch.float16
    return dtype


def quantization_config(quant: str, dtype: torch.dtype) -> Any:
    """What from_pretrained takes for a backbone in `quant` whose 4-bit layers compute in `dtype`; None for 16 bits."""
    if as_quant(quant) == "none":
        return None
    if quant == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    # The defaults, fp4 that computes in float32, would be less exact and slow.
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=quant == "nf4-double",
    )


def quantize_linear(linear: nn.Linear, quant: Quant, device: torch.device) -> nn.Module:
    """The layer in `quant` on `device`, for inference; for `none`, the layer itself, moved there.

    A quantized layer keeps nothing of the 16-bit weights.
    """
    if quant == "none":
        return linear.to(device)
    bnb = bitsandbytes_layers()
    inside, outside, bias = linear.in_features, linear.out_features, linear.bias is not None
    layer: Any
    if quant == "int8":
        layer = bnb.Linear8bitLt(
            inside, outside, bias, has_fp16_weights=False, threshold=6.0, device="meta"
        )
        layer.weight = bnb.Int8Params(linear.weight.data, requires_grad=False)
    else:
        dtype = compute_dtype(device, linear.weight.dtype)
        nested = quant == "nf4-double"
        layer = bnb.Linear4bit(inside, outside, bias, dtype, nested, "nf4", device="meta")
        layer.weight = bnb.Params4bit(
            linear.weight.data,
            requires_grad=False,
            compress_statistics=nested,
            quant_type="nf4",
            module=layer,
        )
    layer.bias = linear.bias
    quantized: nn.Module = layer.to(device).eval().requires_grad_(False)
    settle_4bit(quantized, device, linear.weight.dtype)
    return quantized


def check_quantization(name: str, config: Any, quant: str) -> str | None:
    """How a checkpoint is quantized, None if it is not; raises UserError for what cannot be had from it here."""
    own = quant_of(config)
    if own is None:
        return None
    if quant not in ("auto", own):
        raise UserError(
            f"the files of {name} are quantized already, in {own}: leave --quant {quant} out"
        )
    for package in _PACKAGES.get(own, ()):
        if find_spec(package) is None:
            raise UserError(
                f"the files of {name} are quantized in {own}, which needs: pip install {package}"
            )
    return own


def bitsandbytes_layers() -> Any:
    """Bitsandbytes' layers. It tells on import what it could have besides, and of every cast."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes import nn as bnb

    return bnb


def settle_4bit(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Set what 4-bit layers compute in, whatever their checkpoint says, and keep unfit ones from bitsandbytes' packing.

    On a CPU it packs at the first step, into a layout that multiplies in bfloat16 and stops at shapes it can't take.
    """
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit":
            layer.compute_dtype, layer.compute_type_is_set = compute_dtype(device, dtype), True  # type: ignore[assignment]
            if not can_pack_4bit(layer):
                layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def can_pack_4bit(layer: Any) -> bool:
    """Whether a 4-bit layer can have bitsandbytes' layout for processors with AVX512-BF16."""
    state, outside, inside = layer.weight.quant_state, layer.out_features, layer.in_features
    fits = state is not None and outside % 32 == 0 and inside % state.blocksize == 0
    on_cpu = layer.weight.device.type == "cpu" and layer.support_avx512bf16_for_cpu
    return bool(fits and on_cpu and layer.compute_dtype == torch.bfloat16)


def quant_of(config: Any) -> str | None:
    """How the weights that belong to a transformers config are quantized: a Quant or another method; None if not."""
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
    """A copy of a layer, quantized or not, that shares nothing with it."""
    made: Any = copy.deepcopy(linear)
    if hasattr(
        made.weight, "quant_state"
    ):  # deepcopy copies what belongs to both layer and weight twice
        made.weight.module, made.quant_state = made, made.weight.quant_state
    elif getattr(made.weight, "CB", None) is not None:
        made.weight.CB = made.weight.data
    return made
