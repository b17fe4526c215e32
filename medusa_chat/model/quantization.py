"""bitsandbytes settings for a backbone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig

from medusa_chat.config import Quant


def quantization_config(quant: Quant, dtype: torch.dtype) -> Any:
    """What from_pretrained takes for a backbone in nf4 or int8 that computes in `dtype`; None for 16 bits."""
    if quant == "none":
        return None
    if quant == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    # The default of bnb_4bit_compute_dtype is float32, which would slow every matmul.
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
