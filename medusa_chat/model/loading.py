"""A ModelSpec becomes a backbone, heads and a tokenizer, ready to decode."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from medusa_chat.config import ACCURACY_FILE, LoadOptions, ModelSpec, UserError
from medusa_chat.hub import fetch as hub
from medusa_chat.hub.file_names import model_folder
from medusa_chat.hub.gguf.folder import is_quantized
from medusa_chat.machine import memory, plans
from medusa_chat.machine.devices import choose_device, frugal_heap, prepare_allocator
from medusa_chat.model.backbone import Backbone
from medusa_chat.model.heads import Heads, decoding_heads
from medusa_chat.model.layouts import HEADS_FILE, ReadHeads, find_heads, read_heads
from medusa_chat.model.linear.joined import join_linears
from medusa_chat.model.linear.packed import detach_from_files, pack_linears
from medusa_chat.model.linear.quantization import as_quant, prepare_4bit
from medusa_chat.model.native_weights import StepChoice, choose_step, pack_native
from medusa_chat.model.pretrained import load_pretrained
from medusa_chat.model.templates import ChatTemplate, template_or_plain

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Loaded:
    """A model, ready to decode.

    Attributes:
        accuracy: the file of the heads' measured accuracies, which may not exist yet; None for a
            model without heads.
        notices: lines for the user.
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
        spec: the model, with its quantization and its template.
        options: device, dtype, context, raw, ignore_memory, engine, threads and fuse are read.
        files: the local files of `spec`; they are fetched if not given.

    Raises:
        UserError: a file, the device or the memory does not allow it.
    """
    device = choose_device(options.device)
    prepare_allocator(device)
    files = files or hub.fetch(spec)
    heads = str(files.heads) if files.heads else None
    local = replace(spec, backbone=str(files.backbone), heads=heads)
    choice = choose_step(local, device, options)
    if choice.native and spec.quant == "auto" and is_quantized(files.backbone):
        spec = replace(spec, quant="int8")  # nearer to what the file has than 16 bits
        local = replace(local, quant="int8")
    if not options.ignore_memory:
        width = choice.dtype.itemsize
        load = plans.load_of(spec, str(device), options.context, width, native=choice.native)
        memory.check(local, load)
    with frugal_heap():
        loaded = _load(spec, local, device, choice, options)
    return replace(loaded, notices=(*files.notices, *loaded.notices))


def _load(
    spec: ModelSpec,
    local: ModelSpec,
    device: torch.device,
    choice: StepChoice,
    options: LoadOptions,
) -> Loaded:
    """Load `spec` from the files that `local` names, stage by stage.

    The stages: read and quantize the backbone, join its layers, read the heads, lay out all for
    the device. The native step's layout quantizes and joins by itself.
    """
    notices = [*choice.notices]
    model, tokenizer = load_pretrained(local, choice.dtype, choice.quant, device, notices)
    if choice.dtype == torch.float16 and model.config.model_type.startswith("gemma"):
        notices.append("Gemma models overflow in float16: --dtype float32 does not")
    template = template_or_plain(tokenizer, spec, notices, options.raw)
    if options.fuse and not choice.native and join_linears(model):
        prepare_4bit(model, device, choice.dtype)  # joined layers are new ones
    backbone = Backbone(model, own_attention=choice.native)
    file = heads_file(local)
    read = _read_heads(file, backbone, spec.layout) if file else None
    heads: Heads | None
    if choice.native:
        plain = read.heads if read else None
        heads = pack_native(backbone, plain, spec.quant, spec.quant_heads, options)
    else:
        heads = _lay_out(backbone, read, spec.quant_heads, device)
    if read:
        notices += read.notices
    accuracy = _accuracy_file(spec, file) if file else None
    return Loaded(backbone, heads, tokenizer, template, accuracy, tuple(notices))


def _read_heads(file: Path, backbone: Backbone, layout: str) -> ReadHeads:
    return read_heads(
        file,
        backbone.hidden_size,
        backbone.vocabulary,
        dtype=backbone.dtype,
        lm_head=getattr(backbone.lm_head, "weight", None),
        layout=layout,
    )


def _lay_out(
    backbone: Backbone, read: ReadHeads | None, quant_heads: str, device: torch.device
) -> Heads | None:
    """Bring backbone and heads into the form in which torch decodes fastest on a device."""
    heads = None
    if read:
        quant = as_quant(quant_heads)
        heads = decoding_heads(read.heads, quant, device, backbone.dtype, backbone.lm_head)
    pack_linears(backbone.model)  # after the heads, which may copy the LM head's plain weights
    detach_from_files(backbone.model)
    return heads


def _accuracy_file(spec: ModelSpec, heads: Path) -> Path:
    """Return the accuracies that were measured here, else those published with the heads."""
    own = hub.accuracy_file(spec)
    published = model_folder(heads) / ACCURACY_FILE
    return published if published.exists() and not own.exists() else own


def heads_file(spec: ModelSpec) -> Path | None:
    """Find the file of a spec's heads, or the index of its shards.

    Returns:
        The path; None if the spec names no heads and the backbone's folder holds none.

    Raises:
        UserError: the spec names heads, and there are none.
    """
    place = hub.local(spec.heads, "heads") if spec.heads else hub.backbone_of(spec)
    if place.is_file():
        return place
    file = find_heads(place)
    if file is None and spec.heads:
        raise UserError(
            f"there are no Medusa heads in {spec.heads}: no {HEADS_FILE}, nor a file of another"
            " layout"
        )
    return file
