"""What is trained: Medusa heads, alone or with their backbone, and the loss of a batch."""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from medusa_chat.model.heads import MedusaHeads
from medusa_chat.training.data import IGNORED
from medusa_chat.training.losses import (
    Frozen,
    HeadsLoss,
    cross_entropy,
    distillation,
    head_targets,
    heads_loss,
    output_layer,
)
from medusa_chat.training.schedules import heads_weight, joint_from

if TYPE_CHECKING:
    from collections.abc import Iterator

    from medusa_chat.config import Recipe


@dataclass
class Meter:
    """Means of what the batches since the last reading gave."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, **figures: Tensor) -> None:
        """Add a batch's figures; what is NaN, because the batch did not test it, is left out."""
        for name, value in figures.items():
            known = ~value.isnan()
            self.sums[name] = self.sums.get(name, 0) + value.nan_to_num()
            self.counts[name] = self.counts.get(name, 0) + known

    def read(self) -> dict[str, Any]:
        """The means, and begin anew."""
        means = {
            name: (self.sums[name] / self.counts[name].clamp(min=1)).tolist() for name in self.sums
        }
        self.sums, self.counts = {}, {}
        return means


class Trainee(nn.Module):
    """A backbone, frozen or not, and its heads.

    Attributes:
        backbone: a transformers causal LM, with the layers of a LoRA adapter in place where `adapter` is one.
        step, total: where the run stands; the trainer sets them.
    """

    _keys_to_ignore_on_save = (
        None  # Trainer asks for it when a checkpoint, without the frozen weights, is loaded
    )

    def __init__(
        self, backbone: Any, heads: MedusaHeads, recipe: Recipe, adapter: Any = None
    ) -> None:
        super().__init__()
        self.backbone, self.heads, self.recipe = backbone, heads, recipe
        self._adapter = (adapter,)  # in a tuple, so that its weights do not count twice
        self.meter = Meter()
        self.step, self.total = 0, 1

    def train(self, mode: bool = True) -> Trainee:
        """A frozen backbone stays in eval mode, as it will be used."""
        super().train(mode)
        self.backbone.train(mode and self.recipe.joint)
        return self

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor]:
        """The loss of rows packed as training/data.py does: [rows, length] each; `rows` are their numbers."""
        joint = self.step >= joint_from(self.recipe, self.total)
        with nullcontext() if joint else torch.no_grad():
            hidden = self._hidden(input_ids, position_ids)
        lm_head = self.backbone.get_output_embeddings()
        if self.recipe.joint and not joint:
            lm_head = Frozen(lm_head)
        heads: HeadsLoss = heads_loss(
            self.heads,
            lm_head,
            hidden.to(self.heads.weight.dtype),
            labels,
            position_ids,
            self.recipe.decay,
        )
        loss = heads_weight(self.recipe, self.step, self.total) * heads.total
        self.meter.add(head_loss=heads.losses, top1=heads.top1, top5=heads.top5)
        if joint:
            own = self._backbone_loss(hidden, input_ids, position_ids, labels)
            self.meter.add(backbone_loss=own.detach())
            loss = loss + own
        return (loss,)

    def _hidden(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        output = self.backbone.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _backbone_loss(
        self, hidden: Tensor, input_ids: Tensor, position_ids: Tensor, labels: Tensor
    ) -> Tensor:
        """Mean cross entropy of the next token (medusa2), or mean KL to the backbone as it was (distilled)."""
        targets = head_targets(labels, position_ids, 0)
        answered = targets != IGNORED
        count = answered.sum().clamp(min=1)
        lm_head = output_layer(self.backbone)
        if self.recipe.name == "medusa2":
            return cross_entropy(hidden[answered], targets[answered], lm_head) / count
        with torch.no_grad(), self._as_before():
            reference = self._hidden(input_ids, position_ids)

        def before(states: Tensor) -> Tensor:
            with self._as_before():
                logits: Tensor = lm_head(states)
                return logits

        return distillation(hidden[answered], reference[answered], lm_head, before) / count

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """The backbone with its adapter off, in eval mode."""
        (adapter,) = self._adapter
        assert adapter is not None
        training = self.backbone.training
        for module in self.backbone.modules():
            # Not the linear layers, which have no dropout of their own: bitsandbytes computes otherwise in eval mode,
            # and on a CPU lays its weights out anew, for good, so that no gradient passes them.
            if not isinstance(module, nn.Linear):
                module.training = False
        try:
            with adapter.disable_adapter():
                yield
        finally:
            self.backbone.train(training)


def adapt(backbone: Any, recipe: Recipe) -> Any:
    """Put a LoRA adapter on every linear layer of a backbone, in place; returns peft's model, which can merge it.

    The released recipe adapts the LM head too; here only where it isn't also the embedding, which must not change.
    """
    linears = {
        name: module for name, module in backbone.named_modules() if hasattr(module, "out_features")
    }
    tied = backbone.get_output_embeddings().weight is backbone.get_input_embeddings().weight
    wanted = [
        name
        for name, module in linears.items()
        if not (tied and module is backbone.get_output_embeddings())
    ]
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=wanted,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # peft asks transformers in a way that is going out of use
        return get_peft_model(backbone, config)


def checkpoint_activations(backbone: Any) -> None:
    """Have a backbone compute its activations anew for the gradient, so that they take no memory."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # transformers 5.10 has no other name for it yet
        backbone.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )


def new_heads(backbone: Any, recipe: Recipe) -> MedusaHeads:
    """Untrained heads, whose guesses are the LM head's (paper, section 2.1.1): blocks at zero, its copy or itself."""
    lm_head = backbone.get_output_embeddings()
    own = recipe.owns_lm_heads(lm_head.weight.numel(), backbone.num_parameters())
    heads = MedusaHeads(
        recipe.heads, recipe.layers, lm_head.in_features, lm_head.out_features if own else None
    )
    if heads.lm_heads is not None:
        with torch.no_grad():
            heads.lm_heads.copy_(lm_head.weight.float())
    return heads


def heads_shape(backbone: Any) -> tuple[int, int]:
    """Hidden size and vocabulary that heads for a transformers causal LM must have."""
    lm_head = backbone.get_output_embeddings()
    return lm_head.in_features, lm_head.out_features


def describe(trainee: Trainee) -> str:
    """One line on the heads: their size, and what LM heads of their own cost or would."""
    heads = trainee.heads
    hidden, vocabulary = heads_shape(trainee.backbone)
    blocks, lm_heads = 2 * heads.weight.numel(), 2 * heads.heads * hidden * vocabulary
    if heads.lm_heads is None:
        kind = (
            f"share the LM head ({_size(blocks)}; LM heads of their own would add {_size(lm_heads)}"
        )
    else:
        kind = f"own their LM heads ({_size(blocks + lm_heads)}, {_size(lm_heads)} of it LM heads"
    trained = sum(p.numel() for p in trainee.parameters() if p.requires_grad)
    depth = f"{heads.layers} block{'s' * (heads.layers > 1)}"
    return f"{heads.heads} heads of {depth} {kind}, read at every step); {trained:,} parameters are trained"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
