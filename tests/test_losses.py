"""The loss of every recipe and its gradient, compared with plain arithmetic in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from medusa_chat.config import Recipe, make_recipe
from medusa_chat.model.heads import HeadVocabulary, MedusaHeads
from medusa_chat.training import losses, scoring
from medusa_chat.training.data import IGNORED, Example, PackedRows
from medusa_chat.training.trainee import Trainee, adapt, checkpoint_activations
from tests.helpers.tiny import prompt_ids, random_heads, random_model

if TYPE_CHECKING:
    from collections.abc import Iterator

VOCABULARY, HEADS, BLOCKS = 64, 3, 2
SMALL = {
    "heads": HEADS,
    "layers": BLOCKS,
    "lora_rank": 2,
    "lora_alpha": 5,
    "lora_dropout": 0.0,
    "heads_first": 0.0,
    "length": 16,
}
STEP, TOTAL = 3, 10
# Two rows. The first has a document with an untrained question, and the start of a second one.
DOCUMENTS = [
    Example(prompt_ids(9, seed=1), [False] * 4 + [True] * 5),
    Example(prompt_ids(23, seed=2), [True] * 23),
]
ALONE = [
    (DOCUMENTS[0].ids, 4),
    (DOCUMENTS[1].ids[:7], 1),
    (DOCUMENTS[1].ids[7:], 1),
]  # ids, the first target


RANKED = sorted(set(range(VOCABULARY)) - set(range(0, VOCABULARY, 3)))  # a head vocabulary
RANK = 2


@dataclass
class Setting:
    """A trainee, and the same model as a plain backbone and one tensor for each weight."""

    trainee: Trainee
    base: Any
    weights: dict[str, Tensor]
    leaves: dict[str, Tensor]
    ranked: list[int]


def setting(
    recipe: Recipe, kind: str, own: bool, ranked: list[int] | None = None, bias: bool = False
) -> Setting:
    """Make a setting whose adapter is not zero, so that student and teacher differ."""
    backbone, base = random_model(kind).double(), random_model(kind).double()
    cut = None if ranked is None else HeadVocabulary(torch.tensor(ranked), VOCABULARY)
    parts: dict[str, Any] = {"vocabulary": cut, "parent_bias": RANK if bias else 0}
    heads = random_heads(backbone_like(base), HEADS, BLOCKS, own, **parts)
    heads.requires_grad_(True).double()
    backbone.requires_grad_(recipe.joint and not recipe.lora_rank)
    adapter = adapt(backbone, recipe) if recipe.joint and recipe.lora_rank else None
    torch.manual_seed(3)
    for name, parameter in backbone.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    trainee = Trainee(backbone.double(), heads, recipe, adapter)
    trainee.train()
    trainee.step, trainee.total = STEP, TOTAL
    leaves = {
        n: p.detach().clone().requires_grad_(True)
        for n, p in trainee.named_parameters()
        if p.requires_grad
    }
    weights = dict(base.named_parameters())
    for name in weights:
        if (whole := f"backbone.{name}") in leaves:
            weights[name] = leaves[whole]
        if (a := f"backbone.{name.removesuffix('weight')}lora_A.default.weight") in leaves:
            weights[name] = (
                weights[name] + 5 / 2 * leaves[a.replace("lora_A", "lora_B")] @ leaves[a]
            )
    return Setting(trainee, base, weights, leaves, ranked or list(range(VOCABULARY)))


def backbone_like(model: Any) -> Any:
    class Sizes:
        hidden_size, vocabulary = model.config.hidden_size, model.config.vocab_size

    return Sizes


def shares(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum()


def run(base: Any, weights: dict[str, Tensor], ids: list[int]) -> tuple[Tensor, Tensor]:
    """A document by itself: hidden states and logits of transformers' own forward."""
    given = {"input_ids": torch.tensor([ids]), "output_hidden_states": True, "use_cache": False}
    output = torch.func.functional_call(base, weights, kwargs=given)
    return output.hidden_states[-1][0], output.logits[0]


def plain_heads(made: Setting) -> Iterator[tuple[list[Tensor], list[bool], list[bool]]]:
    """For each head: cross entropy, and hits of its best and five best guesses, by token."""
    leaves, weights = made.leaves, made.weights
    for k in range(1, HEADS + 1):
        terms, first, fifth = [], [], []
        for ids, start in ALONE:
            hidden, _ = run(made.base, weights, ids)
            for t in range(len(ids)):
                if t + k + 1 >= len(ids) or t + k + 1 < start:
                    continue
                x = hidden[t]
                for block in range(BLOCKS):
                    z = (
                        leaves["heads.weight"][block, k - 1] @ x
                        + leaves["heads.bias"][block, k - 1]
                    )
                    x = x + z / (1 + (-z).exp())
                own = leaves.get("heads.lm_heads")
                output = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
                logits = (output[made.ranked] if own is None else own[k - 1]) @ x
                likely = shares(logits + bias_of(made, ids[t + k]))
                if ids[t + k + 1] not in made.ranked:
                    first.append(False)
                    fifth.append(False)
                    continue
                target = made.ranked.index(ids[t + k + 1])
                terms.append(-likely[target].log())
                better = int((likely > likely[target]).sum())
                first.append(better == 0)
                fifth.append(better < 5)
        yield terms, first, fifth


def bias_of(made: Setting, parent: int) -> Tensor:
    """What a parent adds to each logit; one outside the vocabulary has the last row."""
    first = made.leaves.get("heads.parent_bias.first")
    if first is None:
        return torch.zeros(len(made.ranked))
    row = made.ranked.index(parent) if parent in made.ranked else len(made.ranked)
    return made.leaves["heads.parent_bias.second"] @ first[row]


def plain_backbone(made: Setting, distilled: bool) -> Tensor:
    """Mean cross entropy of the next token, or mean KL to the base model."""
    terms = []
    for ids, start in ALONE:
        _, logits = run(made.base, made.weights, ids)
        _, before = run(made.base, dict(made.base.named_parameters()), ids)
        for t in range(start - 1, len(ids) - 1):
            q = shares(logits[t])
            p = shares(before[t]).detach()
            terms.append((p * (p / q).log()).sum() if distilled else -q[ids[t + 1]].log())
    return torch.stack(terms).mean()


def plain_loss(made: Setting, recipe: Recipe) -> Tensor:
    heads = sum(
        recipe.decay**k * torch.stack(terms).mean()
        for k, (terms, *_) in enumerate(plain_heads(made), 1)
    )
    if recipe.name == "medusa1":
        return torch.as_tensor(heads)
    weight = recipe.lambda_0 * (
        math.sin(math.pi / 2 * STEP / TOTAL) if recipe.ramp == "sine" else 1
    )
    return plain_backbone(made, recipe.name == "distilled") + weight * heads


def batch() -> dict[str, Tensor]:
    rows = PackedRows(DOCUMENTS, 16)
    return {key: torch.stack([rows[i][key] for i in range(len(rows))]) for key in rows[0]}


RECIPES = {
    "medusa1": make_recipe("medusa1", **SMALL),
    "medusa2": make_recipe("medusa2", **SMALL),
    "medusa2, whole": make_recipe("medusa2", **SMALL | {"lora_rank": 0}),
    "medusa2, sine": make_recipe("medusa2", **SMALL, ramp="sine", decay=0.5),
    "distilled": make_recipe("distilled", **SMALL),
}


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma2"])
@pytest.mark.parametrize("name", RECIPES)
def test_loss_and_gradient_are_those_of_plain_arithmetic(
    name: str, kind: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPES[name]
    made = setting(recipe, kind, own)
    check_loss_and_gradient(made, recipe, monkeypatch)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("ranked", [None, RANKED], ids=["all tokens", "vocabulary"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", ["medusa1", "medusa2", "medusa2, whole"])
def test_loss_with_bias_and_vocabulary_is_that_of_plain_arithmetic(
    name: str, bias: bool, ranked: list[int] | None, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPES[name]
    made = setting(recipe, "llama", own, ranked, bias)
    check_loss_and_gradient(made, recipe, monkeypatch)
    made.trainee.meter.read()
    made.trainee(**batch())
    told = made.trainee.meter.read()
    for k, (terms, first, fifth) in enumerate(plain_heads(made)):
        assert told["head_loss"][k] == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)
        assert told["top1"][k] == pytest.approx(sum(first) / len(first))
        assert told["top5"][k] == pytest.approx(sum(fifth) / len(fifth))


def check_loss_and_gradient(made: Setting, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plain_loss(made, recipe)
    gradients = dict(
        zip(made.leaves, torch.autograd.grad(expected, list(made.leaves.values())), strict=True)
    )
    assert len(gradients) > (2 if recipe.joint else 1)
    for logits in (2**27, 5 * VOCABULARY * HEADS):  # at once, and five rows at a time
        monkeypatch.setattr(scoring, "LOGITS", logits)
        made.trainee.zero_grad()
        (loss,) = made.trainee(**batch())
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        loss.backward()
        for parameter_name, parameter in made.trainee.named_parameters():
            if not parameter.requires_grad:
                assert parameter.grad is None
                continue
            wanted = gradients[parameter_name]
            torch.testing.assert_close(
                parameter.grad, wanted, rtol=1e-4, atol=1e-6 * wanted.abs().max().item()
            )
        every_head_learns(made.trainee.heads)


def every_head_learns(heads: MedusaHeads) -> None:
    for k in range(HEADS):
        for block in range(BLOCKS):
            assert heads.weight.grad[block, k].abs().max() > 0  # type: ignore[index]
            assert heads.bias.grad[block, k].abs().max() > 0  # type: ignore[index]
        if heads.lm_heads is not None:
            assert heads.lm_heads.grad[k].abs().max() > 0  # type: ignore[index]


def test_what_the_meter_tells_is_counted_right() -> None:
    recipe = RECIPES["medusa2"]
    made = setting(recipe, "llama", own=True)
    made.trainee(**batch())
    told = made.trainee.meter.read()
    for k, (terms, first, fifth) in enumerate(plain_heads(made)):
        assert told["head_loss"][k] == pytest.approx(torch.stack(terms).mean().item())
        assert told["top1"][k] == pytest.approx(sum(first) / len(first))
        assert told["top5"][k] == pytest.approx(sum(fifth) / len(fifth))
    assert sum(told["top5"]) > 0
    assert told["backbone_loss"] == pytest.approx(plain_backbone(made, distilled=False).item())
    assert made.trainee.meter.read() == {}


def test_a_batch_without_targets_has_no_loss_and_counts_for_nothing() -> None:
    made = setting(RECIPES["medusa2"], "llama", own=True)
    made.trainee(**batch())
    alone = made.trainee.meter.read()
    empty = batch()
    empty["labels"] = torch.full_like(empty["labels"], IGNORED)
    made.trainee(**batch())
    (loss,) = made.trainee(**empty)
    loss.backward()
    assert loss.item() == 0
    told = made.trainee.meter.read()
    assert told["head_loss"] == alone["head_loss"]
    assert told["top1"] == alone["top1"]


@pytest.mark.parametrize("name", ["medusa2", "medusa2, whole"])
def test_heads_first_leaves_the_backbone_without_a_gradient(name: str) -> None:
    recipe = replace(RECIPES[name], heads_first=0.4)  # of 10 steps, the first four
    made = setting(recipe, "llama", own=False)
    heads = sum(
        0.8**k * torch.stack(terms).mean() for k, (terms, *_) in enumerate(plain_heads(made), 1)
    )
    for step, learns in ((3, False), (4, True)):
        made.trainee.zero_grad()
        made.trainee.step = step
        (loss,) = made.trainee(**batch())
        loss.backward()
        expected = torch.as_tensor(0.2 * heads).item()
        if learns:
            expected += plain_backbone(made, distilled=False).item()
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        backbone = [p.grad for p in made.trainee.backbone.parameters() if p.requires_grad]
        assert all((gradient is not None) is learns for gradient in backbone)
        every_head_learns(made.trainee.heads)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    for name in ("medusa2", "medusa2, whole", "distilled"):
        found = []
        for on in (False, True):
            trainee = setting(RECIPES[name], "llama", own=False).trainee
            if on:
                checkpoint_activations(trainee.backbone)
            calls: list[int] = []
            trainee.backbone.model.layers[0].mlp.register_forward_pre_hook(
                lambda *_, calls=calls: calls.append(1)
            )
            trainee(**batch())[0].backward()
            found.append([p.grad for p in trainee.parameters() if p.grad is not None])
            assert (
                len(calls) == (2 if name == "distilled" else 1) + on
            )  # once more in the backward pass
        for plain, checkpointed in zip(*found, strict=True):
            torch.testing.assert_close(checkpointed, plain, rtol=1e-6, atol=1e-9)


def test_the_teacher_drops_nothing_out() -> None:
    """In training mode a backbone with dropout differs each time; its teacher does not."""
    recipe = replace(RECIPES["distilled"], lora_dropout=0.5)
    backbone = random_model("llama", attention_dropout=0.5).requires_grad_(False)
    trainee = Trainee(backbone, MedusaHeads(HEADS, 1, 32), recipe, adapt(backbone, recipe))
    trainee.train()
    ids, positions = batch()["input_ids"], batch()["position_ids"]
    with torch.no_grad():
        with_dropout = [trainee.hidden_states(ids, positions) for _ in range(2)]
        assert not torch.equal(*with_dropout)
        with trainee.without_adapter():
            first, second = (trainee.hidden_states(ids, positions) for _ in range(2))
        assert torch.equal(first, second)
        model = random_model("llama").model
        plain = model(input_ids=ids, position_ids=positions, use_cache=False)[0]
    torch.testing.assert_close(first, plain)
    assert backbone.training
    assert all(p.requires_grad for n, p in backbone.named_parameters() if "lora_" in n)


def test_targets_of_a_head_begin_and_end_with_its_document() -> None:
    labels = torch.tensor([[0, 1, 2, 3, 10, 11, 12, 13]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    no = IGNORED
    assert losses.head_targets(labels, positions, 0).tolist() == [[1, 2, 3, no, 11, 12, 13, no]]
    assert losses.head_targets(labels, positions, 1).tolist() == [[2, 3, no, no, 12, 13, no, no]]
    assert losses.head_targets(labels, positions, 2).tolist() == [[3, no, no, no, 13, no, no, no]]
    for far in (3, 7, 8, 20):
        assert losses.head_targets(labels, positions, far).tolist() == [[no] * 8]


def test_a_head_learns_the_token_that_many_places_ahead() -> None:
    """In text that counts up, the target of head k at token t is t + k + 1."""
    ids = list(range(20))
    rows = PackedRows([Example(ids, [True] * 20)], 20)
    for k in range(4):
        labels, positions = (rows[0][key][None] for key in ("labels", "position_ids"))
        targets = losses.head_targets(labels, positions, k)[0].tolist()
        assert targets == [ids[t] + k + 1 if t + k + 1 < 20 else IGNORED for t in range(20)]
