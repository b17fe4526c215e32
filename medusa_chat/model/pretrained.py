"""transformers' own model and tokenizer of a spec, loaded quietly and with plain errors.

All that comes from a checkpoint is loaded here: from local files alone, and without its code.
"""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from medusa_chat.config import ModelSpec, UserError
from medusa_chat.files import read_json
from medusa_chat.hub import fetch as hub
from medusa_chat.hub.gguf.folder import weights_of
from medusa_chat.model.backbone import check_rewindable
from medusa_chat.model.config_values import check_values
from medusa_chat.model.finite import check_tables
from medusa_chat.model.gguf_weights import state_dict_of
from medusa_chat.model.layouts import is_heads_tensor
from medusa_chat.model.layouts.config import read_config
from medusa_chat.model.linear.quantization import (
    as_quant,
    check_quantization,
    compute_dtype,
    prepare_4bit,
    quantization_config,
)
from medusa_chat.model.weight_files import check_weight_files
from medusa_chat.text import is_panic, reason_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from medusa_chat.hub.gguf.header import Header

CPU = torch.device("cpu")
ADAPTER_CONFIG = "adapter_config.json"


def load_pretrained(
    spec: ModelSpec,
    dtype: torch.dtype | None,
    quant: str = "auto",
    device: torch.device = CPU,
    notices: list[str] | None = None,
) -> tuple[Any, Any]:
    """Load the transformers model and tokenizer of a spec.

    Args:
        spec: the model; its `quant` is not read.
        dtype: of the weights; None keeps that of the files.
        quant: a Quant, or auto: as the files are, which may be quantized in any way that
            transformers loads.
        device: where to load the model.
        notices: gets a line on weights that the model has no place for.

    Raises:
        UserError: files are missing or damaged, or the model cannot decode with Medusa heads.
    """
    folder = hub.backbone_of(spec)
    with loading_errors(spec.backbone):
        config = load_config(folder)
        _check_class(config)
        own = check_quantization(spec.name, config, quant)
        tokenizer = load_tokenizer(folder)
        check_generation_config(folder)
        check_weight_files(spec.backbone, folder, quantized=own is not None)
        settings = attention_settings(config)
        settings |= {} if own else _quantization_settings(quant, device, dtype)
        quantized = own is not None or as_quant(quant) != "none"
        moved = not quantized and device.type != "cpu"
        model, report = load_weights(
            folder,
            # What goes to a GPU changes its format there: the host holds no copy of it.
            dtype="auto" if moved else dtype or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            device_map={"": device} if quantized else None,  # quantized where it will be used
            **settings,
        )
    if quantized:
        prepare_4bit(model, device, model.dtype)
    elif moved:
        move(model, device, dtype)
    _check_weights(spec.backbone, report)
    check_tables(model, spec.backbone)
    if notices is not None:
        notices += _unused_weights(spec.backbone, report)
    return model, tokenizer


def _quantization_settings(
    quant: str, device: torch.device, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Return how to quantize; weights that are quantized already take no such setting."""
    made = quantization_config(quant, compute_dtype(device, dtype or torch.bfloat16))
    return {"quantization_config": made} if made else {}


def move(model: Any, device: torch.device, dtype: torch.dtype | None) -> None:
    """Bring a model to a device one weight at a time, in another number format if one is given.

    Buffers keep theirs: RoPE's frequencies are float32.
    """
    moved: dict[nn.Parameter, nn.Parameter] = {}  # tied weights are one on the device too
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight not in moved:
                number = dtype if dtype and weight.is_floating_point() else weight.dtype
                there = weight.detach().to(device).to(number)
                moved[weight] = nn.Parameter(there, requires_grad=weight.requires_grad)
            setattr(module, name, moved[weight])
    model.to(device)


def load_config(folder: Path) -> Any:
    """Read a checkpoint's config; call it within `loading_errors`."""
    if (folder / ADAPTER_CONFIG).exists() and (folder / "config.json").exists():
        raise UserError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG}) beside a model: merge it into the"
            " weights, or move it elsewhere"
        )
    file = folder / "config.json"
    _check_ends(file, read_config(file).get("eos_token_id"))
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    check_values(file, config)
    return config


def check_generation_config(folder: Path) -> None:
    """Refuse a generation_config.json that transformers would pass over in silence.

    It may name the tokens that end a reply.
    """
    file = folder / "generation_config.json"
    if not file.exists():
        return
    try:
        ends = read_config(file).get("eos_token_id")
        GenerationConfig.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"cannot read {file}: {reason_of(error)}") from None
    _check_ends(file, ends)


def _check_ends(file: Path, ends: Any) -> None:
    listed = ends if isinstance(ends, list) else [ends]
    if not all(token is None or type(token) is int for token in listed):
        raise UserError(f"cannot read {file}: eos_token_id must be a token or a list of them")


def load_tokenizer(folder: Path) -> Any:
    """Load a checkpoint's tokenizer; call it within `loading_errors`."""
    tokenizer = AutoTokenizer.from_pretrained(
        str(folder), trust_remote_code=False, local_files_only=True, **tokenizer_settings(folder)
    )
    if not isinstance(tokenizer.model_max_length, int | float):
        raise UserError(f"{folder / 'tokenizer_config.json'}: model_max_length is no number")
    if not hasattr(tokenizer, "backend_tokenizer"):
        kind = type(tokenizer).__name__
        raise UserError(f"{folder} has a tokenizer ({kind}) without a form that tokenizers can run")
    return tokenizer


def load_weights(folder: Path, **settings: Any) -> Any:
    """Load a checkpoint's model; call it within `loading_errors`."""
    header = weights_of(folder)
    if header is not None:
        return _load_gguf(folder, header, **settings)
    return AutoModelForCausalLM.from_pretrained(
        str(folder), trust_remote_code=False, local_files_only=True, **settings
    )


def _load_gguf(folder: Path, header: Header, **settings: Any) -> Any:
    """Load the model of a folder whose weights are in a GGUF file, unpacked one by one."""
    config = load_config(folder)
    names = list(empty_model(config).state_dict())
    tensors = state_dict_of(header, config.get_text_config(), names)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    loaded = model_class.from_pretrained(
        None, config=config, state_dict=tensors, trust_remote_code=False, **settings
    )
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.name_or_path = model.config.name_or_path = str(folder)
    model.generation_config = GenerationConfig.from_pretrained(
        str(folder), trust_remote_code=False, local_files_only=True
    )
    return loaded


def empty_model(config: Any) -> Any:
    """Make the model of a config without weights; call it within `loading_errors`."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def attention_settings(config: Any) -> dict[str, Any]:
    """Return settings that load a model with the attention that it was trained with.

    sdpa leaves the cap of soft-capped scores out; transformers 5.17 does not report that.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return {"attn_implementation": "eager"} if capped else {}


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """Return settings that load a tokenizer as its checkpoint was made with it.

    A Llama of before 2023-07 does not mention `legacy`, which transformers 5 takes as False. It
    was trained with a space before the word after `</s>`.
    """
    if (folder / "tokenizer.json").exists() or not (folder / "tokenizer.model").exists():
        return {}
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.exists() else {}
    old_llama = config.get("tokenizer_class") == "LlamaTokenizer" and "legacy" not in config
    return {"legacy": True} if old_llama else {}


@contextmanager
def loading_errors(name: str) -> Iterator[None]:
    """Silence transformers, and turn what it raises for a model's files into a UserError."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except BaseException as error:  # transformers raises many kinds over unexpected files
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"cannot load the model {name}: it needs code from its own files, which"
                " medusa-chat never runs"
            ) from None
        raise UserError(f"cannot load the model {name}: {reason_of(error)}") from None


def _check_class(config: Any) -> None:
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        raise UserError(
            f"{config.model_type} models are not causal language models that transformers can load"
        )
    check_rewindable(model_class, config.get_text_config())


def _check_weights(backbone: str, report: dict[str, Any]) -> None:
    """Refuse a model with a weight that is missing or does not fit, which would be random."""
    faults = {
        "missing_keys": "is missing",
        "mismatched_keys": "has another shape than the config says",
    }
    for kind, fault in faults.items():
        keys = [key if isinstance(key, str) else key[0] for key in report.get(kind) or ()]
        if keys:
            raise UserError(f"cannot load the model {backbone}: weight {min(keys)} {fault}")


def _unused_weights(backbone: str, report: dict[str, Any]) -> list[str]:
    """A notice of weights in the files that neither model nor heads use, if there are any."""
    keys = report.get("unexpected_keys") or ()
    unused = sorted(key for key in keys if not is_heads_tensor(key))
    if not unused:
        return []
    more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
    return [f"{backbone} holds weights that the model has no place for: {unused[0]}{more}"]
