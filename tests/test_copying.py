"""Guesses copied from the conversation: the index, what it learns, and that replies stay right."""

from __future__ import annotations

from math import exp, log
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_chat.config import UserError
from medusa_chat.decoding.acceptance import make_rule
from medusa_chat.decoding.draft.copies import CHAIN, COPY_PRIOR, GRAMS, LONGEST, Copied, Copies
from medusa_chat.events import COPIED
from medusa_chat.sampling import Sampling
from medusa_chat.stats import Stats
from tests.helpers.tiny import (
    OracleHeads,
    decode,
    ids_of,
    make_engine,
    prompt_ids,
    random_backbone,
    random_heads,
    reply,
)

if TYPE_CHECKING:
    from medusa_chat.model.backbone import Backbone

NEW = 60
LOOP = [5, 9, 3, 7, 11, 2, 8]


def by_brute_force(text: list[int]) -> tuple[list[int], int] | None:
    """The chain after the latest occurrence of the longest run of GRAMS, and the match's length."""
    for gram in reversed(GRAMS):
        for place in range(len(text) - 1, gram - 1, -1):
            if gram < len(text) and text[place - gram : place] == text[-gram:]:
                chain: list[int] = []
                while len(chain) < CHAIN:
                    chain.append((text + chain)[place + len(chain)])
                match = next(
                    n for n in range(place + 1) if n == place or text[place - 1 - n] != text[-1 - n]
                )
                return chain, min(match, LONGEST)
    return None


edits = st.lists(
    st.one_of(st.lists(st.integers(0, 2), min_size=1, max_size=8), st.integers(0, 20)),
    min_size=1,
    max_size=12,
)


@given(edits=edits)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_proposals_are_those_of_brute_force_however_the_text_is_cut_and_goes_on(edits: Any) -> None:
    copies = Copies()
    text: list[int] = []
    for edit in edits:
        if isinstance(edit, int):
            copies.rewind(edit)
            text = text[:edit]
        else:
            copies.extend(edit)
            text += edit
        assert len(copies) == len(text)
        found, expected = copies.propose(), by_brute_force(text)
        assert (found and (list(found.tokens), found.match)) == expected
    copies.rewind(0)
    assert vars(copies) == vars(Copies())  # nothing is left


def test_what_is_right_grows_likelier_and_what_is_wrong_less() -> None:
    copies = Copies()
    copies.extend([1, 2, 3, 4, 1, 2])
    first = copies.propose()
    assert first is not None
    assert first.tokens[:4] == (3, 4, 1, 2)
    assert first.match == 2
    # The hundredth that keeps logarithms finite changes a prior by next to nothing.
    assert [exp(value) for value in first.log_p[:3]] == pytest.approx(COPY_PRIOR[1:4], rel=0.01)
    assert first.promise == pytest.approx(1 + sum(_products([exp(value) for value in first.log_p])))
    copies.learn(first, [3, 9, 1])
    second = copies.propose()
    assert second is not None
    assert second.log_p[0] > first.log_p[0]  # a match of two was right,
    assert second.log_p[1] < first.log_p[1]  # one of three then was not,
    assert second.log_p[2:] == first.log_p[2:]  # and what came after the miss says nothing
    for _ in range(20000):
        copies.learn(first, [9])
    hopeless = copies.propose()
    assert hopeless is not None
    assert -20 < hopeless.log_p[0] < log(0.001)


def _products(chances: list[float]) -> list[float]:
    products = [1.0]
    for chance in chances:
        products.append(products[-1] * chance)
    return products[1:]


# ---- in the engine ----


@pytest.fixture(scope="module")
def loop_text() -> tuple[Backbone, list[int]]:
    """A model that falls into a loop, and a prompt with its reply."""
    backbone = random_backbone(initializer_range=0.02, tie_word_embeddings=True)
    prompt = prompt_ids(12)
    return backbone, prompt + reply(
        make_engine(backbone), prompt, mode="vanilla", temperature=0, max_new_tokens=NEW
    )


def test_a_model_without_heads_gains_from_copies_alone(
    loop_text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, text = loop_text
    prompt, expected = text[:12], text[12:]
    engine = make_engine(backbone, copies=True)
    steps = decode(engine, prompt, max_new_tokens=NEW)
    assert ids_of(steps) == expected
    assert {token.head for step in steps for token in step.tokens} == {0, COPIED}
    assert (Stats.of(steps).acceptance_length or 0) > 3
    assert "copied text only" in engine.trees.describe()
    sampling = {"mode": "exact", "temperature": 0.8, "seed": 3, "max_new_tokens": NEW}
    drawn = reply(make_engine(backbone), prompt, **(sampling | {"mode": "vanilla"}))
    assert reply(engine, prompt, **sampling) == drawn
    engine.trees.use_copies(False)
    with pytest.raises(UserError, match="no Medusa heads"):
        engine.generate(prompt, Sampling())
    engine.trees.use_copies(True)
    monkeypatch.setattr(
        "medusa_chat.decoding.trees.policy.LEAST_PROMISE", 1 + CHAIN
    )  # no chain promises so much
    steps = decode(engine, prompt, max_new_tokens=NEW)
    assert ids_of(steps) == expected
    assert {(step.kind, step.nodes, step.tested) for step in steps} == {("vanilla", 1, ())}


@pytest.mark.parametrize("tree", ["dynamic-16", "static-8", "chain-3"])
def test_copies_fill_a_tree_whose_heads_know_nothing(loop_text: Any, tree: Any) -> None:
    backbone, text = loop_text
    engine = make_engine(backbone, random_heads(backbone), tree, copies=True)
    steps = decode(engine, text[:12], max_new_tokens=NEW)
    assert text[:12] + ids_of(steps) == text
    assert max(step.accepted for step in steps) >= 3
    assert all(step.nodes == len(engine.trees.current) for step in steps)
    copied = [token for step in steps for token in step.tokens if token.head == COPIED]
    stats = Stats.of(steps)
    assert stats.accepted[COPIED] == len(copied) > 10
    assert stats.reached[COPIED] >= stats.accepted[COPIED]
    engine.trees.use_copies(False)
    without = Stats.of(decode(engine, text[:12], max_new_tokens=NEW))
    assert 1.5 * (without.acceptance_length or 0) < (stats.acceptance_length or 0)


def test_a_node_that_both_propose_counts_as_the_heads(loop_text: Any) -> None:
    backbone, text = loop_text
    engine = make_engine(backbone, OracleHeads(4, 64, text, (0,)), "dynamic-8", copies=True)
    steps = decode(engine, text[:12], max_new_tokens=NEW)
    assert text[:12] + ids_of(steps) == text
    heads = [token.head for step in steps for token in step.tokens]
    assert heads.count(1) > 5
    for step in steps[
        :-1
    ]:  # the oracle is right to its depth; only what is deeper can be the copies' own
        kinds = [token.head for token in step.tokens]
        assert kinds[:5] == [0, 1, 2, 3, 4][: len(kinds)]
        assert set(kinds[5:]) <= {COPIED}
    assert COPIED in heads


def test_a_reply_that_is_cut_and_regenerated_copies_from_what_stayed(loop_text: Any) -> None:
    backbone, text = loop_text
    engine = make_engine(backbone, random_heads(backbone), "dynamic-8", copies=True)
    steps = engine.generate(text[:12], Sampling(max_new_tokens=NEW))
    for _ in range(6):
        next(steps)
    steps.close()
    kept = engine.text[:]
    assert kept == text[: len(kept)]
    fresh = make_engine(backbone)
    fresh.runner.prefill(kept, make_rule(Sampling()))
    ours, theirs = (each.runner.cache.buffer[:, :, :, : len(kept)] for each in (engine, fresh))
    assert ours.allclose(theirs, atol=1e-4)
    other = [*text[:8], *LOOP, *LOOP]
    expected = reply(
        make_engine(backbone), other, mode="vanilla", temperature=0, max_new_tokens=NEW
    )
    assert reply(engine, other, max_new_tokens=NEW) == expected
    grown = [*other, *expected]
    copies = engine.trees.policy.copies
    assert copies.text == grown[: len(copies)]
    assert (
        len(grown) - len(copies) <= CHAIN + 1
    )  # what the last step settled comes in with the next one
    assert reply(engine, text[:12], max_new_tokens=NEW) == text[12:]


def test_the_end_of_the_context_is_filled_to_its_last_place(loop_text: Any) -> None:
    backbone, text = loop_text
    engine = make_engine(backbone, random_heads(backbone), "dynamic-16", copies=True, context=40)
    steps = decode(engine, text[:12], max_new_tokens=NEW)
    assert text[:12] + ids_of(steps) == text[:40]
    assert steps[-1].finish == "context"


def test_a_guess_after_the_end_of_a_reply_was_not_tested(loop_text: Any) -> None:
    """A reply that ends inside the accepted path says nothing about who would have come next."""
    backbone, text = loop_text
    engine = make_engine(backbone, OracleHeads(4, 64, text, (0,)), "chain-4")
    (step,) = decode(engine, text[:12], max_new_tokens=3)
    assert ([token.head for token in step.tokens], step.tested) == ([0, 1, 2], (1, 2))
    engine = make_engine(backbone, OracleHeads(2, 64, text, (0,)), "chain-2")
    (step,) = decode(engine, text[:12], max_new_tokens=4)
    assert ([token.head for token in step.tokens], step.tested) == ([0, 1, 2, 0], (1, 2))


def test_a_chain_is_a_plain_value() -> None:
    assert Copied((1,) * CHAIN, (-0.1,) * CHAIN, 3) == Copied((1,) * CHAIN, (-0.1,) * CHAIN, 3)
