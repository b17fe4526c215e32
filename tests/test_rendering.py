"""A chat template is a program of the checkpoint: whatever it does ends in text or in one line."""

from __future__ import annotations

import gc
import os

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_chat.config import Message, UserError
from medusa_chat.model import rendering
from medusa_chat.model.templates import ChatTemplate
from tests.helpers.complaints import refusal
from tests.helpers.tiny import CHAT_TEMPLATE, tokenizer

HI: list[Message] = [{"role": "user", "content": "Hi"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROW = (
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}{{ ns.x }}"
)
FAULTS = {
    "ValueError": "{{ '%d' % 'x' }}",
    "TypeError": "{{ messages + 1 }}",
    "ZeroDivisionError": "{{ 1 / 0 }}",
    "OverflowError": "{{ 2.0 ** 99999 }}",
    "RecursionError": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "syntax": "{% for %}",
    "its own": "{{ raise_exception('no\nsystem prompts') }}",
    "memory": "{{ 'a' * 99999999999 }}",
    "growth": GROW,
    "length": "{% for i in range(9) %}{{ 'a' * 9000000 }}{% endfor %}",
}


FUZZED = tokenizer(CHAT_TEMPLATE)


def refused(template: str) -> str:
    return refusal(ChatTemplate(tokenizer(template), "m").render, HI)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_template_that_fails_is_one_line(fault: str) -> None:
    line = refused(FAULTS[fault])
    assert line.startswith("the chat template of m refuses this conversation: ")
    assert len(line) < 700


@pytest.mark.parametrize("endless", [LOOP, "{{ 9 ** 99999999 }}"])
def test_a_template_without_an_end_is_stopped(
    endless: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.5)
    assert "takes more than 0.5 seconds" in refused(endless)


def test_a_template_works_again_after_a_bad_one() -> None:
    made = tokenizer(CHAT_TEMPLATE)
    template = ChatTemplate(made, "m")
    expected = "<|user|>Hi<|end|><|assistant|>"
    assert template.render(HI) == expected
    for bad in (LOOP, GROW, "{{ 1 / 0 }}"):
        made.chat_template = bad
        with pytest.raises(UserError):
            template.render(HI)
        made.chat_template = CHAT_TEMPLATE
        assert template.render(HI) == expected


def test_no_process_stays_behind() -> None:
    ours = psutil.Process(os.getpid())
    before = set(ours.children())
    made = tokenizer(CHAT_TEMPLATE)
    ChatTemplate(made, "m").render(HI)
    (child,) = set(ours.children()) - before
    del made
    gc.collect()
    assert child not in ours.children()


@given(
    st.lists(
        st.sampled_from(
            [
                "{{",
                "}}",
                "{%",
                "%}",
                "for-m-in-messages",
                "endfor",
                "if",
                "m.content",
                "messages",
                "[0]",
                "|",
                "join",
                "+",
                "~",
                "1",
                "'",
                "tojson",
                "set-x=",
                "x",
                "text",
            ]
        ),
        max_size=12,
    ).map(lambda words: " ".join(words).replace("-", " "))
)
@settings(max_examples=300, deadline=None)
def test_any_template_gives_text_or_one_line(template: str) -> None:
    made = FUZZED
    made.chat_template = template or "x"
    written = refused_by = ""
    try:
        written = ChatTemplate(made, "m").render(HI)
    except UserError as error:
        refused_by = str(error)
    assert not (written and refused_by)
    assert "\n" not in refused_by
