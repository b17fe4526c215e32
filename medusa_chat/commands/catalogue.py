"""The models that --model knows by name, with sizes, memory and measured accuracies. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from medusa_chat.config import BUNDLED, ModelSpec
from medusa_chat.decoding.trees.accuracy import read_accuracy
from medusa_chat.hub.fetch import accuracy_file, is_here
from medusa_chat.hub.model_list import known_models
from medusa_chat.machine.contents import Contents, contents_of
from medusa_chat.machine.devices import free_memory, likely_device
from medusa_chat.machine.memory import shortage
from medusa_chat.machine.plans import load_of, plan
from medusa_chat.native.library import likely


@dataclass(frozen=True)
class Listed:
    """One model of the list. Sizes are in bytes; None is unknown.

    Attributes:
        download: size of the files that the hub would send; 0 if they are on this machine.
        device: the device that would compute.
        needs: memory on `device`, with the entry's quantization.
        short: missing memory; 0 if the model fits.
        short_of: the device that lacks memory; a load on a GPU also needs some of the host's.
        top1: for each head, the share of steps in which its first guess is right, if measured.
    """

    name: str
    backbone: str
    heads: str | None
    licence: str
    description: str
    quant: str
    quant_heads: str
    download: int | None
    device: str
    needs: int | None
    short: int | None
    short_of: str | None
    top1: tuple[float, ...]


def catalogue(models: Path | None = None) -> list[Listed]:
    """Return all models that --model knows, compared with the memory that is free now.

    Args:
        models: a list that replaces the user's own.
    """
    device = likely_device()
    free = {name: free_memory(name) for name in {device, "cpu"}}
    return [_listed(spec, device, free) for spec in known_models(models).values()]


def _listed(spec: ModelSpec, device: str, free: dict[str, int]) -> Listed:
    contents = contents_of(spec)
    load = load_of(spec, device, native=likely(device, "auto"))
    needs = short = short_of = None
    if contents is not None:
        needs = plan(contents, load).total
        lack = shortage(contents, load, free)
        short = max(lack.missing, 0)
        short_of = lack.device if short else None
    return Listed(
        name=spec.name,
        backbone=spec.backbone,
        heads=spec.heads,
        licence=spec.licence,
        description=spec.description,
        quant=load.quant,
        quant_heads=load.quant_heads,
        download=_download(spec, contents),
        device=device,
        needs=needs,
        short=short,
        short_of=short_of,
        top1=_top1(spec),
    )


def _download(spec: ModelSpec, contents: Contents | None) -> int | None:
    if _folder(spec.backbone).is_dir() and (spec.heads is None or Path(spec.heads).exists()):
        return 0
    if spec.mirror and spec.heads is None and is_here(spec):
        return 0
    if contents is None:
        return None
    weights = contents.layers + contents.plain + contents.heads
    return 2 * weights + contents.packed  # the hub's files are in 16 bits


def _top1(spec: ModelSpec) -> tuple[float, ...]:
    accuracy = read_accuracy(accuracy_file(replace(spec, backbone=str(_folder(spec.backbone)))))
    return tuple(row[0] for row in accuracy.top) if accuracy else ()


def _folder(backbone: str) -> Path:
    return BUNDLED if backbone == "bundled" else Path(backbone)
