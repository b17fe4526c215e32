"""The cache across turns and interrupts: it equals a fresh prefill of the text that was kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from medusa_chat.decoding import eager
from medusa_chat.decoding.acceptance import make_rule
from medusa_chat.model.cache import KVCache
from medusa_chat.sampling import Sampling
from tests.helpers.tiny import (
    OracleHeads,
    decode,
    ids_of,
    make_engine,
    prompt_ids,
    random_backbone,
    random_tree,
    reply,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from medusa_chat.decoding.engine import Engine
    from medusa_chat.events import Step
    from medusa_chat.model.backbone import Backbone

NEW = 30
PROMPT = prompt_ids(14)
TREE = random_tree(3, 20, 4, 4, spine=4)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return random_backbone(request.param)


@pytest.fixture(scope="module")
def text(backbone: Any) -> list[int]:
    """The prompt and its greedy continuation, longer than any reply below."""
    return PROMPT + reply(
        make_engine(backbone), PROMPT, mode="vanilla", temperature=0, max_new_tokens=100
    )


def oracle_engine(
    backbone: Backbone, text: list[int], ranks: Any = (0, 1, 0, 2, -1), **settings: Any
) -> Engine:
    heads = OracleHeads(4, backbone.vocabulary, text, ranks)
    return make_engine(backbone, heads, TREE, **settings)


def assert_as_fresh(engine: Engine, kept: list[int]) -> None:
    """The cache holds `kept`, and its buffers are those of a prefill of it."""
    assert engine.text == kept
    assert engine.tokens_in_context == engine.runner.cache.length == len(kept)
    if kept:
        fresh = make_engine(engine.backbone)
        fresh.runner.prefill(kept, make_rule(Sampling()))
        ours, theirs = (each.runner.cache.buffer[:, :, :, : len(kept)] for each in (engine, fresh))
        assert torch.allclose(ours, theirs, atol=1e-4)


def assert_next_reply_as_fresh(engine: Engine, prompt: list[int]) -> None:
    expected = reply(
        make_engine(engine.backbone), prompt, mode="vanilla", temperature=0, max_new_tokens=12
    )
    for mode in ("greedy", "vanilla"):
        plain = {"mode": mode, "temperature": 0, "ignore_eos": True}
        assert reply(engine, prompt, **plain, max_new_tokens=12) == expected


# ---- the buffer itself ----


def test_commit_keeps_rows_in_order_and_rewind_drops_them() -> None:
    cache = KVCache(2, 1, 3, 10, torch.float32, torch.device("cpu"))
    rows = torch.arange(2 * 2 * 4 * 3, dtype=torch.float32).reshape(2, 2, 1, 4, 3)
    for layer in range(2):
        keys, values = cache.update(rows[0, layer][None], rows[1, layer][None], layer)
        assert keys.shape == values.shape == (1, 1, 4, 3)
    assert cache.length == 0
    cache.commit((0, 2, 3))
    assert cache.length == 3
    assert torch.equal(cache.buffer[:, :, :, :3], rows[:, :, :, [0, 2, 3]])
    more = -rows[:, :, :, :2]
    for layer in range(2):
        keys, _ = cache.update(more[0, layer][None], more[1, layer][None], layer)
        assert keys.shape[2] == 5
    cache.commit((1,))
    assert torch.equal(cache.buffer[:, :, :, 3], more[:, :, :, 1])
    cache.rewind(1)
    assert (cache.length, cache.capacity) == (1, 10)
    for wrong in (2, -1):
        with pytest.raises(ValueError, match="cannot rewind"):
            cache.rewind(wrong)


# ---- turns ----


def test_a_further_turn_prefills_only_what_is_new(backbone: Any, text: Any) -> None:
    engine = oracle_engine(backbone, text)
    first = reply(engine, PROMPT, max_new_tokens=NEW)
    assert engine.prefilled == len(PROMPT)
    assert_as_fresh(engine, (PROMPT + first)[:-1])  # the last token needed no forward of its own
    second_prompt = PROMPT + first + prompt_ids(9, seed=7)
    expected = reply(
        make_engine(backbone), second_prompt, mode="vanilla", temperature=0, max_new_tokens=NEW
    )
    assert reply(engine, second_prompt, max_new_tokens=NEW) == expected
    assert engine.prefilled == 9 + 1
    assert_as_fresh(engine, (second_prompt + expected)[:-1])


def test_an_edit_rewinds_to_where_the_texts_part(backbone: Any, text: Any) -> None:
    engine = oracle_engine(backbone, text)
    first = reply(engine, PROMPT, max_new_tokens=NEW)
    history = PROMPT + first
    for at in (0, 5, len(PROMPT), len(history) - 3):
        reply(engine, PROMPT, max_new_tokens=NEW)
        edited = [*history[:at], (history[at] + 1) % 64, *history[at + 1 :]]
        expected = reply(
            make_engine(backbone), edited, mode="vanilla", temperature=0, max_new_tokens=NEW
        )
        assert reply(engine, edited, max_new_tokens=NEW) == expected
        assert engine.prefilled == len(edited) - at


def test_undo_and_regeneration_prefill_one_token(backbone: Any, text: Any) -> None:
    engine = oracle_engine(backbone, text)
    first = reply(engine, PROMPT, max_new_tokens=NEW)
    assert reply(engine, PROMPT, max_new_tokens=NEW) == first
    assert engine.prefilled == 1
    reply(engine, PROMPT[:5], max_new_tokens=3)
    assert engine.prefilled == 1
    assert engine.tokens_in_context == 5 + 2
    engine.forget()
    assert reply(engine, PROMPT, max_new_tokens=NEW) == first
    assert engine.prefilled == len(PROMPT)


def test_a_shorter_and_an_unrelated_prompt(backbone: Any, text: Any) -> None:
    engine = oracle_engine(backbone, text)
    reply(engine, PROMPT, max_new_tokens=NEW)
    assert_next_reply_as_fresh(engine, prompt_ids(8, seed=99))
    assert_next_reply_as_fresh(engine, [PROMPT[0]])


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_prefill_in_chunks_equals_a_whole_one(
    backbone: Any, text: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = oracle_engine(backbone, text)
    expected = reply(whole, PROMPT, max_new_tokens=NEW)
    monkeypatch.setattr(eager, "PREFILL_ROWS", rows)
    engine = oracle_engine(backbone, text)
    assert reply(engine, PROMPT, max_new_tokens=NEW) == expected
    assert torch.allclose(
        engine.runner.cache.buffer[:, :, :, :14], whole.runner.cache.buffer[:, :, :, :14], atol=1e-4
    )


# ---- replies that end early ----


@pytest.mark.parametrize("mode", ["vanilla", "greedy", "typical", "exact"])
def test_closing_the_iterator_at_any_step(backbone: Any, text: Any, mode: Any) -> None:
    settings = Sampling(mode=mode, temperature=0.2, max_new_tokens=NEW)
    total = len(list(oracle_engine(backbone, text).generate(PROMPT, settings)))
    assert total > 4
    engine = oracle_engine(backbone, text)
    for stop_after in range(min(total + 1, 12)):
        steps = engine.generate(PROMPT, settings)
        kept = [*PROMPT] if stop_after else engine.text[:]
        for _ in range(stop_after):
            kept += ids_of([next(steps)])
        steps.close()
        # A token that closes the reply is known without a forward, so it is never in the cache.
        assert_as_fresh(engine, kept if stop_after < total else kept[:-1])
    assert_next_reply_as_fresh(engine, [*kept, 1, 2])


@pytest.mark.parametrize("limit", range(1, 14))
def test_every_limit_of_new_tokens(backbone: Any, text: Any, limit: Any) -> None:
    engine = oracle_engine(backbone, text)
    steps = decode(engine, PROMPT, max_new_tokens=limit)
    assert PROMPT + ids_of(steps) == text[: len(PROMPT) + limit]
    assert steps[-1].finish == "length"
    assert all(step.finish is None for step in steps[:-1])
    assert engine.tokens_in_context in (len(PROMPT) + limit - 1, len(PROMPT) + limit)
    assert_as_fresh(engine, text[: engine.tokens_in_context])
    assert_next_reply_as_fresh(engine, [*text[: len(PROMPT) + limit], 3])


@pytest.mark.parametrize("place", range(12))
def test_an_eos_at_any_place_of_the_reply(backbone: Any, text: Any, place: Any) -> None:
    """Nothing after the EOS stays, in the reply or in the cache, also within an accepted path."""
    eos = text[len(PROMPT) + place]
    first = text.index(eos, len(PROMPT))
    engine = oracle_engine(backbone, text, ranks=(0,), eos=frozenset({eos}))
    steps = decode(engine, PROMPT, max_new_tokens=NEW)
    assert PROMPT + ids_of(steps) == text[: first + 1]
    assert steps[-1].finish == "eos"
    assert eos not in engine.text[len(PROMPT) :] or engine.text[-1] == eos
    assert_as_fresh(engine, text[: engine.tokens_in_context])
    assert engine.tokens_in_context in (first, first + 1)
    assert_next_reply_as_fresh(engine, [*text[: first + 1], 3])
    ignoring = oracle_engine(backbone, text, eos=frozenset({eos}))
    assert (
        PROMPT + reply(ignoring, PROMPT, max_new_tokens=NEW, ignore_eos=True)
        == text[: len(PROMPT) + NEW]
    )


@pytest.mark.parametrize("place", range(8))
def test_a_stop_string_in_the_middle_of_an_accepted_path(
    backbone: Any, text: Any, place: Any
) -> None:
    decoded = make_engine(backbone).tokenizer.decode(text[len(PROMPT) :])  # a character a token
    stop = decoded[place : place + 2]
    end = decoded.index(stop)
    engine = oracle_engine(backbone, text, ranks=(0,))
    steps = decode(engine, PROMPT, max_new_tokens=NEW, stop=(stop,))
    assert "".join(step.text for step in steps) == decoded[:end]
    assert PROMPT + ids_of(steps) == text[: len(PROMPT) + end + 2]
    assert steps[-1].finish == "stop"
    assert_as_fresh(engine, text[: engine.tokens_in_context])
    assert_next_reply_as_fresh(engine, [*text[: len(PROMPT) + end], 3])


@pytest.mark.parametrize("context", range(len(PROMPT) + 1, len(PROMPT) + 12))
@pytest.mark.parametrize("ranks", [(0,), (-1,), (0, 1, -1)])
def test_the_context_limit_is_a_finish_reason_and_its_last_position_is_used(
    backbone: Any, text: Any, context: Any, ranks: Any
) -> None:
    engine = oracle_engine(backbone, text, ranks, context=context)
    for mode in ("greedy", "vanilla"):
        steps = decode(engine, PROMPT, mode=mode, temperature=0, max_new_tokens=NEW)
        assert PROMPT + ids_of(steps) == text[:context]
        assert steps[-1].finish == "context"
    assert_as_fresh(engine, text[: engine.tokens_in_context])


def test_both_limits_at_once_are_called_length(backbone: Any, text: Any) -> None:
    engine = oracle_engine(backbone, text, context=len(PROMPT) + 5)
    assert decode(engine, PROMPT, max_new_tokens=5)[-1].finish == "length"
    assert decode(engine, PROMPT, max_new_tokens=6)[-1].finish == "context"


def test_a_context_that_ends_where_the_positions_of_the_backbone_end() -> None:
    """Guesses beyond the last position must not reach the encoding: 'dynamic' changes there."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    backbone = random_backbone(max_position_embeddings=40, rope_parameters=rope)
    expected = reply(
        make_engine(backbone), PROMPT, mode="vanilla", temperature=0, max_new_tokens=99
    )
    assert len(PROMPT) + len(expected) == 40
    assert reply(oracle_engine(backbone, PROMPT + expected), PROMPT, max_new_tokens=99) == expected


def test_longrope_uses_its_first_encoding_only() -> None:
    factors = {
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "rope_theta": 10_000.0,
        "rope_type": "longrope",
    }
    backbone = random_backbone(
        "phi3",
        original_max_position_embeddings=50,
        max_position_embeddings=400,
        rope_parameters=factors | {"original_max_position_embeddings": 50},
    )
    assert backbone.context == 50
    expected = reply(
        make_engine(backbone), PROMPT, mode="vanilla", temperature=0, max_new_tokens=99
    )
    engine = oracle_engine(backbone, PROMPT + expected)
    assert reply(engine, PROMPT, max_new_tokens=99) == expected
    assert_as_fresh(engine, (PROMPT + expected)[: engine.tokens_in_context])


# ---- interrupts ----

POINTS = (
    "backbone.hidden",
    "backbone.logits",
    "cache.commit",
    "after commit",
    "reply.take",
    "cache.rewind",
)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("call", [1, 2, 4])
def test_an_interrupt_inside_a_step(
    backbone: Any, text: Any, point: Any, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = oracle_engine(backbone, text, ranks=(0, 1))
    steps = engine.generate(PROMPT, Sampling(max_new_tokens=NEW))
    kept = PROMPT + ids_of([next(steps)])
    with monkeypatch.context() as patch:
        _interrupt(patch, engine, point, call)
        with pytest.raises(KeyboardInterrupt):
            _extend(kept, steps)
    assert engine.runner.cache.length == len(engine.text)
    assert engine.text[: len(kept)] == kept
    assert_as_fresh(engine, text[: engine.tokens_in_context])
    assert_next_reply_as_fresh(engine, [*kept, 1])


@pytest.mark.parametrize(
    "point", ["backbone.hidden", "backbone.logits", "cache.commit", "after commit"]
)
@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupt_inside_a_prefill(
    backbone: Any, text: Any, point: Any, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = oracle_engine(backbone, text)
    reply(engine, PROMPT[:6], max_new_tokens=4)
    with monkeypatch.context() as patch:
        patch.setattr(eager, "PREFILL_ROWS", 4)
        _interrupt(patch, engine, point, call if point != "backbone.logits" else 1)
        with pytest.raises(KeyboardInterrupt):
            decode(engine, PROMPT, max_new_tokens=NEW)
    assert_as_fresh(engine, PROMPT[: engine.tokens_in_context])
    assert_next_reply_as_fresh(engine, PROMPT)


def _extend(kept: list[int], steps: Iterable[Step]) -> None:
    """Add the tokens of each step as it comes."""
    for step in steps:
        kept += ids_of([step])


def _interrupt(patch: Any, engine: Engine, point: str, call: int) -> None:
    """Raise KeyboardInterrupt at the call-th time that `point` is reached."""
    from medusa_chat.decoding.reply import Reply

    owner, name = {
        "backbone.hidden": (engine.backbone, "hidden"),
        "backbone.logits": (engine.backbone, "logits"),
        "cache.commit": (engine.runner.cache, "commit"),
        "after commit": (engine.runner.cache, "commit"),
        "cache.rewind": (engine.runner.cache, "rewind"),
        "reply.take": (Reply, "take"),
    }[point]
    original, count = getattr(owner, name), 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call and point != "after commit":
            raise KeyboardInterrupt
        result = original(*args, **kwargs)
        if count == call:
            raise KeyboardInterrupt
        return result

    patch.setattr(owner, name, interrupted)
