"""Whether a load fits the memory, and what would make it fit. No torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from medusa_chat.config import MAX_CONTEXT, MemoryShortageError, ModelSpec
from medusa_chat.hub.model_list import packaged_file, read_models
from medusa_chat.machine.contents import Contents, contents_of
from medusa_chat.machine.devices import free_memory
from medusa_chat.machine.plans import GB, Load, host_plan, load_of, plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STEP = 64  # granularity of a proposed context
SMALLEST_CONTEXT = 256  # a shorter one is too short to chat


class Shortage(NamedTuple):
    """A device, the bytes needed on it, and how many of them are missing (0 or less: it fits)."""

    device: str
    needed: int
    missing: int


def shortage(contents: Contents, load: Load, free: Mapping[str, int]) -> Shortage:
    """Return the worst shortage of a load.

    Args:
        contents: weights of the model.
        load: how to load it.
        free: bytes free by device: that of the load, and `cpu`.
    """
    needs = {load.device: plan(contents, load).total}
    if load.device != "cpu":
        needs["cpu"] = host_plan(contents, load).total
    return lacking(needs, free)


def lacking(needs: Mapping[str, int], free: Mapping[str, int]) -> Shortage:
    """Return the worst shortage, given the bytes needed and the bytes free on each device."""
    device = max(needs, key=lambda name: needs[name] - free[name])
    return Shortage(device, needs[device], needs[device] - free[device])


def free_on(device: str) -> dict[str, int]:
    """Return the bytes free on a device and on the host."""
    return {name: free_memory(name) for name in {device, "cpu"}}


def complaint(
    what: str, short: tuple[str, int, int], advice: Sequence[str], counted: str = ""
) -> MemoryShortageError:
    """Return the error for a load or a training that does not fit.

    Args:
        what: its name.
        short: its Shortage.
        advice: changes that would make it fit, each by itself.
        counted: the parts of the needed bytes.
    """
    device, needed, missing = short
    remedy = " or ".join(advice) or "nothing that medusa-chat can change"
    return MemoryShortageError(
        f"{what} needs {gigabytes(needed)}{counted}, {gigabytes(needed - missing)} free on"
        f" {device}, {gigabytes(missing)} short; {remedy} would make it fit;"
        " --ignore-memory goes on all the same",
        missing,
    )


def gigabytes(size: int) -> str:
    """Format bytes in GB, whatever their number, so that the sizes in one line compare."""
    return f"{size / GB:.1f} GB"


def check(spec: ModelSpec, load: Load) -> None:
    """Raise UserError if a load needs more memory than is free, with what would make it fit.

    A model of unknown size passes.
    """
    contents = contents_of(spec)
    if contents is None:
        return
    free = free_on(load.device)
    short = shortage(contents, load, free)
    if short.missing > 0:
        raise complaint(spec.name, short, remedies(contents, load, free))


def remedies(contents: Contents, load: Load, free: Mapping[str, int]) -> list[str]:
    """Return flags that would make a load fit: one change each, else all together."""
    changes: dict[str, dict[str, Any]] = {}
    if load.quant in ("none", "int8") and not contents.packed:
        changes["--quant nf4"] = {"quant": "nf4"}
    if load.quant_heads in ("none", "int8") and contents.heads:
        changes["--quant-heads nf4"] = {"quant_heads": "nf4"}
    found = [
        flag for flag, change in changes.items() if _fits(contents, replace(load, **change), free)
    ]
    if context := _longest_context(contents, load, free):
        found.append(f"--max-context {context}")
    if changes and not found:
        found = _all_together(contents, load, free, changes)
    smaller = _smaller_model(contents, load, free)
    return [*found, f"--model {smaller}"] if smaller else found


def _fits(contents: Contents, load: Load, free: Mapping[str, int]) -> bool:
    return shortage(contents, load, free).missing <= 0


def _all_together(
    contents: Contents, load: Load, free: Mapping[str, int], changes: Mapping[str, dict[str, Any]]
) -> list[str]:
    for change in changes.values():
        load = replace(load, **change)
    if _fits(contents, load, free):
        return [" with ".join(changes)]
    if context := _longest_context(contents, load, free):
        return [" with ".join([*changes, f"--max-context {context}"])]
    return []


def _longest_context(contents: Contents, load: Load, free: Mapping[str, int]) -> int:
    """Return the longest context that fits; 0 if none shorter than the load's does."""
    asked = load.context or min(contents.shape.context, MAX_CONTEXT)
    low = SMALLEST_CONTEXT // STEP - 1
    high = (asked - 1) // STEP
    while low < high:
        middle = (low + high + 1) // 2
        if _fits(contents, replace(load, context=middle * STEP), free):
            low = middle
        else:
            high = middle - 1
    return low * STEP if low * STEP >= SMALLEST_CONTEXT else 0


def _smaller_model(contents: Contents, load: Load, free: Mapping[str, int]) -> str | None:
    """Return the largest shipped model that is smaller and fits with its own entry's settings."""
    found: dict[str, int] = {}
    for name, spec in read_models(packaged_file()).items():
        other = contents_of(spec)
        if other is None or other.layers >= contents.layers or not spec.tried:
            continue
        if _fits(other, load_of(spec, load.device, None, load.width, native=load.native), free):
            found[name] = other.layers
    return max(found, key=lambda name: found[name], default=None)
