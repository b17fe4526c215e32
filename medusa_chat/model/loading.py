"""ModelSpec -> Backbone + MedusaHeads + tokenizer; what goes wrong is one line for the user."""

from __future__ import annotations

import json
import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from medusa_chat.config import ACCURACY_FILE, LoadOptions, ModelSpec, UserError
from medusa_chat.hub import fetch as hub
from medusa_chat.machine import memory
from medusa_chat.machine.devices import choose_device, choose_dtype, frugal_heap
from medusa_chat.model.backbone import Backbone, check_rewindable
from medusa_chat.model.heads import Heads, decoding_heads
from medusa_chat.model.layouts import HEADS_FILE, find_heads, is_heads_tensor, read_heads
from medusa_chat.model.linear.joined import fuse_linears
from medusa_chat.model.linear.packed import leave_files, pack_linears
from medusa_chat.model.linear.quantization import (
    as_quant,
    check_quantization,
    compute_dtype,
    quantization_config,
    settle_4bit,
)
from medusa_chat.model.templates import ChatTemplate, resolve_template

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Loaded:
    """What a spec names, ready to decode.

    Attributes:
        accuracy: the file that holds the heads' measured accuracies, which need not be there yet; None for a model
            without heads.
        notices: what the user should know, a line each.
    """

    backbone: Backbone
    heads: Heads | None
    tokenizer: Any
    template: ChatTemplate
    accuracy: Path | None
    notices: tuple[str, ...] = ()


def load_model(
    spec: ModelSpec, options: LoadOptions = LoadOptions(), files: hub.Files | None = None
) -> Loaded:
    """Load a backbone, its heads and its tokenizer.

    Args:
        files: local paths of the spec's files; without them they are fetched.

    Raises:
        UserError: for all that is the user's to put right.
    """
    chosen = choose_device(options.device)
    number = choose_dtype(chosen, options.dtype)
    files = files or hub.fetch(spec)
    here = replace(
        spec, backbone=str(files.backbone), heads=str(files.heads) if files.heads else None
    )
    if not options.ignore_memory:
        memory.check(here, memory.load_of(spec, str(chosen), options.context, number.itemsize))
    with frugal_heap():
        return _read(spec, here, chosen, number, list(files.notices), options.fuse)


def _read(
    spec: ModelSpec,
    here: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    notices: list[str],
    fuse: bool,
) -> Loaded:
    """What `spec` names, from the files that `here` names."""
    model, tokenizer = load_pretrained(here, dtype, spec.quant, device, notices)
    template = resolve_template(tokenizer, spec)
    if fuse and fuse_linears(model):
        settle_4bit(model, device, dtype)
    backbone = Backbone(model)
    file, heads, accuracy = heads_file(here), None, None
    if file is not None:
        lm_head = getattr(backbone.lm_head, "weight", None)
        read = read_heads(
            file,
            backbone.hidden_size,
            backbone.vocabulary,
            dtype=dtype,
            lm_head=lm_head,
            layout=spec.layout,
        )
        notices += read.notices
        heads = decoding_heads(
            read.heads, as_quant(spec.quant_heads), device, dtype, backbone.lm_head
        )
        accuracy = _known_accuracy(spec, file)
    pack_linears(
        backbone.model
    )  # after the heads: packed, the LM head could neither be compared nor quantized
    leave_files(backbone.model)
    return Loaded(backbone, heads, tokenizer, template, accuracy, tuple(notices))


def _known_accuracy(spec: ModelSpec, heads: Path) -> Path:
    """What was measured here, else what came with the heads."""
    own, published = hub.accuracy_file(spec), heads.parent / ACCURACY_FILE
    return published if published.exists() and not own.exists() else own


def load_pretrained(
    spec: ModelSpec,
    dtype: torch.dtype | None,
    quant: str = "auto",
    device: torch.device = _CPU,
    notices: list[str] | None = None,
) -> tuple[Any, Any]:
    """Transformers' own model and tokenizer of a spec; dtype None keeps that of the files.

    Args:
        quant: a Quant, or auto: as the files are, which may be quantized in any way that transformers loads.
        notices: a line on weights that the model has no place for is added here.
    """
    folder = str(hub.local(spec.backbone))
    with one_line(spec.backbone):
        config = AutoConfig.from_pretrained(folder)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if model_class is None:
            raise UserError(
                f"{config.model_type} models are not causal language models that transformers can load"
            )
        check_rewindable(model_class, config.get_text_config())
        own = check_quantization(spec.name, config, quant)
        tokenizer = AutoTokenizer.from_pretrained(folder, **_tokenizer_settings(Path(folder)))
        asked = attention_settings(
            config
        )  # not even None may be said of weights that are quantized already
        if not own and as_quant(quant) != "none":
            asked["quantization_config"] = quantization_config(
                quant, compute_dtype(device, dtype or torch.bfloat16)
            )
        quantized = own is not None or "quantization_config" in asked
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            device_map={"": device} if quantized else None,  # quantized where it will be used
            **asked,
        )
    model, report = loaded
    if quantized:
        settle_4bit(model, device, model.dtype)
    else:
        model.to(device)
    unknown = _check_report(spec.backbone, report)
    if unknown and notices is not None:
        notices.append(unknown)
    return model, tokenizer


def attention_settings(config: Any) -> dict[str, Any]:
    """How to load a model so that its own attention is the one it was trained with.

    Of soft-capped scores sdpa leaves the cap out, which transformers 5.17 passes over in silence.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return {"attn_implementation": "eager"} if capped else {}


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    """What transformers 5 takes for granted otherwise than what made the checkpoint.

    A Llama of before 2023-07 says nothing of `legacy`, and was trained with a space before the word behind `</s>`.
    """
    if (folder / "tokenizer.json").exists() or not (folder / "tokenizer.model").exists():
        return {}
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return (
        {"legacy": True}
        if config.get("tokenizer_class") == "LlamaTokenizer" and "legacy" not in config
        else {}
    )


@contextmanager
def one_line(backbone: str) -> Iterator[None]:
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
        first = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise UserError(f"cannot load the model {backbone}: {first}") from None


def _check_report(backbone: str, report: dict[str, Any]) -> str:
    """A weight that is missing or does not fit would be random. Returns a line on those that are too many, or ""."""
    for kind, fault in (
        ("missing_keys", "is missing"),
        ("mismatched_keys", "has another shape than the config says"),
    ):
        if report.get(kind):
            key = min(key if isinstance(key, str) else key[0] for key in report[kind])
            raise UserError(f"cannot load the model {backbone}: weight {key} {fault}")
    strange = sorted(key for key in report.get("unexpected_keys") or () if not is_heads_tensor(key))
    more = f" and {len(strange) - 1} more" if strange[1:] else ""
    return (
        f"{backbone} holds weights that the model has no place for: {strange[0]}{more}"
        if strange
        else ""
    )


def heads_file(spec: ModelSpec) -> Path | None:
    """The file of the heads, or the index of its shards: named by the user, or beside the backbone if there is one."""
    place = hub.local(spec.heads, "heads") if spec.heads else hub.local(spec.backbone)
    if place.is_file():
        return place
    file = find_heads(place)
    if file is None and spec.heads:
        raise UserError(
            f"there are no Medusa heads in {spec.heads}: no {HEADS_FILE}, nor those of another layout"
        )
    return file
