"""What training a model, or having it answer in batches, takes for certain: told before it is loaded. No torch.

Activations are not counted: they depend on the batch, and --gradient-checkpointing trades them for time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from medusa_chat.config import ModelSpec, Recipe
from medusa_chat.hub import fetch as hub
from medusa_chat.machine import memory
from medusa_chat.machine.contents import Contents, contents_of

TRAINED = 4  # bytes of a number that is trained, of its gradient, and of each of Adam's two moments

Needs = Mapping[str, Mapping[str, int]]  # by device: bytes by what they are for
Fits = Callable[[Needs], bool]


def check_training(spec: ModelSpec, recipe: Recipe, device: str, width: int, given: bool) -> None:
    """Have a model's files here; raise UserError if it cannot be trained: before the download where that is known.

    Args:
        width: bytes of a number of a backbone that is frozen and not quantized.
        given: the spec's heads are where to start, in place of new ones.
    """

    def check(contents: Contents) -> None:
        def needs(changed: Recipe) -> Needs:
            return training_needs(
                contents, changed, device, width, contents.heads if given else None
            )

        def advice(fits: Fits) -> list[str]:
            helps = [
                flag
                for flag, other in _savings(recipe, contents, given).items()
                if fits(needs(other))
            ]
            return [flag for flag in helps if " with " not in flag] or helps

        _refuse(f"{spec.name} with recipe {recipe.name}", needs(recipe), device, advice)

    _check_and_fetch(spec if given else replace(spec, heads=None), check)


def check_answers(spec: ModelSpec, device: str, batch: int, new_tokens: int) -> None:
    """The same for a backbone that answers `batch` conversations at once, in up to `new_tokens` tokens each."""

    def check(contents: Contents) -> None:
        def needs(size: int) -> Needs:
            return answer_needs(contents, device, size * new_tokens)

        def advice(fits: Fits) -> list[str]:
            smaller = (batch >> halvings for halvings in range(1, batch.bit_length()))
            return [f"--batch {size}" for size in smaller if fits(needs(size))][:1]

        _refuse(f"{spec.name} with {batch} replies at once", needs(batch), device, advice)

    _check_and_fetch(replace(spec, heads=None), check)


def training_needs(
    contents: Contents, recipe: Recipe, device: str, width: int, heads: int | None = None
) -> Needs:
    """What a recipe takes.

    Args:
        heads: weights of the heads that it starts from; None for new ones.
    """
    shape = contents.shape
    backbone = shape.parameters if contents.packed else contents.layers + contents.plain
    if heads is None:
        own = recipe.owns_lm_heads(shape.embedding_parameters, backbone)
        heads = recipe.heads * recipe.layers * shape.hidden * (shape.hidden + 1)
        heads += recipe.heads * shape.embedding_parameters if own else 0
    trained = heads + (backbone if recipe.whole else 0)
    trained += shape.adapter_parameters(recipe.lora_rank) if recipe.joint else 0
    parts = {
        "weights": TRAINED * trained
        + (0 if recipe.whole else _weights(contents, recipe.quant, width)),
        "Adam's moments": 2 * TRAINED * trained,
        "gradients": TRAINED * trained,
    }
    # Heads, and after them a backbone with its adapter merged, are written from a copy on the host in full precision.
    written = TRAINED * max(heads, backbone if recipe.joint else 0)
    if device == "cpu" and written > parts["gradients"]:
        del parts["gradients"]  # they are gone by then
        parts["the copy that is written"] = written
    return _with_program(contents, device, parts, written)


def answer_needs(contents: Contents, device: str, tokens: int) -> Needs:
    """What a backbone takes, as its files are, with a cache of so many tokens."""
    parts = {"weights": _weights(contents, "none", 2), "cache": contents.shape.cache_bytes(tokens)}
    return _with_program(contents, device, parts, 0)


def _weights(contents: Contents, quant: str, width: int) -> int:
    return (
        memory.weight_bytes(contents.layers, quant, width)
        + contents.plain * width
        + contents.packed
    )


def _with_program(contents: Contents, device: str, parts: Mapping[str, int], written: int) -> Needs:
    """The parts with the program itself; for a GPU what the host needs besides."""
    if device == "cpu":
        return {device: {**parts, "program": memory.PROCESS["cpu"]}}
    host = memory.host_plan(replace(contents, heads=0), memory.Load(device))
    passing = (
        {"the copy that is written": written}
        if written > host.workspace
        else {"loading": host.workspace}
    )
    return {
        device: {**parts, "libraries": memory.GPU_LIBRARIES},
        "cpu": {**passing, "program": host.process},
    }


def _savings(recipe: Recipe, contents: Contents, given: bool) -> dict[str, Recipe]:
    """The recipes that need less, by the flags that make them, least harm first; the last has all of these."""
    changes: dict[str, dict[str, Any]] = {}
    if recipe.whole:
        changes[f"--lora-rank {Recipe.lora_rank}"] = {"lora_rank": Recipe.lora_rank}
    if recipe.quant in ("none", "int8") and not contents.packed:
        changes["--quant nf4"] = {"quant": "nf4"}
    if recipe.lm_heads != "shared" and not given:
        changes["--lm-heads shared"] = {"lm_heads": "shared"}
    found: dict[str, Recipe] = {}
    together: dict[str, Any] = {}
    for flag, change in changes.items():
        together |= change
        if not (recipe.whole and "quant" in change):  # only with an adapter
            found[flag] = replace(recipe, **change)
    if together:
        found[" with ".join(changes)] = replace(recipe, **together)
    return found


def _refuse(what: str, needs: Needs, device: str, advice: Callable[[Fits], list[str]]) -> None:
    """Raise UserError if the needs are not met; `advice` tells flags, given what tells whether their needs are."""
    free = memory.free_on(device)

    def lacking(needed: Needs) -> tuple[str, int, int]:
        return memory.lacking({name: sum(parts.values()) for name, parts in needed.items()}, free)

    short = lacking(needs)
    if short[2] > 0:
        parts = ", ".join(
            f"{memory.gigabytes(size)} for {name}" for name, size in needs[short[0]].items()
        )
        found = advice(lambda other: lacking(other)[2] <= 0)
        raise memory.complaint(what, short, found, counted=f" ({parts}, activations aside)")


def _check_and_fetch(spec: ModelSpec, check: Callable[[Contents], None]) -> None:
    """Check what is known of a model before its files are here, and what they hold."""
    if not Path(spec.backbone).exists() and (told := contents_of(spec)):
        check(told)
    files = hub.fetch(spec)
    here = replace(
        spec, backbone=str(files.backbone), heads=str(files.heads) if files.heads else None
    )
    if found := contents_of(here):
        check(found)
