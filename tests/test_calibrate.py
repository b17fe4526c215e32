"""calibrate: counts along a reply, the forecast that follows, and its check by decoding."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pytest
import torch

import medusa_chat
from medusa_chat.config import UserError
from medusa_chat.decoding.trees.accuracy import Accuracy
from medusa_chat.decoding.trees.growth import grow
from medusa_chat.decoding.trees.tree import Tree, chain, named_tree
from medusa_chat.model.heads import MedusaHeads
from medusa_chat.prompts import Prompt
from medusa_chat.sampling import Sampling
from medusa_chat.stats import Stats
from medusa_chat.training import calibration
from medusa_chat.training.calibration import (
    acceptance_length,
    calibrate,
    check_forecast,
    held_aside,
    with_paths,
)
from medusa_chat.training.observations import Ranks, guessed, observe
from tests.helpers.tiny import make_engine, random_backbone, random_heads, random_tree

if TYPE_CHECKING:
    from medusa_chat.decoding.engine import Engine

TOP = (tuple(rank / 20 for rank in range(1, 21)),) * 3


def test_calibrate_counts_what_the_heads_get_right() -> None:
    backbone = random_backbone("llama", 320)
    # Untrained heads repeat the LM head's token, so head 1 is right if a token comes twice.
    engine = make_engine(backbone, MedusaHeads(2, 1, backbone.hidden_size))
    prompts = [Prompt("t", ("Hi there",)), Prompt("t", ("Bye", "So long"))]
    accuracy = calibrate(engine, prompts, max_new_tokens=24)
    right = tested = 0
    for prompt in prompts:
        messages: list[Any] = []
        for turn in prompt.turns:
            messages.append({"role": "user", "content": turn})
            steps = list(engine.generate(messages, Sampling(max_new_tokens=24)))
            ids = [t.id for s in steps for t in s.tokens]
            right += sum(a == b for a, b in pairwise(ids))
            tested += len(ids) - 1
            messages.append({"role": "assistant", "content": "".join(s.text for s in steps)})
    assert accuracy.top[0][0] == pytest.approx(right / tested)
    assert all(list(row) == sorted(row) for row in accuracy.top)
    assert accuracy.exact is not None
    assert len(accuracy.exact.coupling) == len(accuracy.exact.top) == 2
    assert set(accuracy.paths) >= {path[:-1] for path in accuracy.paths if len(path) > 1}
    assert all(
        share <= accuracy.frequency(path[:-1]) <= 1 for path, share in accuracy.paths.items()
    )


# ---- walking along a reply, against decoding it ----


def ranks_of(engine: Engine, prompt: list[int], reply: list[int]) -> Ranks:
    ranker = engine.runner.guessing("none", Accuracy(())).ranker()
    observed = observe(engine, prompt, reply, Sampling())
    return guessed(observed, ranker, engine.backbone.vocabulary).ranks


def decoded_and_walked(
    engine: Engine, tree: Tree, prompts: list[Any], limit: int
) -> tuple[Stats, float | None]:
    """Decode greedily with a tree; returns its stats, and the length from walking the replies."""
    engine.trees.use(tree)
    stats, replies = Stats(), []
    for prompt in prompts:
        ids = engine.encode(prompt)
        steps = list(engine.generate(ids, Sampling(max_new_tokens=limit)))
        for step in steps:
            stats.add(step)
        reply = [token.id for step in steps for token in step.tokens]
        replies.append(ranks_of(engine, ids, reply) if len(reply) > 1 else [])
    return stats, acceptance_length(tree, replies)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 20])
def test_the_walk_is_the_decoding(limit: int) -> None:
    """Random heads over 12 tokens are often right. Replies end at the limit or at an EOS."""
    backbone = random_backbone(vocabulary=12)
    engine = make_engine(backbone, random_heads(backbone, 3), eos=frozenset({3, 7}))
    draw = random.Random(limit)
    prompts = [[draw.randrange(12) for _ in range(draw.randrange(4, 30))] for _ in range(30)]
    lengths = []
    for tree in (
        chain(3),
        random_tree(1, 20, 3, 6),
        random_tree(2, 60, 3, 12, spine=3),
        Tree.of([[4], [5], [5, 0]]),
    ):
        stats, walked = decoded_and_walked(engine, tree, prompts, limit)
        assert walked == stats.acceptance_length
        lengths.append(walked)
    assert lengths[0] is None if limit == 1 else len(set(lengths)) > 1


def test_the_walk_is_the_decoding_of_the_bundled_model() -> None:
    engine = medusa_chat.load(
        dtype="float32", tree="chain-1", probing=False, copies=False, engine="torch"
    )
    asked = [
        "Hello!",
        "Tell me a short fairy tale.",
        "What is the capital of France?",
        "I need a cheap hotel, please.",
    ]
    prompts: list[Any] = [[{"role": "user", "content": text}] for text in asked]
    for tree in (chain(4), named_tree("mc_sim_7b_63").pruned(4, 20)):
        stats, walked = decoded_and_walked(engine, tree, prompts, 128)
        assert walked == stats.acceptance_length
        assert walked is not None
        assert walked > 1.5


def test_the_walk_by_hand() -> None:
    reply: Ranks = [(0, 1, 0), (2,), (), (0,), (1, 0)]  # and one more token, which closes the reply
    assert acceptance_length(chain(1), [reply]) == (2 + 1 + 2) / 3  # steps begin at 0, 2 and 3
    assert acceptance_length(Tree.of([[0], [0, 1]]), [reply, []]) == (3 + 2) / 2  # at 0 and 3
    assert acceptance_length(Tree.of([[1], [1, 0]]), [reply]) == (1 + 1 + 1 + 1 + 3) / 5
    assert acceptance_length(chain(1), [[], []]) is None


# ---- from counts to frequencies ----


def test_paths_are_counted_where_steps_begin() -> None:
    """Every other token is easy. Steps accept it and begin at the ones before."""
    reply: Ranks = [(0,), ()] * 40
    accuracy = with_paths(Accuracy(TOP), [reply])
    assert accuracy.frequency((0,)) == pytest.approx(1.0)
    # A count at every token would give 1.5.
    assert grow(accuracy, 8)[1][-1] == pytest.approx(acceptance_length(chain(1), [reply]))


def bursts(replies: int, seed: int) -> list[Ranks]:
    """Replies with easy and hard stretches, where heads are right or wrong together."""
    draw = random.Random(seed)
    made: list[Ranks] = []
    for _ in range(replies):
        easy, reply = True, []
        for _ in range(20):
            easy = easy if draw.random() < 0.8 else not easy
            ranks = [min(int(draw.expovariate(1.5 if easy else 0.2)), 20) for _ in range(3)]
            reply.append(tuple(ranks[: next((i for i, rank in enumerate(ranks) if rank == 20), 3)]))
        made.append(reply)
    return made


def top_of(replies: list[Ranks]) -> Accuracy:
    """Accuracy of each head, counted where the heads before it did not miss."""
    rows = []
    for head in range(3):
        ranks = [ranks[head] for reply in replies for ranks in reply if len(ranks) > head]
        rows.append(tuple(accumulate(ranks.count(rank) / len(ranks) for rank in range(20))))
    return Accuracy(tuple(tuple(min(value, 1.0) for value in row) for row in rows))


def test_joint_counts_forecast_the_walk_and_choose_better_than_the_product() -> None:
    counted, fresh = bursts(400, 1), bursts(400, 2)
    product = top_of(counted)
    joint = with_paths(product, counted)
    gains = []
    for nodes in (8, 16, 32, 64):
        tree, forecast = grow(joint, nodes)
        assert forecast[-1] == pytest.approx(acceptance_length(tree, counted), rel=0.02)
        old = acceptance_length(grow(product, nodes)[0], fresh)
        gains.append((acceptance_length(tree, fresh) or 0) / (old or 1))
    assert min(gains) >= 1
    assert gains[-1] > 1.01


def test_few_counts_are_drawn_towards_independence(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = bursts(300, 99)

    def fresh_length() -> float:
        """Mean over small calibrations of what a large tree reaches on other text."""
        few = [bursts(4, seed) for seed in range(12)]
        trees = [grow(with_paths(top_of(replies), replies), 100)[0] for replies in few]
        return fmean(acceptance_length(tree, fresh) or 0 for tree in trees)

    with_prior = fresh_length()
    monkeypatch.setattr(calibration, "PRIOR_VISITS", 1e-6)
    assert with_prior > fresh_length() + 0.02


# ---- the check ----


def test_a_fifth_of_every_category_is_held_aside() -> None:
    prompts = [Prompt(f"c{number % 5}", (str(number),)) for number in range(50)]
    counted, aside = held_aside(prompts)
    assert sorted(map(hash, counted + aside)) == sorted(map(hash, prompts))
    assert [[prompt.category for prompt in aside].count(f"c{index}") for index in range(5)] == [
        2
    ] * 5
    assert held_aside(prompts[:4]) == (prompts[:4], [])


def test_the_check_decodes_with_the_trees_that_were_forecast() -> None:
    backbone = random_backbone(vocabulary=320)
    engine = make_engine(backbone, random_heads(backbone, 1))
    accuracy = Accuracy((tuple(rank / 20 for rank in range(1, 21)),))
    prompts = [Prompt("t", (f"prompt {number}",)) for number in range(6)]
    calls: list[tuple[int, int]] = []
    checks = check_forecast(
        engine, accuracy, prompts, 20, lambda done, total: calls.append((done, total))
    )
    assert [(check.tree, check.nodes) for check in checks] == [
        ("fixed", 8),
        ("fixed", 16),
    ]  # one head with 20 guesses does not fill 32 nodes
    assert calls == [(done, 12) for done in range(1, 13)]
    for check in checks:
        tree, forecast = grow(accuracy, check.nodes)
        engine.trees.use(tree)
        each = [
            Stats.of(engine.generate(prompt.opening(), Sampling(max_new_tokens=20)))
            for prompt in prompts
        ]
        steps, tokens = (
            [getattr(stats, name) for stats in each] for name in ("tree_steps", "tree_tokens")
        )
        assert check.forecast == forecast[-1]
        assert check.measured == sum(tokens) / sum(steps)
        spread = torch.tensor(tokens) - check.measured * torch.tensor(steps)
        assert check.error == pytest.approx(float(spread.norm()) / sum(steps))
    assert check_forecast(engine, accuracy, [], 20) == []


def test_a_prompt_that_fills_the_context_is_left_out() -> None:
    backbone = random_backbone("llama", 320, max_position_embeddings=24)
    engine = make_engine(backbone, random_heads(backbone, 2))
    with pytest.raises(UserError, match="try other prompts"):
        calibrate(engine, [Prompt("t", ("x" * 40,))])
