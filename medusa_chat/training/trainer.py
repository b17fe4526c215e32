"""`medusa-chat train`: Medusa heads for the user's own model, on transformers' Trainer."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from transformers.trainer_callback import PrinterCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from medusa_chat.config import ModelSpec, Recipe, UserError
from medusa_chat.files import digest, resolved, write_json
from medusa_chat.hub.model_list import resolve_model
from medusa_chat.locks import only_writer
from medusa_chat.machine.devices import choose_dtype
from medusa_chat.model.loading import heads_file
from medusa_chat.model.pretrained import load_pretrained
from medusa_chat.model.templates import ChatTemplate, named_template, resolve_template
from medusa_chat.training.checkpoints import SETTINGS_FILE, begin, is_last, reported_failures
from medusa_chat.training.data import Document, PackedRows, encode, read_documents
from medusa_chat.training.kept_states import KeptRows, drop_states, kept_rows
from medusa_chat.training.memory import check_training
from medusa_chat.training.native_states import NativeReader
from medusa_chat.training.optimization import MedusaTrainer, trained_weights, training_arguments
from medusa_chat.training.outputs import perplexity_of, save_backbone, save_heads
from medusa_chat.training.progress import LOG_FILE, ProgressLog
from medusa_chat.training.starting import check_resumed, coverage, describe, first_heads
from medusa_chat.training.stopping import Stopper
from medusa_chat.training.trainee import Trainee, adapt, checkpoint_activations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from transformers import TrainingArguments

    from medusa_chat.events import TrainStep

HELD_OUT = 0.02  # share of the documents to measure perplexity on, if no others are given


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        model: name, folder or hub id of the backbone.
        data: files to train on.
        out: folder for the result.
        heads: file, folder or hub id of heads to start from, in place of new ones.
        held_out: files to measure perplexity on; without them, some documents of `data`.
        models: the user's own model list.
        template: a conversation template of fastchat, in place of the model's own.
        ignore_memory: begin even if less memory is free than the run needs.
    """

    model: str
    data: tuple[Path, ...]
    out: Path
    recipe: Recipe
    heads: str | None = None
    held_out: tuple[Path, ...] = ()
    resume: bool = False
    models: Path | None = None
    ignore_memory: bool = False
    template: str = ""

    def settings(self) -> dict[str, Any]:
        """The settings that a resumed run must have in common with the one before."""
        recipe = asdict(self.recipe)
        for name in ("save_every", "keep_hidden"):  # change no weight
            del recipe[name]
        read = [*self.data, *(self.held_out if self.recipe.joint else ())]
        return {
            "model": self.model,
            "heads_from": self.heads,
            "data": [str(path) for path in self.data],
            "held_out": [str(path) for path in self.held_out],
            "template": self.template or None,
            "recipe": recipe.pop("name"),
            **recipe,
            "digests": {str(path): digest(path) for path in read},
        }


def train(run: Run, progress: Callable[[TrainStep], None], say: Callable[[str], None]) -> bool:
    """Train by a recipe and write the result to `run.out`: heads, and a trained backbone.

    `progress` gets the figures, `say` lines for the user.

    Returns:
        True if this process wrote the result. `accelerate launch` starts several processes, and
        the first one writes.

    Raises:
        UserError: the model, the data or `out` cannot be used, the loss is not a number, disk or
            memory do not suffice, or the user stopped the run.
    """
    spec = _checked_spec(run)
    texts = split_documents(run)  # before the model, which may take long to load
    first = os.environ.get("RANK", "0") == "0"
    run.out.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(run.out, "another run") if first else nullcontext():
        return _train(run, spec, texts, progress, say)


def _train(
    run: Run,
    spec: ModelSpec,
    texts: tuple[list[Document], list[Document]],
    progress: Callable[[TrainStep], None],
    say: Callable[[str], None],
) -> bool:
    documents, held_out = texts
    recipe = replace(run.recipe, heads_first=0.0) if run.heads else run.recipe
    dtype = choose_dtype(torch.device("cuda" if torch.cuda.is_available() else "cpu"), None)
    arguments = training_arguments(run.out / "checkpoints", recipe, dtype)
    device = arguments.device
    if recipe.whole:
        dtype = torch.float32
    first = bool(arguments.process_index == 0)
    if not first:
        say = _ignore
    with arguments.main_process_first(local=False):
        checkpoint = begin(run.out, run.settings(), run.resume, first, say)
        if not run.ignore_memory:
            check_training(spec, recipe, str(device), dtype.itemsize, bool(run.heads))
    torch.manual_seed(recipe.seed)
    trainee, packed = make_trainee(spec, recipe, dtype, device, texts, given=bool(run.heads))
    rows = packed.rows
    say(f"{len(rows) * recipe.length:,} tokens in {len(rows):,} rows; {describe(trainee)}")
    if trainee.heads.vocabulary is not None:
        say(coverage(rows, trainee.heads.vocabulary))
    if checkpoint:
        check_resumed(trainee.heads, checkpoint / SAFE_WEIGHTS_NAME)
    with reported_failures(run.out / "checkpoints"):
        log = ProgressLog(trainee, progress, run.out / LOG_FILE, _step_tokens(arguments, recipe))
        kept: PackedRows | KeptRows = rows
        if recipe.keep_hidden and not (checkpoint and is_last(checkpoint)):
            native = None
            if recipe.hidden_engine == "native":
                native = partial(
                    NativeReader, spec, recipe.quant, recipe.length, dtype, run.ignore_memory
                )
            kept = kept_rows(trainee.backbone, rows, recipe, arguments, dtype, say, native)
        fit(spec, recipe, arguments, kept, log, checkpoint, say)
    del trainee, log  # frees the memory for the backbones to compare
    if packed.unseen is not None and first:
        kind = "training" if held_out[0] in documents else "held-out"
        _compare_backbones(spec, run, packed.unseen, device, kind, say)
    return first


def _checked_spec(run: Run) -> ModelSpec:
    """Resolve the model's name. Mistakes in the run fail before anything is loaded."""
    spec = resolve_model(run.model, run.heads, models=run.models, template=run.template)
    if spec.template:
        named_template(spec.template)
    if run.recipe.joint and resolved(run.out) == Path(spec.backbone).resolve():
        raise UserError(
            f"{run.recipe.name} would overwrite the backbone in {run.out}: choose another --out"
        )
    return spec


def fit(
    spec: ModelSpec,
    recipe: Recipe,
    arguments: TrainingArguments,
    rows: PackedRows | KeptRows,
    log: ProgressLog,
    checkpoint: Path | None,
    say: Callable[[str], None],
) -> None:
    """Train the log's trainee and write the result beside the log.

    Hidden states that were kept are deleted then.
    """
    trainee = log.trainee
    with Stopper(say, recipe.save_every) as stopper:
        trainer = MedusaTrainer(
            recipe, model=trainee, args=arguments, train_dataset=rows, callbacks=[log, stopper]
        )
        trainer.pop_callback(PrinterCallback)  # `progress` shows the same
        if checkpoint and is_last(checkpoint) and (checkpoint / SAFE_WEIGHTS_NAME).exists():
            # Trainer would take one more step.
            trainee.load_state_dict(load_file(checkpoint / SAFE_WEIGHTS_NAME), strict=False)
        else:
            _run_steps(trainer, checkpoint)
        state: Any = trained_weights(trainee)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if trainer.is_world_process_zero():
            out = log.file.parent
            save_heads(state, trainee.heads, out)
            if recipe.joint:
                save_backbone(state, spec, recipe, out)
            drop_states(Path(str(arguments.output_dir)))


def _run_steps(trainer: MedusaTrainer, checkpoint: Path | None) -> None:
    """Take the steps that are left. Raises UserError if the user stops the run."""
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    done = trainer.state.global_step
    if done < trainer.state.max_steps:
        raise UserError(
            f"stopped at step {done} of {trainer.state.max_steps}; --resume goes on from there"
        )


@dataclass(frozen=True)
class PackedTexts:
    """The text of a run as rows: to train on, and for a trained backbone's perplexity."""

    rows: PackedRows
    unseen: PackedRows | None


def make_trainee(
    spec: ModelSpec,
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    texts: tuple[list[Document], list[Document]],
    *,
    given: bool,
) -> tuple[Trainee, PackedTexts]:
    """Load the backbone, pack the text in its template, make its heads or load `given` ones."""
    quant = recipe.quant.replace("none", "auto")
    backbone, tokenizer = load_pretrained(spec, dtype, quant, device)
    template = resolve_template(tokenizer, spec)
    documents, held_out = texts
    rows = _packed(template, documents, recipe)
    unseen = _packed(template, held_out, recipe) if recipe.joint else None
    heads = first_heads(backbone, recipe, template, rows, heads_file(spec) if given else None)
    backbone.requires_grad_(recipe.whole)
    adapter = adapt(backbone, recipe) if recipe.joint and not recipe.whole else None
    if recipe.gradient_checkpointing and recipe.joint:
        checkpoint_activations(backbone)
    return Trainee(backbone, heads, recipe, adapter), PackedTexts(rows, unseen)


def split_documents(run: Run) -> tuple[list[Document], list[Document]]:
    """Read the documents to train on, and those to measure a trained backbone's perplexity on."""
    documents = _read(run.data)
    if not run.recipe.joint:
        return documents, []
    if run.held_out:
        return documents, _read(run.held_out)
    every = round(1 / HELD_OUT)
    trained = [document for i, document in enumerate(documents) if i % every]
    return trained or documents, documents[::every]


def _read(files: Iterable[Path]) -> list[Document]:
    return [document for file in files for document in read_documents(file)]


def _packed(template: ChatTemplate, documents: Iterable[Document], recipe: Recipe) -> PackedRows:
    examples = (example for document in documents for example in encode(template, document))
    return PackedRows(examples, recipe.length)


def _step_tokens(arguments: TrainingArguments, recipe: Recipe) -> int:
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps
    return int(batch * arguments.world_size * recipe.length)


def _compare_backbones(
    spec: ModelSpec,
    run: Run,
    rows: PackedRows,
    device: torch.device,
    kind: str,
    say: Callable[[str], None],
) -> None:
    """Report the backbone's perplexity before and after, and add it to the run's settings file."""
    quant = run.recipe.quant
    before = perplexity_of(spec, rows, quant, device)
    after = perplexity_of(replace(spec, backbone=str(run.out)), rows, quant, device)
    change = f"{before:.3f} before, {after:.3f} after ({after / before - 1:+.1%})"
    say(f"perplexity of the backbone on {kind} text: {change}")
    result = {"before": round(before, 4), "after": round(after, 4)}
    write_json(run.out / SETTINGS_FILE, run.settings() | {"perplexity": result})


def _ignore(line: str) -> None:
    """Print nothing: another process prints the line."""
