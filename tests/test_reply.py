"""From ids to shown text: split characters, stop strings, EOS ids, limits."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from medusa_chat.decoding.reply import Reply, eos_ids
from medusa_chat.sampling import Sampling
from tests.helpers.tiny import END, random_backbone, tokenizer

TOKENIZER = tokenizer()


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return ids


def run(
    ids: list[int],
    *,
    left: int = 10**6,
    eos: frozenset[int] = frozenset({END}),
    chunk: int = 1,
    **changes: Any,
) -> Any:
    """Feed ids some at a time, as steps do; returns the texts taken and the reason for the end."""
    reply = Reply(TOKENIZER, Sampling(**({"max_new_tokens": 10**6} | changes)), eos, left)
    taken = []
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        taken += reply.take(part, [0] * len(part))
        if reply.finish:
            break
    return [token.text for token in taken], reply.finish


@pytest.mark.parametrize(
    "text", ["plain", "é", "日本語の文", "a🙂b🧜‍♀️c", "👩‍👩‍👧 und ÄÖÜ\n\ttabs", "  two  spaces "]
)
@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_split_characters_appear_once_and_whole(text: Any, chunk: Any) -> None:
    texts, _ = run(encode(text), chunk=chunk)
    assert "".join(texts) == text
    assert not any("\ufffd" in piece for piece in texts)
    assert max(map(len, texts)) == 1
    assert len(texts) == len(text.encode())


@given(text=st.text(max_size=30), chunk=st.integers(1, 6))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_text_comes_out_as_it_went_in(text: Any, chunk: Any) -> None:
    assert "".join(run(encode(text), chunk=chunk)[0]) == text


@given(
    ids=st.lists(st.integers(0, 300), max_size=40), stop=st.lists(st.integers(0, 93), max_size=2)
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_ids_are_decoded_without_an_error(ids: Any, stop: Any) -> None:
    """A random model writes broken UTF-8, special tokens and ids that no tokenizer has."""
    texts, _ = run(ids, stop=tuple(filter(None, [TOKENIZER.decode(stop)])), eos=frozenset())
    assert len(texts) <= len(ids)


def test_broken_utf_8_does_not_swallow_what_follows() -> None:
    broken = encode("🙂")[:2]
    assert (
        "".join(run([*encode("a"), *broken, *encode("bc d")])[0]).replace("\ufffd", "") == "abc d"
    )


def test_special_tokens_are_not_shown() -> None:
    assert run([*encode("a"), END - 1, *encode("b")])[0] == ["a", "", "b"]


def test_a_tokenizer_that_marks_words_by_a_leading_space() -> None:
    """SentencePiece style: the space before the first word is no part of the text."""
    vocabulary = {
        "▁Hello": 0,
        "▁there": 1,
        "!": 2,
        "<0xF0>": 3,
        "<0x9F>": 4,
        "<0x99>": 5,
        "<0x82>": 6,
        "▁": 7,
    }
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = [0, 1, 2, 7, 3, 4, 5, 6, 0, 1]
    reply = Reply(made, Sampling(), frozenset(), 100)
    texts = [token.text for token in reply.take(ids, [0] * len(ids))]
    assert "".join(texts) == "Hello there! 🙂 Hello there"
    assert texts[4:8] == ["", "", "", "🙂"]


# ---- stop strings ----


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_a_stop_string_split_over_tokens_is_never_shown(chunk: Any) -> None:
    texts, finish = run(encode("one STOP two"), stop=("STOP",), chunk=chunk)
    assert ("".join(texts), finish) == ("one ", "stop")
    assert len(texts) == len("one STOP")


def test_text_that_only_began_a_stop_string_is_released() -> None:
    assert run(encode("a STALL b"), stop=("STOP",))[0] == [
        "a",
        " ",
        "",
        "",
        "STA",
        "L",
        "L",
        " ",
        "b",
    ]
    assert run(encode("aab!"), stop=("aaab",))[0] == ["", "", "aab", "!"]


@pytest.mark.parametrize(
    ("ids", "changes", "finish"),
    [
        (encode("x ST"), {"max_new_tokens": 4}, "length"),
        (encode("x ST"), {"left": 4}, "context"),
        ([*encode("x ST"), END], {}, "eos"),
    ],
)
def test_text_held_back_is_released_at_the_end(ids: Any, changes: Any, finish: Any) -> None:
    texts, why = run(ids, stop=("STOP",), **changes)
    assert ("".join(texts), why) == ("x ST", finish)


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_stop_string_may_name_special_tokens(chunk: int) -> None:
    ids = [*encode("ab"), END, *encode("c"), END, *encode("de")]
    texts, finish = run(ids, stop=("<|end|>",), chunk=chunk, eos=frozenset())
    assert ("".join(texts), finish) == ("ab", "stop")
    texts, finish = run(ids, stop=("c<|end|>d",), chunk=chunk, eos=frozenset())
    assert ("".join(texts), finish) == ("ab", "stop")
    assert "".join(run(ids, stop=("<|end|>d!",), chunk=chunk, eos=frozenset())[0]) == "abcde"


def test_the_earliest_of_several_stop_strings_counts() -> None:
    assert "".join(run(encode("abc def ghi"), stop=("ef", "bc d", "zzz"))[0]) == "a"
    assert "".join(run(encode("line\nnext"), stop=("\n\n", "\n"))[0]) == "line"
    assert "".join(run(encode("日本語"), stop=("本",))[0]) == "日"


@given(
    text=st.text("ab", min_size=1, max_size=24),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_shown_text_is_that_before_the_stop_string_that_is_complete_first(
    text: Any, stops: Any, seed: Any
) -> None:
    shown, finish = "", None
    reply = Reply(
        TOKENIZER, Sampling(stop=tuple(stops), max_new_tokens=len(text)), frozenset(), 10**6
    )
    ids, chance = encode(text), random.Random(seed)
    while ids and not reply.finish:
        count = chance.randint(1, 4)
        shown += "".join(token.text for token in reply.take(ids[:count], [0] * len(ids[:count])))
        del ids[:count]
    ends = [n for n in range(1, len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
    if ends:
        start = min(text[: ends[0]].find(stop) for stop in stops if text[: ends[0]].endswith(stop))
        expected, finish = text[:start], "stop"
    else:
        expected, finish = text, "length"
    assert (shown, reply.finish) == (expected, finish)


# ---- ends ----


def test_every_eos_id_ends_a_reply_and_none_when_ignored() -> None:
    for eos in (5, 9):
        assert run([1, 2, eos, 3], eos=frozenset({5, 9})) == ([*run([1, 2])[0], ""], "eos")
    texts, finish = run([1, 5, 9, 3], eos=frozenset({5, 9}), ignore_eos=True)
    assert ("".join(texts), finish) == (TOKENIZER.decode([1, 5, 9, 3]), None)


def test_eos_ids_are_those_of_the_generation_config_and_the_tokenizer() -> None:
    backbone = random_backbone()
    named = tokenizer()
    assert eos_ids(backbone.model, named) == frozenset()
    backbone.model.generation_config.eos_token_id = [3, 7]
    assert eos_ids(backbone.model, named) == {3, 7}
    named.eos_token = "<|end|>"
    assert eos_ids(backbone.model, named) == {3, 7, END}
    backbone.model.generation_config.eos_token_id = 0
    assert eos_ids(backbone.model, named) == {0, END}


def test_tokens_after_the_end_are_not_taken() -> None:
    reply = Reply(TOKENIZER, Sampling(), frozenset({END}), 100)
    taken = reply.take([*encode("a"), END, *encode("b")], [0, 1, 2])
    assert [(token.id, token.text, token.head) for token in taken] == [
        (encode("a")[0], "a", 0),
        (END, "", 1),
    ]
    assert reply.take(encode("c"), [0]) == []


def test_ends_at_foresees_the_token_that_closes_the_reply() -> None:
    reply = Reply(TOKENIZER, Sampling(max_new_tokens=3), frozenset({END}), 100)
    assert reply.ends_at(END)
    assert not reply.ends_at(1)
    reply.take([1, 1], [0, 0])
    assert reply.ends_at(1)


def test_bytes_that_make_no_character_do_not_end_the_stream() -> None:
    vocabulary = {"a": 0, "b": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    llama = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = [0, 2 + 0x37, 2 + 0x81, 1, 2 + 0xC3, 2 + 0xA9, 0]
    reply = Reply(llama, Sampling(), frozenset(), 100)
    assert [token.text for token in reply.take(ids, [0] * len(ids))] == [
        "a",
        "7",
        "",
        "\N{REPLACEMENT CHARACTER}b",
        "",
        "é",
        "a",
    ]


@pytest.mark.parametrize(("before", "text"), [([], "two three"), ([0], " two three")])
def test_a_reply_that_goes_on_with_a_text_keeps_its_first_space(
    before: list[int], text: str
) -> None:
    words = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "▁three": 2}, unk_token="▁one"))
    words.decoder = decoders.Metaspace()
    made = PreTrainedTokenizerFast(tokenizer_object=words)
    reply = Reply(made, Sampling(), frozenset(), 100, before)
    assert "".join(token.text for token in reply.take([1, 2], [0, 0])) == text
