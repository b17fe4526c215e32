"""Chat with a local model that decodes several tokens per step, and shows how.

cli.py, commands/    the command line                 config.py, sampling.py, settings*.py
decoding/            the engine                       events.py, stats.py     steps and figures
model/, native/      backbone, heads, cache, kernels  prompts.py              files of prompts
hub/                 downloads, the list of models    shapes.py               sizes of known models
machine/             devices and memory               text.py, files.py       small helpers
training/, export/   making and converting heads      terminal/               chat and reports
bench/               measuring                        bundled/                the model that ships
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_chat.config import LoadOptions, ModelSpec, UserError
from medusa_chat.sampling import Sampling
from medusa_chat.settings import make
from medusa_chat.version import __version__

if TYPE_CHECKING:
    from medusa_chat.decoding.engine import Engine
    from medusa_chat.hub.fetch import Files, Progress

__all__ = ["LoadOptions", "Sampling", "UserError", "__version__", "load"]


def load(
    model: str | None = None,
    heads: str | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Engine:
    """Load a model with its Medusa heads.

    Args:
        model: a name of models.yaml, a folder or a hub id; None is the bundled model.
        heads: a file, folder or hub id; None takes the heads in the backbone's folder.
        progress: called during a download with the repository, bytes present and bytes in all.
        options: fields of LoadOptions by name, such as quant="nf4" or context=4096.

    Raises:
        UserError: an option, a file, the network or the memory is at fault; one line says how.
    """
    from platformdirs import user_cache_path

    from medusa_chat.hub.model_list import resolve_model

    given = make(LoadOptions, options)
    spec = resolve_model(model, heads, given.quant, given.quant_heads, given.models, given.template)
    files = _fetch(spec, given, progress)  # before torch, so that its bar shows at once

    from medusa_chat.decoding.engine import Engine
    from medusa_chat.decoding.trees.accuracy import read_accuracy
    from medusa_chat.model.loading import load_model

    loaded = load_model(spec, given, files)
    measured = loaded.accuracy if given.measured else None
    engine = Engine(
        loaded.backbone,
        loaded.heads,
        loaded.tokenizer,
        replace(given, tree=spec.tree if given.tree == "auto" else given.tree),
        name=spec.name,
        system=spec.system,
        template=loaded.template,
        costs=user_cache_path("medusa-chat") / "step-costs",
        accuracy=read_accuracy(measured) if measured else None,
    )
    engine.notices[:0] = loaded.notices
    return engine


def _fetch(spec: ModelSpec, options: LoadOptions, progress: Progress | None) -> Files:
    """Download a spec's files, after everything that can be refused before the download."""
    from medusa_chat.hub.fetch import fetch
    from medusa_chat.machine import memory, plans
    from medusa_chat.machine.devices import likely_device
    from medusa_chat.model.templates import named_template
    from medusa_chat.native.library import likely

    if spec.template:
        named_template(spec.template)
    if not options.ignore_memory and not Path(spec.backbone).exists():
        # load_model checks again: only then the files' sizes and the number format are known.
        device = likely_device(options.device)
        native = likely(device, options.engine)
        memory.check(spec, plans.load_of(spec, device, options.context, native=native))
    return fetch(spec, progress)
