"""`medusa-chat train`: Medusa heads for a model of one's own, on transformers' Trainer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from medusa_chat.config import ModelSpec, Recipe, UserError
from medusa_chat.hub.model_list import resolve_model
from medusa_chat.model.layouts import read_heads
from medusa_chat.machine.devices import choose_dtype
from medusa_chat.model.loading import heads_file, load_pretrained
from medusa_chat.model.templates import ChatTemplate, named_template, resolve_template
from medusa_chat.training import schedules
from medusa_chat.training.checkpoints import SETTINGS_FILE, begin, one_line, write_json
from medusa_chat.training.data import Document, PackedRows, encode, read_documents
from medusa_chat.training.memory import check_training
from medusa_chat.training.outputs import export_backbone, export_heads, perplexity_of
from medusa_chat.training.progress import LOG_FILE, Report, Stopper
from medusa_chat.training.trainee import (
    Trainee,
    adapt,
    checkpoint_activations,
    describe,
    heads_shape,
    new_heads,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from medusa_chat.events import TrainStep

HELD_OUT = 0.02  # share of the documents that perplexity is measured on, where no others are given


@dataclass(frozen=True)
class Run:
    """What to train, on what, and where to.

    Attributes:
        model: name, folder or hub id of the backbone; heads: to start from, in place of new ones.
        held_out: documents for the perplexity; without them, some of `data` are kept aside.
        models: the user's own list of models.
        template: a conversation template of fastchat, in place of the model's own.
        ignore_memory: begin even where less memory is free than the run should need.
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
        """What a run that resumes has to have in common with the one before."""
        data, held_out = [str(path) for path in self.data], [str(path) for path in self.held_out]
        recipe = asdict(self.recipe)
        about = {"model": self.model, "heads_from": self.heads, "data": data, "held_out": held_out}
        about |= {"template": self.template or None}  # as a run that could not choose one
        return about | {"recipe": recipe.pop("name"), **recipe}


class MedusaTrainer(Trainer):
    """Trainer with two learning rates that have schedules of their own, and a guard against NaN."""

    def __init__(self, recipe: Recipe, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.recipe = recipe

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Heads and, for a joint recipe, backbone as a group each."""
        if self.optimizer is None:
            trainee: Any = model or self.model
            named = [(n, p) for n, p in trainee.named_parameters() if p.requires_grad]
            heads = [p for n, p in named if "heads." in n and "backbone." not in n]
            backbone = [p for n, p in named if "backbone." in n]
            groups = [{"params": heads, "lr": self.recipe.learning_rate}]
            if backbone:
                groups.append({"params": backbone, "lr": self.recipe.backbone_learning_rate})
            optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args, trainee)
            self.optimizer = optimizer(groups, **settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            chosen: Any = optimizer or self.optimizer
            rates = (schedules.heads_rate, schedules.backbone_rate)[: len(chosen.param_groups)]
            self.lr_scheduler = LambdaLR(
                chosen, [partial(_rate, rate, self.recipe, num_training_steps) for rate in rates]
            )
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Tensor:
        rows = inputs["rows"].tolist()
        loss: Tensor = super().training_step(model, inputs, *rest, **named)
        # The gradient too: what it spoils could be saved before the next loss shows it. (A scaler skips such steps.)
        gradients = [
            p.grad for p in model.parameters() if p.grad is not None and not self.args.fp16
        ]
        if not (loss + torch.nn.utils.get_total_norm(gradients).to(loss.device)).isfinite():
            data: Any = self.train_dataset
            batch = ", ".join(f"row {row} ({data.place(row)})" for row in rows)
            raise UserError(
                f"the loss or its gradient is not a number at step {self.state.global_step + 1}; the batch was {batch}."
                " Nothing was saved since the last checkpoint; look at these documents, or lower --learning-rate"
            )
        return loss

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Checkpoints hold what is trained; a frozen backbone is where it was."""
        trained = _trained(self.model)
        if state_dict is not None:
            trained = {name: tensor for name, tensor in state_dict.items() if name in trained}
        super()._save(output_dir, trained)


def _trained(model: Any) -> dict[str, Tensor]:
    """The weights that are trained.

    Not from state_dict(): on a CPU, bitsandbytes 0.50 unpacks nf4 weights for it, and scrambles their scales.
    """
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _rate(
    rate: Callable[[Recipe, int, int], float], recipe: Recipe, total: int, step: int
) -> float:
    return rate(recipe, step, total)


def train(run: Run, progress: Callable[[TrainStep], None], say: Callable[[str], None]) -> bool:
    """Train by a recipe and write the heads to `run.out`, with the whole model where its backbone was trained.

    Args:
        progress: shows how it goes; say: takes lines for the user.

    Returns:
        Whether it was this process that wrote: of those that `accelerate launch` starts, the first.

    Raises:
        UserError: the model, the data or `out` cannot be used, the loss is not a number, the disk is full, memory
            does not suffice, or the user stopped the run.
    """
    spec = resolve_model(run.model, run.heads, models=run.models, template=run.template)
    if spec.template:
        named_template(spec.template)  # a slip is told before the model is loaded
    recipe = replace(run.recipe, heads_first=0.0) if run.heads else run.recipe
    if recipe.joint and run.out.resolve() == Path(spec.backbone).resolve():
        raise UserError(
            f"{recipe.name} would overwrite the backbone in {run.out}: choose another --out"
        )
    documents, held_out = _documents(run)  # before the model, which may take long to load
    arguments = _arguments(run.out / "checkpoints", recipe)
    first = arguments.process_index == 0
    say = say if first else (lambda line: None)
    with arguments.main_process_first(local=False):
        checkpoint = begin(run.out, run.settings(), run.resume, writes=first)
        if not run.ignore_memory:
            width = _dtype(recipe, arguments.device).itemsize
            check_training(spec, recipe, str(arguments.device), width, bool(run.heads))
    torch.manual_seed(recipe.seed)
    trainee, template = _trainee(spec, recipe, bool(run.heads), arguments.device)
    rows = _packed(template, documents, recipe)
    unseen = _packed(template, held_out, recipe) if recipe.joint else None
    say(f"{len(rows) * recipe.length:,} tokens in {len(rows):,} rows; {describe(trainee)}")
    with one_line(run.out / "checkpoints"):
        report = Report(trainee, progress, run.out / LOG_FILE, _step_tokens(arguments, recipe))
        _fit(spec, recipe, arguments, rows, report, checkpoint, say)
    del trainee, report  # before the backbone is loaded once more
    if unseen is not None and first:
        _compare(
            spec,
            run,
            unseen,
            arguments.device,
            "training" if held_out[0] in documents else "held-out",
            say,
        )
    return first


def _fit(
    spec: ModelSpec,
    recipe: Recipe,
    arguments: TrainingArguments,
    rows: PackedRows,
    report: Report,
    checkpoint: Path | None,
    say: Callable[[str], None],
) -> None:
    """Train the report's trainee and write what it has become."""
    trainee, out = report.trainee, report.log.parent
    with Stopper(say) as stopper:
        trainer = MedusaTrainer(
            recipe, model=trainee, args=arguments, train_dataset=rows, callbacks=[report, stopper]
        )
        trainer.pop_callback(PrinterCallback)  # `progress` shows what it would print
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if (done := trainer.state.global_step) < trainer.state.max_steps:
            raise UserError(
                f"stopped at step {done} of {trainer.state.max_steps}; --resume goes on from there"
            )
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        state = (
            trainer.accelerator.get_state_dict(trainer.model_wrapped)
            if sharded
            else _trained(trainee)
        )
        if trainer.is_world_process_zero():
            export_heads(state, trainee.heads, out)
            if recipe.joint:
                export_backbone(state, spec, recipe, out)


def _trainee(
    spec: ModelSpec, recipe: Recipe, given: bool, device: torch.device
) -> tuple[Trainee, ChatTemplate]:
    """Backbone and heads as the recipe wants them, and how the model is talked to.

    given: the spec's heads are where to start.
    """
    backbone, tokenizer = load_pretrained(
        spec, _dtype(recipe, device), recipe.quant.replace("none", "auto"), device
    )
    template = resolve_template(tokenizer, spec)
    heads = new_heads(backbone, recipe)
    if given and (file := heads_file(spec)):
        heads = read_heads(file, *heads_shape(backbone)).heads.float()
    backbone.requires_grad_(recipe.whole)
    adapter = adapt(backbone, recipe) if recipe.joint and not recipe.whole else None
    if recipe.gradient_checkpointing and recipe.joint:
        checkpoint_activations(backbone)
    return Trainee(backbone, heads, recipe, adapter), template


def _dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Of the backbone's weights."""
    return torch.float32 if recipe.whole else choose_dtype(device, None)


def _documents(run: Run) -> tuple[list[Document], list[Document]]:
    """What is trained on, and what is held out for the perplexity of a backbone that is trained."""
    documents = [document for file in run.data for document in read_documents(file)]
    if not run.recipe.joint:
        return documents, []
    if run.held_out:
        return documents, [document for file in run.held_out for document in read_documents(file)]
    every = round(1 / HELD_OUT)
    kept = documents[::every]
    return [document for i, document in enumerate(documents) if i % every] or documents, kept


def _packed(template: ChatTemplate, documents: Iterable[Document], recipe: Recipe) -> PackedRows:
    return PackedRows(
        (example for d in documents for example in encode(template, d)), recipe.length
    )


def _step_tokens(arguments: TrainingArguments, recipe: Recipe) -> int:
    return (
        arguments.train_batch_size
        * arguments.gradient_accumulation_steps
        * arguments.world_size
        * recipe.length
    )


def _compare(
    spec: ModelSpec,
    run: Run,
    rows: PackedRows,
    device: torch.device,
    kind: str,
    say: Callable[[str], None],
) -> None:
    """Tell the backbone's perplexity on a kind of text before and after, and keep it with the run's settings."""
    quant = run.recipe.quant
    before = perplexity_of(spec, rows, quant, device)
    after = perplexity_of(replace(spec, backbone=str(run.out)), rows, quant, device)
    change = f"{before:.3f} before, {after:.3f} after ({after / before - 1:+.1%})"
    say(f"perplexity of the backbone on {kind} text: {change}")
    result = {"before": round(before, 4), "after": round(after, 4)}
    write_json(run.out / SETTINGS_FILE, run.settings() | {"perplexity": result})


def _arguments(run: Path, recipe: Recipe) -> TrainingArguments:
    gpu = torch.cuda.is_available()
    dtype = choose_dtype(torch.device("cuda" if gpu else "cpu"), None)
    arguments = TrainingArguments(
        output_dir=str(run),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps,
        seed=recipe.seed,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        weight_decay=0.0,
        optim="adamw_torch_fused",
        use_cpu=not gpu,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,
        save_steps=recipe.save_steps,
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        label_names=["labels"],
        # Before the joint stage begins, the backbone's parameters have no gradient.
        ddp_find_unused_parameters=recipe.joint and recipe.heads_first > 0,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = (
            1  # not threads over all GPUs: `accelerate launch` starts a process for each
        )
    return arguments
