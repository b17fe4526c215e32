"""The loop guard: stops a reply that repeats itself, and nothing else."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import medusa_chat
from medusa_chat.config import BUNDLED, SHIPPED_PROMPTS
from medusa_chat.decoding.loop import REPEATS, UNIFORM_SPAN, VARIED, VARIED_SPAN, LoopGuard
from tests.helpers.tiny import PROMPT, decode, ids_of, make_engine, random_backbone, random_heads


def stopped_at(ids: list[int]) -> int | None:
    """Count the tokens after which the guard stops a reply of these; None if it does not."""
    guard = LoopGuard()
    return next((count for count, token in enumerate(ids, 1) if guard.loops(token)), None)


@given(
    start=st.integers(0, 60),
    block=st.integers(1, 100),
    kinds=st.integers(1, 60),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_block_that_is_repeated_is_noticed_soon(
    start: int, block: int, kinds: int, seed: int
) -> None:
    chance = random.Random(seed)
    before = [100 + number for number in range(start)]
    repeated = [chance.randrange(kinds) for _ in range(block)]
    found = stopped_at(before + repeated * 400)
    varied = len(set(repeated)) >= VARIED
    span = max(VARIED_SPAN if varied else UNIFORM_SPAN, REPEATS * block)
    assert found is not None
    # A shorter block inside the block may repeat too, so that it can be found earlier.
    assert found <= start + span + 16
    if varied:
        assert found >= start + VARIED_SPAN


TABLE = "| item | 2024 | 2025 |\n|---|---|---|\n" + "| 0 | 0 | 0 |\n" * 15
LEGITIMATE = {
    "an array of zeros": "unsigned char table[64] = {" + ", ".join(["0"] * 64) + "};",
    "a table of equal rows": TABLE,
    "rules": "=" * 80 + "\nTitle\n" + "-" * 80,
    "a chorus": "Row, row, row your boat,\nGently down the stream.\n" * 3,
    "equal tests": "    assert found is None\n" * 12,
    "a list": "".join(f"{number}. Item number {number} of the list\n" for number in range(60)),
}


def test_texts_that_repeat_for_a_reason_are_left_alone() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(BUNDLED))
    texts = LEGITIMATE | {"prompts": SHIPPED_PROMPTS.read_text()}
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert stopped_at(ids) is None, name
    sentence = "I am sorry, but I cannot answer that question right now. "
    ids = tokenizer(sentence * 20, add_special_tokens=False)["input_ids"]
    assert (stopped_at(ids) or len(ids)) < 160


@pytest.mark.parametrize("mode", ["greedy", "vanilla"])
def test_a_looping_reply_ends_at_the_same_token_in_every_mode(mode: str) -> None:
    backbone = random_backbone(initializer_range=0.02, tie_word_embeddings=True)
    engine = make_engine(backbone, random_heads(backbone), "mc_sim_7b_63", copies=True)
    how = {"mode": mode, "temperature": 0, "max_new_tokens": 400}
    steps = decode(engine, PROMPT, **how, loop_guard="on")
    assert steps[-1].finish == "loop"
    assert stopped_at(ids_of(steps)) == len(ids_of(steps)) < 340
    assert engine.text == PROMPT + ids_of(steps)
    assert decode(engine, PROMPT, **how)[-1].finish == "length"
    assert medusa_chat.Sampling().loop_guard == "off"
