"""ModelSpec -> Backbone + MedusaHeads + tokenizer; what goes wrong is one line for the user."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from medusa_chat.config import ACCURACY_FILE, ModelSpec, UserError
from medusa_chat.model.backbone import Backbone, check_rewindable
from medusa_chat.model.heads import Heads, decoding_heads
from medusa_chat.model.layouts import HEADS_FILE, read_heads
from medusa_chat.model.packing import pack_linears
from medusa_chat.model.quantization import (
    as_quant,
    check_quantization,
    compute_dtype,
    quantization_config,
    settle_4bit,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Loaded:
    """What a spec names, ready to decode.

    Attributes:
        accuracy: the file beside the heads that holds their measured accuracies, which need not be there yet;
            None for a model without heads.
    """

    backbone: Backbone
    heads: Heads | None
    tokenizer: Any
    accuracy: Path | None


def load_model(spec: ModelSpec, device: str = "auto", dtype: str | None = None) -> Loaded:
    """Load a backbone, its heads and its tokenizer; raises UserError for all that is the user's to put right."""
    chosen = choose_device(device)
    number = choose_dtype(chosen, dtype)
    model, tokenizer = load_pretrained(spec, number, spec.quant, chosen)
    backbone = Backbone(model)
    file = heads_file(spec)
    heads: Heads | None = None
    if file is not None:
        quant = as_quant(spec.quant_heads)
        heads = decoding_heads(
            read_heads(file, backbone.hidden_size, backbone.vocabulary), quant, chosen, number, backbone.lm_head
        )
    pack_linears(backbone.model)  # after the heads: they may need a copy of the LM head in a quantization of its own
    return Loaded(backbone, heads, tokenizer, file.parent / ACCURACY_FILE if file else None)


def load_pretrained(
    spec: ModelSpec, dtype: torch.dtype | None, quant: str = "auto", device: torch.device = _CPU
) -> tuple[Any, Any]:
    """transformers' own model and tokenizer of a spec; dtype None keeps that of the files.

    `quant` is a Quant, or auto: as the files are, which may be quantized in any way that transformers loads.
    """
    with _one_line(spec.backbone):
        config = AutoConfig.from_pretrained(spec.backbone)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if model_class is None:
            raise UserError(f"{config.model_type} models are not causal language models that transformers can load")
        check_rewindable(model_class, config.get_text_config())
        own = check_quantization(spec.name, config, quant)
        tokenizer = AutoTokenizer.from_pretrained(spec.backbone)
        settings = None if own else quantization_config(quant, compute_dtype(device, dtype or torch.bfloat16))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            spec.backbone,
            dtype=dtype or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            quantization_config=settings,
            device_map={"": device} if own or settings else None,  # quantized where it will be used
        )
    model, report = loaded
    if own or settings:
        settle_4bit(model, device, model.dtype)
    else:
        model.to(device)
    _check_report(spec.backbone, report)
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"the tokenizer of {spec.name} has no chat template, so there is no way to chat with it")
    return model, tokenizer


def choose_device(device: str) -> torch.device:
    """`auto` is the first of cuda, mps, cpu that is there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, there in present.items() if there))
    if not present.get(device.split(":")[0], False):
        raise UserError(f"there is no {device} device here; --device auto picks one")
    try:
        return torch.device(device)
    except RuntimeError:
        raise UserError(f"{device!r} names no device; --device auto picks one") from None


def choose_dtype(device: torch.device, dtype: str | None) -> torch.dtype:
    """By default bfloat16 where the hardware computes in it, else float32 on a CPU and float16 on a GPU."""
    if dtype not in (None, "auto"):
        if dtype not in DTYPES:
            raise UserError(f"dtype is auto, {', '.join(DTYPES)}, not {dtype!r}")
        return DTYPES[dtype]
    if device.type == "cpu":
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


@contextmanager
def _one_line(backbone: str) -> Iterator[None]:
    """Turn what transformers raises for missing, damaged or foreign files into a UserError, and keep it quiet."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:  # whatever transformers runs into over files that are not ours
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"cannot load the model {backbone}: {first}") from None


def _check_report(backbone: str, report: dict[str, Any]) -> None:
    """A weight that is missing or does not fit would be random."""
    for kind, fault in (("missing_keys", "is missing"), ("mismatched_keys", "has another shape than the config says")):
        if report.get(kind):
            key = min(key if isinstance(key, str) else key[0] for key in report[kind])
            raise UserError(f"cannot load the model {backbone}: weight {key} {fault}")


def heads_file(spec: ModelSpec) -> Path | None:
    """The file of the heads: named by the user, or beside the backbone if there is one."""
    place = Path(spec.heads or spec.backbone)
    if place.is_file():
        return place
    if place.is_dir():
        file = place / HEADS_FILE
        if not file.is_file() and spec.heads:
            raise UserError(f"there is no {HEADS_FILE} in {spec.heads}")
        return file if file.is_file() else None
    if spec.heads is None:
        return None
    if spec.heads.count("/") != 1 or spec.heads.startswith((".", "/", "~")):
        raise UserError(f"there are no Medusa heads at {spec.heads}: no such file or folder")
    try:
        return Path(hf_hub_download(spec.heads, HEADS_FILE))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(f"cannot download the heads {spec.heads}: {str(error).splitlines()[0]}") from None
