"""`medusa-chat train`: heads for a model of one's own, on transformers' Trainer."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from medusa_chat.config import Recipe, UserError, resolve_model
from medusa_chat.events import TrainStep
from medusa_chat.model.heads import MedusaHeads
from medusa_chat.model.layouts import write_heads
from medusa_chat.model.loading import load_pretrained
from medusa_chat.training.data import PackedRows, encode, read_conversations
from medusa_chat.training.losses import HeadsLoss, heads_loss

Progress = Callable[[TrainStep], None]


class Trainee(nn.Module):
    """Heads on a frozen backbone, which is kept out of the module tree so that it is neither trained nor saved."""

    def __init__(self, backbone: Any, heads: MedusaHeads, decay: float) -> None:
        super().__init__()
        self.heads = heads
        self.decay = decay
        self._frozen = (backbone,)
        self.last: HeadsLoss | None = None

    def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> tuple[Tensor]:
        """Rows packed as training/data.py does; returns the loss."""
        (backbone,) = self._frozen
        with torch.no_grad():
            hidden = backbone.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        self.last = heads_loss(
            self.heads, backbone.get_output_embeddings(), hidden.to(self.heads.weight.dtype), labels, position_ids,
            self.decay,
        )  # fmt: skip
        return (self.last.total,)


class _Report(TrainerCallback):
    """Turns what Trainer logs into TrainSteps."""

    def __init__(self, trainee: Trainee, progress: Progress, row_tokens: int) -> None:
        self.trainee, self.progress, self.row_tokens = trainee, progress, row_tokens
        self.started, self.first = time.perf_counter(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        last = self.trainee.last
        if not logs or "loss" not in logs or last is None:
            return
        tokens = (state.global_step - self.first) * args.train_batch_size * self.row_tokens
        rate = tokens / (time.perf_counter() - self.started)
        losses, accuracy = tuple(last.losses.tolist()), tuple(last.accuracy.tolist())
        self.progress(TrainStep(state.global_step, state.max_steps, float(logs["loss"]), losses, accuracy, rate))


def train(model: str, data: list[Path], out: Path, recipe: Recipe, progress: Progress, resume: bool = False) -> Path:
    """Train heads by a recipe and write them to `out`; returns their file.

    Raises:
        UserError: the model or the data cannot be used.
    """
    if recipe.name != "medusa1":
        raise UserError(f"unknown recipe {recipe.name!r}; there is medusa1")
    conversations = [conversation for file in data for conversation in read_conversations(file)]
    torch.manual_seed(recipe.seed)
    backbone, tokenizer = load_pretrained(resolve_model(model), torch.bfloat16)
    backbone.requires_grad_(False)
    rows = PackedRows((encode(tokenizer, conversation) for conversation in conversations), recipe.length)
    hidden = backbone.config.get_text_config().hidden_size
    trainee = Trainee(backbone, MedusaHeads(recipe.heads, recipe.layers, hidden), recipe.decay)
    run = out / "checkpoints"
    trainer = Trainer(
        model=trainee, args=_arguments(run, recipe), train_dataset=rows,
        callbacks=[_Report(trainee, progress, recipe.length)],
    )  # fmt: skip
    backbone.to(trainer.args.device)
    trainer.pop_callback(PrinterCallback)  # `progress` shows what it would print
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(run)) if resume and run.is_dir() else None)
    return write_heads(trainee.heads, out)


def _printer(trainer: Trainer) -> type:
    """Trainer's own callback that prints logs, which `progress` replaces."""
    return next(
        type(c)
        for c in trainer.callback_handler.callbacks
        if type(c).__name__ in ("PrinterCallback", "ProgressCallback")
    )


def _arguments(run: Path, recipe: Recipe) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(run), num_train_epochs=recipe.epochs, max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size, learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine", warmup_steps=recipe.warmup_steps, weight_decay=0.0, optim="adamw_torch_fused",
        bf16=True, use_cpu=not torch.cuda.is_available(), logging_steps=10, save_steps=500, save_total_limit=2,
        report_to=[], seed=recipe.seed, disable_tqdm=True, label_names=["labels"],
    )  # fmt: skip
