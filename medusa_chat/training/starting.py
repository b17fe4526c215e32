"""The heads that a run starts from: new ones, or given ones, in the run's vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from medusa_chat.config import UserError
from medusa_chat.decoding.reply import eos_ids
from medusa_chat.model.heads import HeadVocabulary, MedusaHeads
from medusa_chat.model.parent_bias import new_parent_bias
from medusa_chat.text import size_text

if TYPE_CHECKING:
    from pathlib import Path

    from medusa_chat.config import Recipe
    from medusa_chat.model.templates import ChatTemplate
    from medusa_chat.training.data import PackedRows
    from medusa_chat.training.trainee import Trainee


def new_heads(
    backbone: Any, recipe: Recipe, vocabulary: HeadVocabulary | None = None
) -> MedusaHeads:
    """Make untrained heads, whose guesses are the LM head's (paper, section 2.1.1).

    Their blocks are zero. Their LM heads are the backbone's or copies of it, of the rows of their
    vocabulary. Their parent bias, if the recipe has one, adds nothing yet.
    """
    weight = backbone.get_output_embeddings().weight
    hidden, size = heads_shape(backbone)
    rows = size if vocabulary is None else len(vocabulary)
    own = recipe.owns_lm_heads(weight.numel() * rows // size, backbone.num_parameters())
    heads = MedusaHeads(
        recipe.heads,
        recipe.layers,
        hidden,
        rows if own else None,
        vocabulary=vocabulary,
        parent_bias=recipe.parent_bias,
        size=size,
    )
    if heads.lm_heads is not None:
        if vocabulary is not None:
            weight = weight[vocabulary.tokens.to(weight.device)]
        with torch.no_grad():
            heads.lm_heads.copy_(weight.float())
    return heads


def start_from(heads: MedusaHeads, recipe: Recipe, size: int) -> MedusaHeads:
    """Prepare given heads for a recipe; in place.

    A new parent bias is trained alone, unless the backbone changes too: the heads are frozen.

    Args:
        heads: as their file has them.
        recipe: of the run.
        size: tokens of the backbone.

    Raises:
        UserError: the recipe asks for another vocabulary, or another rank of a bias.
    """
    ranked = size if heads.vocabulary is None else len(heads.vocabulary)
    if recipe.head_vocabulary not in (0, ranked):
        raise UserError(
            f"the heads to start from rank {ranked} tokens, which cannot become"
            f" {recipe.head_vocabulary}: leave --head-vocabulary out"
        )
    bias = heads.parent_bias
    if bias is not None and recipe.parent_bias not in (0, bias.rank):
        raise UserError(
            f"the heads to start from have a parent bias of rank {bias.rank}, which cannot become"
            f" {recipe.parent_bias}: leave --parent-bias out"
        )
    if bias is None and recipe.parent_bias:
        heads.requires_grad_(recipe.joint)
        heads.parent_bias = new_parent_bias(recipe.parent_bias, size, heads.vocabulary)
    return heads


def choose_vocabulary(
    rows: PackedRows, count: int, special: set[int], size: int
) -> HeadVocabulary | None:
    """Choose the tokens that new heads rank: the special ones and the most frequent targets.

    Equals go by their ids, so that the same text gives the same tokens.

    Args:
        rows: the text to train on.
        count: tokens to choose; 0 for all.
        special: ids that must be among them; see `special_ids`.
        size: tokens of the backbone.

    Raises:
        UserError: there is no such part of the vocabulary.
    """
    if not count:
        return None
    if count >= size:
        raise UserError(f"--head-vocabulary must be below the model's {size} tokens, not {count}")
    if count <= len(special):
        raise UserError(
            f"--head-vocabulary must be above {len(special)}, the special tokens alone, not {count}"
        )
    counts = torch.bincount(rows.targets().long(), minlength=size)
    counts[sorted(special)] = counts.sum() + 1
    chosen = counts.argsort(descending=True, stable=True)[:count]
    return HeadVocabulary(chosen, size)


def special_ids(backbone: Any, template: ChatTemplate) -> set[int]:
    """Ids of the tokens that no text has to hold: those that end a reply, and other special ones.

    A stop text of the template counts if it is one token.
    """
    tokenizer = template.tokenizer
    found = {*eos_ids(backbone, tokenizer), *template.stop_ids, *tokenizer.all_special_ids}
    for text in template.stop:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            found.update(ids)
    size = heads_shape(backbone)[1]
    return {token for token in found if 0 <= token < size}


def coverage(rows: PackedRows, vocabulary: HeadVocabulary) -> str:
    """Describe in one line what share of the targets the heads can guess."""
    known = vocabulary.rows[rows.targets().long()] < len(vocabulary)
    return (
        f"the heads rank {len(vocabulary):,} of {vocabulary.size:,} tokens, which are"
        f" {known.float().mean():.2%} of the targets; the others have no loss"
    )


def check_resumed(heads: MedusaHeads, weights: Path) -> None:
    """Raise UserError if a checkpoint's heads rank other tokens than its run's text gives now.

    Data and settings are the same, so the tokenizer is another one.
    """
    if heads.vocabulary is None or not weights.exists():
        return
    with safe_open(weights, "pt") as opened:
        before = opened.get_tensor("heads.vocabulary.tokens")
    if not torch.equal(before, heads.vocabulary.tokens.cpu()):
        raise UserError(
            f"the heads in {weights.parent} rank other tokens than the data give now: the"
            " tokenizer has changed, and --resume needs the same"
        )


def heads_shape(backbone: Any) -> tuple[int, int]:
    """Hidden size and vocabulary of heads for a transformers causal LM."""
    lm_head = backbone.get_output_embeddings()
    return lm_head.in_features, lm_head.out_features


def describe(trainee: Trainee) -> str:
    """Describe the heads in one line: their size, and the size of LM heads of their own."""
    heads = trainee.heads
    hidden, rows = heads_shape(trainee.backbone)
    if heads.vocabulary is not None:
        rows = len(heads.vocabulary)
    blocks = 2 * heads.weight.numel()
    lm_heads = 2 * heads.heads * hidden * rows
    if heads.lm_heads is None:
        kind = (
            f"share the LM head ({size_text(blocks)};"
            f" LM heads of their own would add {size_text(lm_heads)}"
        )
    else:
        kind = (
            f"own their LM heads ({size_text(blocks + lm_heads)},"
            f" {size_text(lm_heads)} of it LM heads"
        )
    trained = sum(p.numel() for p in trainee.parameters() if p.requires_grad)
    depth = f"{heads.layers} block{'s' * (heads.layers > 1)}"
    return (
        f"{heads.heads} heads of {depth} {kind}, read at every step)"
        f"{_bias_text(heads)}; {trained:,} parameters are trained"
    )


def _bias_text(heads: MedusaHeads) -> str:
    """Describe the parent bias, of which a step reads a few rows only."""
    bias = heads.parent_bias
    if bias is None:
        return ""
    size = size_text(2 * sum(matrix.numel() for matrix in bias.parameters()))
    alone = "" if heads.weight.requires_grad else ", which is trained alone"
    return f" with a parent bias of rank {bias.rank} ({size}){alone}"
