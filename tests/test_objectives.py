"""Each choice of `train --loss` and its gradient, compared with plain arithmetic in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from medusa_chat.config import make_recipe
from medusa_chat.training import reference, scoring
from medusa_chat.training.data import IGNORED, PackedRows
from medusa_chat.training.entropy import summed_entropy
from medusa_chat.training.kept_states import keep_states
from medusa_chat.training.objectives import (
    acceptance_loss,
    compare,
    distance,
    divergence,
    objective_of,
)
from medusa_chat.training.reference import Likeliest, likeliest
from tests.helpers.tiny import random_model
from tests.test_losses import (
    ALONE,
    BLOCKS,
    DOCUMENTS,
    HEADS,
    RANKED,
    SMALL,
    VOCABULARY,
    Setting,
    batch,
    bias_of,
    run,
    setting,
    shares,
)

if TYPE_CHECKING:
    from pathlib import Path

KEPT = 20  # of the 64 tokens, so that the rest has some mass


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a part of the vocabulary."""
    monkeypatch.setattr(reference, "LIKELIEST", KEPT)


def head_shares(made: Setting, x: Tensor, k: int, parent: int) -> Tensor:
    """q of head k, among the tokens that it ranks."""
    for block in range(BLOCKS):
        z = made.leaves["heads.weight"][block, k - 1] @ x + made.leaves["heads.bias"][block, k - 1]
        x = x + z / (1 + (-z).exp())
    own = made.leaves.get("heads.lm_heads")
    output = made.weights["lm_head.weight"]
    logits = (output[made.ranked] if own is None else own[k - 1]) @ x
    return shares(logits + bias_of(made, parent))


def outcomes(made: Setting, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """p and q of the outcomes: each kept token that the head ranks, and all others."""
    kept = [int(token) for token in p.sort(descending=True).indices[: reference.LIKELIEST]]
    kept = [token for token in kept if token in made.ranked]
    ours = torch.stack([q[made.ranked.index(token)] for token in kept])
    theirs = p[kept].detach()
    if len(kept) == VOCABULARY:
        return theirs, ours
    return torch.cat([theirs, 1 - theirs.sum()[None]]), torch.cat([ours, 1 - ours.sum()[None]])


def plain_term(made: Setting, loss: str, q: Tensor, p: Tensor, target: int) -> tuple[Tensor, Any]:
    """The loss of one place towards p, and the cross entropy of its target, None if unranked."""
    entropy = -q[made.ranked.index(target)].log() if target in made.ranked else None
    a, b = outcomes(made, q, p)
    if loss == "lk":
        return -torch.stack([min(x, y) for x, y in zip(a, b, strict=True)]).sum().log(), entropy
    if loss == "kl":
        return (a * (a / b).log()).sum(), entropy
    return (a - b).abs().sum(), entropy


def plain_loss(made: Setting, loss: str) -> Tensor:
    """The weighted sum of all heads' losses."""
    weighted = []
    for k in range(1, HEADS + 1):
        terms, entropies = [], []
        for ids, start in ALONE:
            hidden, logits = run(made.base, made.weights, ids)
            for t in range(max(start - k - 1, 0), len(ids) - k - 1):
                q = head_shares(made, hidden[t], k, ids[t + k])
                term, entropy = plain_term(made, loss, q, shares(logits[t + k]), ids[t + k + 1])
                terms.append(term)
                if entropy is not None:
                    entropies.append(entropy)
        mean = torch.stack(terms).mean()
        if loss == "l1":
            mean = 0.1 * torch.stack(entropies).mean() + 0.9 * mean
        weighted.append(0.8**k * mean)
    return torch.stack(weighted).sum()


def plain_until_fail(made: Setting) -> tuple[Tensor, list[list[Tensor]]]:
    """The loss of `until-fail`, and each head's terms that count."""
    counted: list[list[Tensor]] = [[] for _ in range(HEADS)]
    targets = [0] * HEADS
    for ids, start in ALONE:
        hidden, _ = run(made.base, made.weights, ids)
        for t in range(len(ids)):
            right = True
            for k in range(1, HEADS + 1):
                place = t + k + 1
                if not max(start, 1) <= place < len(ids):
                    right = False
                    continue
                ranked = ids[place] in made.ranked
                targets[k - 1] += ranked
                q = head_shares(made, hidden[t], k, ids[t + k])
                if right and ranked:
                    counted[k - 1].append(-q[made.ranked.index(ids[place])].log())
                right = right and made.ranked[int(q.argmax())] == ids[place]
    sums = [torch.stack(terms).sum() if terms else torch.tensor(0.0) for terms in counted]
    parts = [0.8 ** (k + 1) * sums[k] / targets[k] for k in range(HEADS)]
    return torch.stack(parts).sum(), counted


def check(made: Setting, expected: Tensor, given: dict[str, Tensor], monkeypatch: Any) -> None:
    leaves = made.leaves
    gradients = torch.autograd.grad(expected, list(leaves.values()), allow_unused=True)
    for logits in (2**27, 5 * VOCABULARY * HEADS):  # at once, and five rows at a time
        monkeypatch.setattr(scoring, "LOGITS", logits)
        monkeypatch.setattr(scoring, "CACHED", logits // HEADS // 2)
        made.trainee.zero_grad()
        (loss,) = made.trainee(**given)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        loss.backward()
        parameters = dict(made.trainee.named_parameters())
        for name, wanted in zip(leaves, gradients, strict=True):
            found = parameters[name].grad
            assert found is not None
            wanted = torch.zeros_like(found) if wanted is None else wanted
            torch.testing.assert_close(
                found, wanted, rtol=1e-4, atol=1e-5 * max(wanted.abs().max().item(), 1e-3)
            )


VARIANTS = pytest.mark.parametrize(
    ("ranked", "bias", "own"),
    [
        (None, False, False),
        (None, True, True),
        (RANKED, False, True),
        (RANKED, True, False),
    ],
    ids=["plain", "bias", "vocabulary", "both"],
)


@VARIANTS
@pytest.mark.parametrize("loss", ["lk", "kl", "l1"])
def test_losses_towards_the_backbones_distribution(
    loss: str, ranked: list[int] | None, bias: bool, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = setting(make_recipe("medusa1", **SMALL, loss=loss), "llama", own, ranked, bias)
    check(made, plain_loss(made, loss), batch(), monkeypatch)


@pytest.mark.parametrize("ranked", [None, RANKED], ids=["all tokens", "vocabulary"])
@pytest.mark.parametrize("loss", ["lk", "kl", "l1"])
def test_the_kept_distribution_gives_the_same_loss(
    loss: str, ranked: list[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("medusa1", **SMALL, loss=loss, batch_size=1)
    made = setting(recipe, "llama", False, ranked, True)
    kept = keep_states(
        made.trainee.backbone, PackedRows(DOCUMENTS, 16), recipe, tmp_path, torch.float32, print
    )
    given = {name: torch.stack([kept[0][name], kept[1][name]]) for name in kept[0]}
    assert given["likely_tokens"].shape == given["likely_log_p"].shape == (2, 16, KEPT)
    monkeypatch.setattr(made.trainee, "hidden_states", None)
    check(made, plain_loss(made, loss), given, monkeypatch)


@pytest.mark.parametrize("name", ["medusa2", "distilled"])
def test_a_trained_backbone_is_compared_with_itself_and_learns_nothing_from_it(name: str) -> None:
    """Heads learn from p; p does not learn from heads."""
    found = []
    for loss in ("lk", "ce"):
        recipe = make_recipe(name, **SMALL, loss=loss, lambda_0=0.5, ramp="constant")
        made = setting(recipe, "llama", own=False)
        (total,) = made.trainee(**batch())
        found.append((made, total.item()))
    made, total = found[0]
    heads = 0.5 * plain_loss(made, "lk").item()
    backbone = made.trainee.meter.read()["backbone_loss"]
    assert total == pytest.approx(heads + backbone, rel=1e-5)
    assert total != pytest.approx(found[1][1], rel=1e-3)


@VARIANTS
def test_until_fail_counts_what_heads_before_have_right(
    ranked: list[int] | None, bias: bool, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = setting(make_recipe("medusa1", **SMALL, loss="until-fail"), "llama", own, ranked, bias)
    teach(made)
    expected, counted = plain_until_fail(made)
    assert len(counted[0]) > len(counted[1]) > len(counted[2]) > 0
    check(made, expected, batch(), monkeypatch)
    made.trainee.meter.read()
    made.trainee(**batch())
    told = made.trainee.meter.read()
    for k, terms in enumerate(counted):
        assert told["head_loss"][k] == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)
    assert 0 < told["top1"][0] <= told["top5"][0] <= 1


def teach(made: Setting) -> None:
    """Train heads on the batch until each has a part of it right."""
    recipe = made.trainee.recipe
    made.trainee.recipe = make_recipe("medusa1", **SMALL)
    parameters = [p for p in made.trainee.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        (loss,) = made.trainee(**batch())
        loss.backward()
        optimizer.step()
        told = made.trainee.meter.read()["top1"]
        if min(told) > 0.5:
            break
    made.trainee.recipe = recipe
    for name, parameter in made.trainee.named_parameters():
        if name in made.leaves:
            made.leaves[name].data.copy_(parameter)


@pytest.mark.parametrize("loss", ["ce", "until-fail", "lk", "kl", "l1"])
def test_a_batch_without_targets_teaches_nothing(loss: str) -> None:
    made = setting(make_recipe("medusa1", **SMALL, loss=loss), "llama", True, RANKED, True)
    empty = batch()
    empty["labels"] = torch.full_like(empty["labels"], IGNORED)
    (total,) = made.trainee(**empty)
    total.backward()
    assert total.item() == 0
    gradients = [p.grad for p in made.trainee.parameters() if p.grad is not None]
    assert all(gradient.abs().max() == 0 for gradient in gradients)
    told = made.trainee.meter.read()
    assert told["head_loss"] == told["top1"] == told["top5"] == [0, 0, 0]  # of no batch


# ---- the distribution ----


def test_the_likeliest_tokens_are_found_where_they_are_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm_head = random_model("llama").lm_head
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    wanted = torch.arange(18).view(2, 9) % 3 > 0
    whole = lm_head(hidden).log_softmax(-1).sort(-1, descending=True)
    for logits in (2**26, 5 * VOCABULARY):
        monkeypatch.setattr(reference, "LOGITS", logits)
        found = likeliest(hidden, lm_head, wanted)
        assert torch.equal(found.tokens[wanted], whole.indices[wanted][:, :KEPT].int())
        torch.testing.assert_close(found.log_p[wanted], whole.values[wanted][:, :KEPT])
        assert found.tokens[~wanted].abs().max() == found.log_p[~wanted].abs().max() == 0
    nothing = likeliest(hidden, lm_head, torch.zeros_like(wanted))
    assert nothing.log_p.abs().max() == 0
    monkeypatch.setattr(reference, "LIKELIEST", 1000)
    assert likeliest(hidden, lm_head, wanted).tokens.shape == (2, 9, VOCABULARY)


def test_a_whole_distribution_has_the_losses_of_a_textbook() -> None:
    """Without a rest the outcomes are the tokens."""
    logits = torch.randn(2, 3, VOCABULARY, generator=torch.Generator().manual_seed(1))
    p, q = logits.double().softmax(-1)
    overlap = torch.minimum(p, q).sum(-1)
    log_p, log_q = p.log(), q.log()
    torch.testing.assert_close(acceptance_loss(log_p, log_q), -overlap.log())
    torch.testing.assert_close(divergence(log_p, log_q), (p * (p / q).log()).sum(-1))
    torch.testing.assert_close(distance(log_p, log_q), 2 * (1 - overlap))


@pytest.mark.parametrize("loss", ["lk", "kl", "l1"])
def test_a_vocabulary_that_is_kept_whole_has_no_rest(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "LIKELIEST", VOCABULARY)
    made = setting(make_recipe("medusa1", **SMALL, loss=loss), "llama", False)
    (found,) = made.trainee(**batch())
    assert found.item() == pytest.approx(plain_loss(made, loss).item(), rel=1e-5)


@pytest.mark.parametrize("loss", ["lk", "kl", "l1"])
@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_a_head_that_is_certain_of_something_wrong_has_a_finite_gradient(
    loss: str, scale: float
) -> None:
    """In float32 q of all of p's tokens may vanish, or q of the rest."""
    p = torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(2)).softmax(-1)
    order = p.sort(-1, descending=True)
    likely = Likeliest(order.indices[:, :KEPT].int(), order.values[:, :KEPT].log())
    targets = order.indices[:, 3]
    comparison = compare(likely, targets, None)
    objective = objective_of(loss, comparison, torch.ones_like(targets, dtype=torch.bool))
    picked = torch.cat([targets[:, None], comparison.tokens], -1)
    for certain in (order.indices[:, 0], order.indices[:, -1]):
        rows = torch.zeros(6, VOCABULARY).scatter_(-1, certain[:, None], scale).requires_grad_()
        found = scoring.score(rows, picked, torch.eye(VOCABULARY), objective).loss
        (gradient,) = torch.autograd.grad(found, rows)
        assert math.isfinite(found.item())
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 10


# ---- the pass ----


def test_no_gradient_is_asked_for_where_none_is_wanted() -> None:
    lm_head = random_model("llama").lm_head
    rows = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(7)
    found = [scoring.score(rows, targets[:, None], lm_head, summed_entropy)]
    with torch.no_grad():
        found.append(scoring.score(rows, targets[:, None], lm_head, summed_entropy))
    assert [scores.loss.requires_grad for scores in found] == [True, False]
    expected = torch.nn.functional.cross_entropy(lm_head(rows), targets, reduction="sum")
    for scores in found:
        torch.testing.assert_close(scores.loss, expected)


def test_bfloat16_autocast_comes_close_to_float32() -> None:
    recipe = make_recipe("medusa1", **SMALL)
    made = setting(recipe, "llama", own=True, bias=True)
    made.trainee.float()
    found = []
    for on in (False, True):
        made.trainee.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            (loss,) = made.trainee(**batch())
        loss.backward()
        found.append((loss, [p.grad for p in made.trainee.parameters() if p.grad is not None]))
    assert found[1][0].item() == pytest.approx(found[0][0].item(), rel=0.02)
    for ours, theirs in zip(found[1][1], found[0][1], strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.05 * theirs.norm()
