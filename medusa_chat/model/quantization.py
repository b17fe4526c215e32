"""bitsandbytes settings for a backbone, and single layers quantized and laid out for the device that runs them."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from medusa_chat.config import Quant


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What 4-bit layers multiply in: float16 where a GPU is too old for bfloat16 (Turing), else the backbone's own."""
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return dtype


def quantization_config(quant: Quant, dtype: torch.dtype) -> Any:
    """What from_pretrained takes for a backbone in `quant` whose 4-bit layers compute in `dtype`; None for 16 bits."""
    if quant == "none":
        return None
    if quant == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    # The defaults, fp4 that computes in float32, would be less exact and slow.
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=quant == "nf4-double",
    )  # fmt: skip


def quantize_linear(linear: nn.Linear, quant: Quant, device: torch.device) -> nn.Module:
    """The layer in `quant` on `device`, for inference; for `none`, the layer itself, moved there.

    A quantized layer keeps nothing of the 16-bit weights.
    """
    if quant == "none":
        return linear.to(device)
    bnb = _layers()
    inside, outside, bias = linear.in_features, linear.out_features, linear.bias is not None
    layer: Any
    if quant == "int8":
        layer = bnb.Linear8bitLt(inside, outside, bias, has_fp16_weights=False, threshold=6.0, device="meta")
        layer.weight = bnb.Int8Params(linear.weight.data, requires_grad=False)
    else:
        dtype = compute_dtype(device, linear.weight.dtype)
        nested = quant == "nf4-double"
        layer = bnb.Linear4bit(inside, outside, bias, dtype, nested, "nf4", device="meta")
        layer.weight = bnb.Params4bit(
            linear.weight.data, requires_grad=False, compress_statistics=nested, quant_type="nf4", module=layer
        )
    layer.bias = linear.bias
    quantized: nn.Module = layer.to(device).eval().requires_grad_(False)
    return quantized


def _layers() -> Any:
    """bitsandbytes' layers. It tells on import what it could have besides, and of every cast."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes import nn as bnb

    return bnb


def copy_linear(linear: nn.Module) -> Any:
    """A copy of a layer, quantized or not, that shares nothing with it."""
    made: Any = copy.deepcopy(linear)
    if hasattr(made.weight, "quant_state"):  # deepcopy copies what belongs to both layer and weight twice
        made.weight.module, made.quant_state = made, made.weight.quant_state
    elif getattr(made.weight, "CB", None) is not None:
        made.weight.CB = made.weight.data
    return made
