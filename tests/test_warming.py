"""The steps before the first reply leave nothing behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from medusa_chat.decoding.trees.policy import Policy
from medusa_chat.decoding.warming import STEPS, warm_up
from tests.helpers.tiny import PROMPT, decode, ids_of, make_engine, random_heads

if TYPE_CHECKING:
    from collections.abc import Callable

    from medusa_chat.decoding.engine import Engine
    from medusa_chat.model.backbone import Backbone


@pytest.fixture(params=["heads", "no heads"])
def fresh(request: pytest.FixtureRequest, backbone: Backbone) -> Callable[[], Engine]:
    heads = random_heads(backbone) if request.param == "heads" else None
    return lambda: make_engine(backbone, heads)


@pytest.fixture
def learners(monkeypatch: pytest.MonkeyPatch) -> list[Policy]:
    """The policies that learned from a step, one for each step."""
    found: list[Policy] = []
    learn = Policy.learn

    def spied(policy: Policy, *arguments: Any) -> None:
        found.append(policy)
        learn(policy, *arguments)

    monkeypatch.setattr(Policy, "learn", spied)
    return found


def test_the_first_reply_is_as_without_them(
    fresh: Callable[[], Engine], learners: list[Policy]
) -> None:
    cold, warm = fresh(), fresh()
    own = warm.trees
    warm_up(warm)
    assert 1 <= len(learners) <= STEPS
    assert own.policy not in learners
    assert warm.trees is own
    assert (warm.tokens_in_context, warm.text, warm.prefilled) == (0, [], 0)
    mode = "greedy" if warm.heads else "vanilla"
    one, other = (decode(each, PROMPT, mode=mode, max_new_tokens=24) for each in (cold, warm))
    assert ids_of(one) == ids_of(other)
    assert [step.nodes for step in one] == [step.nodes for step in other]


def test_a_slow_model_takes_one(
    fresh: Callable[[], Engine], learners: list[Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(1000))
    monkeypatch.setattr("medusa_chat.decoding.warming.clock", lambda: next(seconds))
    warm_up(fresh())
    assert len(learners) == 1


def test_a_short_context_is_enough(backbone: Backbone) -> None:
    engine = make_engine(backbone, random_heads(backbone), context=8)
    warm_up(engine)
    assert decode(engine, PROMPT[:6], max_new_tokens=2)
