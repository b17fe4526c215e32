"""Learning rates and the weight of the heads' loss over a run. No torch here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medusa_chat.config import Recipe


def joint_from(recipe: Recipe, total: int) -> int:
    """First step that also trains the backbone; `total` for a recipe with a frozen backbone.

    The paper trains heads first, then both. (Its text states the reverse order, a slip that its
    authors confirmed in FasterDecoding/Medusa#74.)
    """
    return round(recipe.heads_first * total) if recipe.joint else total


def rate_at(step: int, total: int, warmup: int) -> float:
    """Share of the learning rate: a linear rise over `warmup` steps, then a half cosine to 0."""
    if step < 0:
        return 0.0
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(total - warmup, 1), 1.0)))


def heads_rate(recipe: Recipe, step: int, total: int) -> float:
    """Share of the heads' learning rate."""
    return rate_at(step, total, recipe.warmup_steps)


def backbone_rate(recipe: Recipe, step: int, total: int) -> float:
    """Share of the backbone's learning rate: its warm-up and cosine begin with the joint stage."""
    begin = joint_from(recipe, total)
    return rate_at(step - begin, total - begin, recipe.warmup_steps)


def heads_weight(recipe: Recipe, step: int, total: int) -> float:
    """lambda_0 of L = L_backbone + lambda_0 * L_heads (paper, equation 2).

    With a sine ramp it is lambda_0 * sin(pi/2 * step/total).
    """
    if not recipe.joint:
        return 1.0
    ramp = math.sin(math.pi / 2 * step / total) if recipe.ramp == "sine" else 1.0
    return recipe.lambda_0 * ramp
