"""The models that --model knows by name, with sizes, memory and measured accuracies. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from medusa_chat.config import BUNDLED, ModelSpec
from medusa_chat.decoding.trees.accuracy import read_accuracy
from medusa_chat.hub.fetch import accuracy_file
from medusa_chat.hub.model_list import read_registry
from medusa_chat.machine.contents import Contents, contents_of
from medusa_chat.machine.devices import free_memory, likely_device
from medusa_chat.machine.memory import load_of, plan, shortage


@dataclass(frozen=True)
class Listed:
    """One model of the list. What is not known is None; sizes are bytes.

    Attributes:
        download: of the files that the hub would send; 0 where they are here.
        needs: memory on `device`, quantized as the entry says; short: how much of it is missing, 0 where it fits.
        short_of: the device whose memory does not suffice: a load on a GPU needs some of the host's too.
        top1: share of the steps in which each head's first guess is right, if calibrate measured it.
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
    """All models that --model knows, with what is free on this machine now; `models`: the user's own list."""
    device = likely_device()
    free = {name: free_memory(name) for name in {device, "cpu"}}
    return [_listed(spec, device, free) for spec in read_registry(models).values()]


def _listed(spec: ModelSpec, device: str, free: dict[str, int]) -> Listed:
    contents, load = contents_of(spec), load_of(spec, device)
    needs = short = short_of = None
    if contents is not None:
        needs = plan(contents, load).total
        lacking, _, missing = shortage(contents, load, free)
        short, short_of = max(missing, 0), lacking if missing > 0 else None
    return Listed(
        spec.name,
        spec.backbone,
        spec.heads,
        spec.licence,
        spec.description,
        load.quant,
        load.quant_heads,
        _download(spec, contents),
        device,
        needs,
        short,
        short_of,
        _top1(spec),
    )


def _download(spec: ModelSpec, contents: Contents | None) -> int | None:
    """The hub's files are in 16 bits."""
    if _folder(spec.backbone).is_dir() and (spec.heads is None or Path(spec.heads).exists()):
        return 0
    if contents is None:
        return None
    return (contents.layers + contents.plain + contents.heads) * 2 + contents.packed


def _top1(spec: ModelSpec) -> tuple[float, ...]:
    accuracy = read_accuracy(accuracy_file(replace(spec, backbone=str(_folder(spec.backbone)))))
    return tuple(row[0] for row in accuracy.top) if accuracy else ()


def _folder(backbone: str) -> Path:
    return BUNDLED if backbone == "bundled" else Path(backbone)
