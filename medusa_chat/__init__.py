"""medusa-chat: chat with a local model that decodes several tokens per step, and shows how."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from medusa_chat.config import LoadOptions, ModelSpec, Sampling, UserError
from medusa_chat.version import __version__

if TYPE_CHECKING:
    from medusa_chat.decoding.engine import Engine
    from medusa_chat.hub.fetch import Files, Progress

__all__ = ["Sampling", "UserError", "__version__", "load"]


def load(
    model: str | None = None,
    heads: str | None = None,
    *,
    device: str = "auto",
    quant: str = "auto",
    quant_heads: str = "auto",
    dtype: str | None = None,
    tree: str = "auto",
    context: int | None = None,
    models: Path | None = None,
    ignore_memory: bool = False,
    probing: bool = True,
    measured: bool = True,
    copies: bool = True,
    template: str = "",
    progress: Progress | None = None,
    eager: bool | None = None,
    fuse: bool = True,
) -> Engine:
    """Load a model with its Medusa heads.

    Args:
        model: a name of models.yaml, a folder or a hub id; None is the bundled model.
        heads: a file, folder or hub id, in any public layout; None looks beside the backbone. Hub ids may end in
            @revision.
        quant, quant_heads: none, nf4, nf4-double or int8 for the backbone and the heads; auto is what models.yaml
            says, else none.
        device: auto, cpu, cuda or mps; dtype: float32, bfloat16, float16, or None for what suits the device.
        tree: auto, retune (auto, with steps timed anew), dynamic-N, static-N, chain-N, a released tree by name, or a
            JSON file.
        context: tokens that prompt and reply may hold together; None is what the model was made for.
        models: the user's own list of models, in place of models.yaml in the folder for settings.
        ignore_memory: load even where less memory is free than the model should need.
        probing: take a vanilla step now and then, so that Stats knows the speedup.
        copies: copy guesses from the conversation too.
        measured: choose and forecast trees by what `medusa-chat calibrate` measured, if it did.
        template: a conversation template of fastchat by name, in place of the model's own.
        eager: take every step operation by operation; by default only where a step cannot be captured as CUDA graphs.
        fuse: join matmuls that read the same rows; off only to measure what that brings.
        progress: is called while something is downloaded: repository, bytes there, bytes in all.

    Raises:
        UserError: whatever the user can put right, in one line.
    """
    from platformdirs import user_cache_path

    from medusa_chat.hub.model_list import resolve_model

    spec = resolve_model(model, heads, quant, quant_heads, models, template)
    files = _fetch(
        spec, device, context, ignore_memory, progress
    )  # before torch is imported: it is seen at once
    from medusa_chat.config import LoadOptions
    from medusa_chat.decoding.engine import Engine
    from medusa_chat.decoding.trees.accuracy import read_accuracy
    from medusa_chat.model.loading import load_model

    options = LoadOptions(
        device=device,  # type: ignore[arg-type]
        dtype=dtype or "auto",  # type: ignore[arg-type]
        context=context,
        ignore_memory=ignore_memory,
        fuse=fuse,
    )
    loaded = load_model(spec, options, files)
    engine = Engine(
        loaded.backbone,
        loaded.heads,
        loaded.tokenizer,
        LoadOptions(
            tree=spec.tree if tree == "auto" else tree,
            context=context,
            probing=probing,
            copies=copies,
            eager=eager,
        ),
        name=spec.name,
        system=spec.system,
        template=loaded.template,
        costs=user_cache_path("medusa-chat") / "step-costs",
        accuracy=read_accuracy(loaded.accuracy) if loaded.accuracy and measured else None,
    )
    engine.notices[:0] = loaded.notices
    return engine


def _fetch(
    spec: ModelSpec,
    device: str,
    context: int | None,
    ignore_memory: bool,
    progress: Progress | None,
) -> Files:
    """Have a spec's files here; a slip of the template's name and what can't fit are told before the download."""
    from medusa_chat.hub.fetch import fetch
    from medusa_chat.machine import memory
    from medusa_chat.machine.devices import likely_device
    from medusa_chat.model.templates import named_template

    if spec.template:
        named_template(spec.template)
    if not ignore_memory and not Path(spec.backbone).exists():
        memory.check(spec, memory.load_of(spec, likely_device(device), context))
    return fetch(spec, progress)
