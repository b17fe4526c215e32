"""transformers' Trainer with two learning rates and a guard against NaN."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from medusa_chat.config import Recipe, UserError
from medusa_chat.training import schedules
from medusa_chat.training.checkpoints import seal

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class MedusaTrainer(Trainer):
    """Trainer with a learning rate and a schedule each for heads and backbone."""

    def __init__(self, recipe: Recipe, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.recipe = recipe

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make an optimizer with a group for the heads and one for a trained backbone."""
        if self.optimizer is None:
            trainee: Any = model or self.model
            weights = trained_weights(trainee, detach=False)
            backbone = [weight for name, weight in weights.items() if "backbone." in name]
            heads = [weight for name, weight in weights.items() if "backbone." not in name]
            groups = [{"params": heads, "lr": self.recipe.learning_rate}]
            if backbone:
                groups.append({"params": backbone, "lr": self.recipe.backbone_learning_rate})
            optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args, trainee)
            self.optimizer = optimizer(groups, **settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make a scheduler with a function for each of the optimizer's groups."""
        if self.lr_scheduler is None:
            chosen: Any = optimizer or self.optimizer
            rates = (schedules.heads_rate, schedules.backbone_rate)[: len(chosen.param_groups)]
            functions = [_rate_function(rate, self.recipe, num_training_steps) for rate in rates]
            self.lr_scheduler = LambdaLR(chosen, functions)
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Tensor:
        """Run a step. Raises UserError if the loss or its gradient is not a number.

        The gradient counts too: it would spoil a checkpoint before the next loss shows it.
        """
        rows = inputs["rows"].tolist()
        loss: Tensor = super().training_step(model, inputs, *rest, **named)
        total = loss
        if not self.args.fp16:  # with fp16 a scaler skips steps without a finite gradient
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            total = loss + torch.nn.utils.get_total_norm(gradients).to(loss.device)
        if not total.isfinite():
            data: Any = self.train_dataset
            batch = ", ".join(f"row {row} ({data.place(row)})" for row in rows)
            raise UserError(
                "the loss or its gradient is not a number at step"
                f" {self.state.global_step + 1}; the batch was {batch}. Nothing was saved since"
                " the last checkpoint; look at these documents, or lower --learning-rate"
            )
        return loss

    def _save_checkpoint(self, *arguments: Any, **named: Any) -> None:
        """Save a checkpoint, and seal it once all processes have written their parts."""
        super()._save_checkpoint(*arguments, **named)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            seal(Path(str(self.args.output_dir)) / name)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Save the trained weights and the whole heads: a frozen backbone does not change."""
        trainee: Any = self.model
        heads = {f"heads.{name}": part for name, part in trainee.heads.state_dict().items()}
        kept = heads | trained_weights(trainee)
        if state_dict is not None:
            kept = {name: tensor for name, tensor in state_dict.items() if name in kept}
        super()._save(output_dir, kept)


def trained_weights(model: Any, *, detach: bool = True) -> dict[str, Tensor]:
    """The weights that are trained, by name.

    They do not come from state_dict(): on a CPU, bitsandbytes 0.50 unpacks nf4 weights for it and
    scrambles their scales.
    """
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.detach() for name, p in weights.items()} if detach else weights


def _rate_function(
    rate: Callable[[Recipe, int, int], float], recipe: Recipe, total: int
) -> Callable[[int], float]:
    """Make a function of the step alone."""
    return lambda step: rate(recipe, step, total)


def training_arguments(run: Path, recipe: Recipe, dtype: torch.dtype) -> TrainingArguments:
    """Trainer's arguments for a recipe that computes in `dtype`, with checkpoints in `run`."""
    arguments = TrainingArguments(
        output_dir=str(run),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps,
        seed=recipe.seed,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        weight_decay=0.0,
        optim="adamw_torch_fused",
        use_cpu=not torch.cuda.is_available(),
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
        # Threads over all GPUs are slower: `accelerate launch` starts a process for each.
        arguments._n_gpu = 1
    return arguments
