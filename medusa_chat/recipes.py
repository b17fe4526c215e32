"""Recipes of training: their settings, with defaults and help texts. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from medusa_chat.sampling import MAX_SEED
from medusa_chat.settings import (
    Duration,
    check_choices,
    make,
    require,
    require_above,
    require_at_least,
    require_between,
    setting,
)

Quant = Literal["none", "nf4", "nf4-double", "int8"]  # of a backbone's or of heads' weights
Loss = Literal["ce", "until-fail", "lk", "kl", "l1"]

OWN_SHARE = 0.12  # of the backbone's parameters: the most that `auto` gives to own LM heads


@dataclass(frozen=True)
class Recipe:
    """Settings of one training (paper, section 2.2). Each field is also a `--flag` of `train`.

    RECIPES holds the paper's three: medusa1 trains heads on a frozen backbone, medusa2 trains both,
    and distilled trains both while the backbone learns from its own earlier predictions.
    """

    name: str = setting(
        "medusa1",
        "medusa1 (heads on a frozen backbone), medusa2 (both) or distilled (both, self-distilled)",
        flag="--recipe",
    )
    heads: int = setting(4, "Medusa heads")
    layers: int = setting(1, "residual blocks of each head")
    lm_heads: Literal["auto", "own", "shared"] = setting(
        "auto", "own, shared (the backbone's), or auto: own if they are small for the backbone"
    )
    parent_bias: int = setting(0, "rank of a bias by the token before the guess; 0: none")
    head_vocabulary: int = setting(0, "tokens that heads rank, the data's most frequent; 0: all")
    decay: float = setting(0.8, "the loss of head k weighs decay ** k")
    loss: Loss = setting(
        "ce",
        "of a head: ce (the paper's cross entropy), until-fail (ce where the heads before are"
        " right), or towards the backbone's own distribution lk (-log acceptance), kl or l1",
    )
    learning_rate: float = setting(2e-3, "learning rate of the heads")
    warmup_steps: int = setting(
        40, "steps over which a learning rate rises, before it falls in a half cosine"
    )
    epochs: float = setting(2.0, "passes over the data")
    max_steps: int = setting(-1, "steps, if above 0, whatever the epochs")
    batch_size: int = setting(8, "rows at once on each device")
    accumulation: int = setting(1, "batches per step")
    length: int = setting(512, "tokens in a row")
    seed: int = setting(0, "the same seed gives the same weights")
    quant: Quant = setting("none", "frozen backbone as none (16-bit), nf4 or int8")
    backbone_learning_rate: float = setting(
        5e-4, "medusa2, distilled: learning rate of the backbone or its adapter"
    )
    lambda_0: float = setting(
        0.2, "medusa2, distilled: weight of the heads' loss relative to the backbone's"
    )
    ramp: Literal["constant", "sine"] = setting(
        "constant", "medusa2, distilled: lambda_0 constant, or rising as a quarter sine"
    )
    heads_first: float = setting(
        0.25, "medusa2, distilled: share of the steps that train heads alone"
    )
    lora_rank: int = setting(
        32, "medusa2, distilled: rank of the backbone's adapter; 0 trains the whole backbone"
    )
    lora_alpha: int = setting(16, "scale of the adapter")
    lora_dropout: float = setting(0.05, "dropout in the adapter")
    gradient_checkpointing: bool = setting(False, "less memory for more time")
    keep_hidden: bool = setting(
        False, "medusa1: compute the backbone's hidden states once, and keep them on the disk"
    )
    hidden_engine: Literal["torch", "native"] = setting(
        "torch",
        "keep-hidden: torch, or native: as the chat runs the model on a CPU, and faster",
    )
    save_steps: int = setting(500, "steps between checkpoints")
    save_every: Duration = setting(
        Duration(600), "time between checkpoints too, such as 90s, 10m or 2h; 0 counts steps alone"
    )
    logging_steps: int = setting(10, "steps between lines of the log")

    def __post_init__(self) -> None:
        known = ", ".join(RECIPES)
        require(self.name in RECIPES, f"unknown recipe {self.name!r}; there are {known}")
        check_choices(self)
        require_above(
            self, 0, "heads", "layers", "epochs", "batch_size", "accumulation", "save_steps"
        )
        require_above(self, 0, "logging_steps", "decay", "learning_rate", "lora_alpha")
        require_at_least(self, 0, "warmup_steps", "backbone_learning_rate", "lambda_0", "lora_rank")
        require_at_least(self, 0, "save_every", "parent_bias", "head_vocabulary")
        for name in ("heads_first", "lora_dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} must be from 0 to below 1, not {value:g}")
        require_between(self, 0, MAX_SEED, "seed")
        require(
            self.length > self.heads + 1,
            f"rows of {self.length} tokens are too short for {self.heads} heads",
        )
        require(
            not self.whole or self.name != "distilled",
            "distilled needs an adapter to switch off: lora_rank above 0",
        )
        require(
            not self.whole or self.quant == "none",
            f"a backbone in {self.quant} needs an adapter: lora_rank above 0",
        )
        require(
            not self.joint or not self.keep_hidden,
            f"keep_hidden needs a frozen backbone: recipe medusa1, not {self.name}",
        )
        require(
            self.keep_hidden or self.hidden_engine == "torch",
            f"hidden_engine {self.hidden_engine} computes states that are kept: add keep_hidden",
        )

    @property
    def joint(self) -> bool:
        """True if the backbone is trained with the heads."""
        return self.name != "medusa1"

    @property
    def compares(self) -> bool:
        """True if the loss compares the heads with the backbone's own distribution."""
        return self.loss in ("lk", "kl", "l1")

    @property
    def whole(self) -> bool:
        """True if all weights of the backbone are trained, and not those of an adapter."""
        return self.joint and not self.lora_rank

    def owns_lm_heads(self, lm_head: int, backbone: int) -> bool:
        """Decide if new heads get LM heads of their own.

        Args:
            lm_head: parameters of the backbone's LM head.
            backbone: parameters of the backbone.
        """
        small = self.heads * lm_head <= OWN_SHARE * backbone
        return self.lm_heads == "own" or (self.lm_heads == "auto" and small)


# The released recipes (ctlllll/axolotl, examples/medusa); rows and batches suit a small machine.
RECIPES: dict[str, dict[str, Any]] = {
    "medusa1": {},
    "medusa2": {},
    "distilled": {
        "learning_rate": 4e-4,
        "backbone_learning_rate": 1e-4,
        "lambda_0": 0.01,
        "ramp": "sine",
        "heads_first": 0.0,
        "warmup_steps": 20,
    },
}


def make_recipe(name: str = "medusa1", **changes: Any) -> Recipe:
    """Return a recipe by name with some settings changed. Raises UserError for bad ones."""
    return make(Recipe, {"name": name, **RECIPES.get(name, {}), **changes})
