"""Memory that training, or answering in batches, needs at least, before anything is loaded.

Activations do not count: they depend on the batch, and --gradient-checkpointing trades them for
time. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from medusa_chat.config import ModelSpec, Recipe
from medusa_chat.hub import fetch as hub
from medusa_chat.machine import memory, plans
from medusa_chat.machine.contents import Contents, contents_of
from medusa_chat.machine.plans import GPU_LIBRARIES

# Bytes of a trained number, of its gradient, and of each of Adam's two moments.
TRAINED_BYTES = 4

Needs = Mapping[str, Mapping[str, int]]  # by device: bytes by their use
Fits = Callable[[Needs], bool]


def check_training(spec: ModelSpec, recipe: Recipe, device: str, width: int, given: bool) -> None:
    """Fetch a model's files. Raises UserError if the memory does not suffice to train it.

    The error comes before the download if the model's sizes are known. `width` is the bytes of a
    number of a backbone that is frozen and not quantized. With `given` training starts from the
    spec's heads.
    """

    def check(contents: Contents) -> None:
        heads = contents.heads if given else None

        def needs(changed: Recipe) -> Needs:
            return training_needs(contents, changed, device, width, heads)

        def advice(fits: Fits) -> list[str]:
            savings = _savings(recipe, contents, given)
            helping = [flags for flags, changed in savings.items() if fits(needs(changed))]
            return [flags for flags in helping if " with " not in flags] or helping

        _refuse(f"{spec.name} with recipe {recipe.name}", needs(recipe), device, advice)

    _check_and_fetch(spec if given else replace(spec, heads=None), check)


def check_answers(spec: ModelSpec, device: str, batch: int, new_tokens: int) -> None:
    """Like `check_training`, for a backbone that answers `batch` conversations at once."""

    def check(contents: Contents) -> None:
        def needs(size: int) -> Needs:
            return answer_needs(contents, device, size * new_tokens)

        def advice(fits: Fits) -> list[str]:
            smaller = [batch >> halvings for halvings in range(1, batch.bit_length())]
            return [f"--batch {size}" for size in smaller if fits(needs(size))][:1]

        _refuse(f"{spec.name} with {batch} replies at once", needs(batch), device, advice)

    _check_and_fetch(replace(spec, heads=None), check)


def training_needs(
    contents: Contents, recipe: Recipe, device: str, width: int, heads: int | None = None
) -> Needs:
    """Bytes that a recipe needs. `heads` counts the weights to start from; None for new ones."""
    shape = contents.shape
    backbone = shape.parameters if contents.packed else contents.layers + contents.plain
    bias = _new_bias(contents, recipe, given=heads is not None)
    alone = bias > 0 and heads is not None and not recipe.joint
    if heads is None:
        heads = _new_heads(contents, recipe, backbone)
    trained = bias if alone else heads + bias
    frozen = TRAINED_BYTES * heads if alone else 0
    if recipe.whole:
        trained += backbone
    else:
        frozen += _weights(contents, recipe.quant, width)
    if recipe.joint:
        trained += shape.adapter_parameters(recipe.lora_rank)
    parts = {
        "weights": TRAINED_BYTES * trained + frozen,
        "Adam's moments": 2 * TRAINED_BYTES * trained,
        "gradients": TRAINED_BYTES * trained,
    }
    # Heads, and after them a backbone with its adapter merged, are written from a copy on the
    # host in full precision. The gradients are gone by then.
    written = TRAINED_BYTES * max(heads + bias, backbone if recipe.joint else 0)
    if device == "cpu" and written > parts["gradients"]:
        del parts["gradients"]
        parts["the copy that is written"] = written
    return _with_program(contents, device, parts, written)


def _new_heads(contents: Contents, recipe: Recipe, backbone: int) -> int:
    """Weights of new heads, but for their parent bias."""
    shape = contents.shape
    heads = recipe.heads * recipe.layers * shape.hidden * (shape.hidden + 1)
    lm_head = (recipe.head_vocabulary or shape.vocabulary) * shape.hidden
    if recipe.owns_lm_heads(lm_head, backbone):
        heads += recipe.heads * lm_head
    return heads


def _new_bias(contents: Contents, recipe: Recipe, *, given: bool) -> int:
    """Weights of a new parent bias; given heads may have one, or a vocabulary, already."""
    if given and contents.parent_bias:
        return 0
    ranked = contents.head_tokens if given else recipe.head_vocabulary
    rows = 2 * ranked + 1 if ranked else 2 * contents.shape.vocabulary
    return recipe.parent_bias * rows


def answer_needs(contents: Contents, device: str, tokens: int) -> Needs:
    """Bytes that a backbone needs in the precision of its files, with a cache of `tokens`."""
    parts = {"weights": _weights(contents, "none", 2), "cache": contents.shape.cache_bytes(tokens)}
    return _with_program(contents, device, parts, 0)


def _weights(contents: Contents, quant: str, width: int) -> int:
    layers = plans.weight_bytes(contents.layers, quant, width)
    return layers + contents.plain * width + contents.packed


def _with_program(contents: Contents, device: str, parts: Mapping[str, int], written: int) -> Needs:
    """Add the program itself, and for a GPU the needs of the host."""
    if device == "cpu":
        return {device: {**parts, "program": plans.PROCESS["cpu"]}}
    host = plans.host_plan(replace(contents, heads=0), plans.Load(device))
    passing = {"loading": host.workspace}
    if written > host.workspace:
        passing = {"the copy that is written": written}
    return {
        device: {**parts, "libraries": GPU_LIBRARIES},
        "cpu": {**passing, "program": host.process},
    }


def _savings(recipe: Recipe, contents: Contents, given: bool) -> dict[str, Recipe]:
    """Recipes that need less memory, by their flags, the least harmful first. The last has all."""
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
        if not (recipe.whole and "quant" in change):  # needs an adapter
            found[flag] = replace(recipe, **change)
    if together:
        found[" with ".join(changes)] = replace(recipe, **together)
    return found


def _refuse(what: str, needs: Needs, device: str, advice: Callable[[Fits], list[str]]) -> None:
    """Raise UserError if the needs are not met.

    `advice` gets a function that tests needs, and returns the flags that help.
    """
    free = memory.free_on(device)

    def lacking(needed: Needs) -> tuple[str, int, int]:
        return memory.lacking({name: sum(parts.values()) for name, parts in needed.items()}, free)

    short = lacking(needs)
    if short[2] > 0:
        sizes = [f"{memory.gigabytes(size)} for {name}" for name, size in needs[short[0]].items()]
        found = advice(lambda other: lacking(other)[2] <= 0)
        counted = f" ({', '.join(sizes)}, activations aside)"
        raise memory.complaint(what, short, found, counted=counted)


def _check_and_fetch(spec: ModelSpec, check: Callable[[Contents], None]) -> None:
    """Check a model's known sizes, fetch its files, and check the sizes in the files."""
    if not Path(spec.backbone).exists() and (known := contents_of(spec)):
        check(known)
    files = hub.fetch(spec)
    heads = str(files.heads) if files.heads else None
    local = replace(spec, backbone=str(files.backbone), heads=heads)
    if found := contents_of(local):
        check(found)
