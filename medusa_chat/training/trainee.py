"""Medusa heads with their backbone, frozen or trained, and the loss of a batch."""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from medusa_chat.training.data import IGNORED
from medusa_chat.training.entropy import cross_entropy, distillation
from medusa_chat.training.lm_heads import Frozen, output_layer
from medusa_chat.training.losses import head_targets, heads_loss
from medusa_chat.training.packed_states import hidden_states
from medusa_chat.training.reference import Likeliest, likeliest
from medusa_chat.training.schedules import heads_weight, joint_from

if TYPE_CHECKING:
    from collections.abc import Iterator

    from medusa_chat.config import Recipe
    from medusa_chat.model.heads import MedusaHeads


@dataclass
class Meter:
    """Means of the batches' figures since the last reading."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, **figures: Tensor) -> None:
        """Add a batch's figures. NaN, which a batch without a test has, is left out."""
        for name, value in figures.items():
            known = ~value.isnan()
            self.sums[name] = self.sums.get(name, 0) + value.nan_to_num()
            self.counts[name] = self.counts.get(name, 0) + known

    def read(self) -> dict[str, Any]:
        """Return the means and begin anew."""
        means = {}
        for name, total in self.sums.items():
            means[name] = (total / self.counts[name].clamp(min=1)).tolist()
        self.sums = {}
        self.counts = {}
        return means


class Trainee(nn.Module):
    """A backbone, frozen or not, and its heads.

    Attributes:
        backbone: a transformers causal LM, with the adapter's layers in place if there is one.
        step: number of the current step, which the trainer sets.
        total: steps of the run, which the trainer sets.
    """

    # Trainer reads it when it loads a checkpoint without the frozen weights.
    _keys_to_ignore_on_save = None

    def __init__(
        self, backbone: Any, heads: MedusaHeads, recipe: Recipe, adapter: Any = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = heads
        self.recipe = recipe
        self._adapter = (adapter,)  # a tuple, so that its weights do not count twice
        self.meter = Meter()
        self.step = 0
        self.total = 1

    def train(self, mode: bool = True) -> Trainee:
        """Set the mode. A frozen backbone stays in eval mode."""
        super().train(mode)
        self.backbone.train(mode and self.recipe.joint)
        return self

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        rows: Tensor | None = None,
        hidden: Tensor | None = None,
        likely_tokens: Tensor | None = None,
        likely_log_p: Tensor | None = None,
    ) -> tuple[Tensor]:
        """Compute the loss of packed rows (PackedRows), [rows, length] each.

        What a frozen backbone makes of them may be given (KeptRows): its last hidden states, and
        the likeliest next tokens, [rows, length, ...] each.
        """
        del rows  # their numbers, for the trainer's messages
        joint = self.step >= joint_from(self.recipe, self.total)
        if hidden is None:
            with nullcontext() if joint else torch.no_grad():
                hidden = self.hidden_states(input_ids, position_ids)
        lm_head = self.backbone.get_output_embeddings()
        if self.recipe.joint and not joint:
            lm_head = Frozen(lm_head)
        states = hidden.to(self.heads.weight.dtype)
        likely = None
        if likely_tokens is not None and likely_log_p is not None:
            likely = Likeliest(likely_tokens, likely_log_p)
        elif self.recipe.compares:
            likely = self._likeliest(hidden, position_ids, labels)
        heads = heads_loss(
            self.heads,
            lm_head,
            states,
            labels,
            position_ids,
            self.recipe.decay,
            input_ids,
            self.recipe.loss,
            likely,
        )
        loss = heads_weight(self.recipe, self.step, self.total) * heads.total
        self.meter.add(head_loss=heads.losses, top1=heads.top1, top5=heads.top5)
        if joint:
            own = self._backbone_loss(hidden, input_ids, position_ids, labels)
            self.meter.add(backbone_loss=own.detach())
            loss = loss + own
        return (loss,)

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """The backbone's last hidden states, [rows, length, hidden]."""
        return hidden_states(self.backbone, input_ids, position_ids)

    def _likeliest(self, hidden: Tensor, position_ids: Tensor, labels: Tensor) -> Likeliest:
        """The backbone's own distribution where the next token is a target."""
        wanted = head_targets(labels, position_ids, 0) != IGNORED
        return likeliest(hidden.detach(), output_layer(self.backbone), wanted)

    def _backbone_loss(
        self, hidden: Tensor, input_ids: Tensor, position_ids: Tensor, labels: Tensor
    ) -> Tensor:
        """Mean cross entropy of the next token, or mean KL to the original backbone (distilled)."""
        targets = head_targets(labels, position_ids, 0)
        answered = targets != IGNORED
        count = answered.sum().clamp(min=1)
        lm_head = output_layer(self.backbone)
        if self.recipe.name == "medusa2":
            return cross_entropy(hidden[answered], targets[answered], lm_head) / count
        with torch.no_grad(), self.without_adapter():
            reference = self.hidden_states(input_ids, position_ids)

        def teacher(states: Tensor) -> Tensor:
            with self.without_adapter():
                logits: Tensor = lm_head(states)
                return logits

        return distillation(hidden[answered], reference[answered], lm_head, teacher) / count

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Restore the original backbone, in eval mode, inside the block."""
        (adapter,) = self._adapter
        assert adapter is not None
        training = self.backbone.training
        for module in self.backbone.modules():
            # In eval mode bitsandbytes changes a linear layer's weights for good on a CPU, and no
            # gradient passes them then. Linear layers have no dropout of their own.
            if not isinstance(module, nn.Linear):
                module.training = False
        try:
            with adapter.disable_adapter():
                yield
        finally:
            self.backbone.train(training)


def adapt(backbone: Any, recipe: Recipe) -> Any:
    """Add a LoRA adapter to every linear layer, in place; returns peft's model, which can merge it.

    The released recipe adapts the LM head too. An LM head that is also the embedding is left out,
    because the embedding must not change.
    """
    lm_head = backbone.get_output_embeddings()
    tied = lm_head.weight is backbone.get_input_embeddings().weight
    linears = [
        name
        for name, module in backbone.named_modules()
        if hasattr(module, "out_features") and not (tied and module is lm_head)
    ]
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=linears,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft calls transformers in a deprecated way.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(backbone, config)


def checkpoint_activations(backbone: Any) -> None:
    """Make a backbone compute its activations again for the gradient, to save memory."""
    with warnings.catch_warnings():
        # transformers 5.10 has no new name for this method yet.
        warnings.simplefilter("ignore", FutureWarning)
        settings = {"use_reentrant": False}
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
