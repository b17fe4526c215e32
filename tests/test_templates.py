"""Prompts equal those of the tokenizer's template or of fastchat, byte for byte."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from fastchat.conversation import Conversation, SeparatorStyle, get_conv_template
from transformers import AutoTokenizer

from medusa_chat.cli import make_parser
from medusa_chat.config import LoadOptions, ModelSpec, UserError
from medusa_chat.model.loading import load_model
from medusa_chat.model.pretrained import tokenizer_settings
from medusa_chat.model.templates import (
    ChatTemplate,
    matching_template,
    named_template,
    resolve_template,
)
from tests.helpers.hub_checkpoints import MISTRAL, ZEPHYR, llama_tokenizer, vicuna_tokenizer
from tests.helpers.tiny import (
    decode,
    make_engine,
    random_backbone,
    random_model,
    reply,
    save_model,
    tokenizer,
)

if TYPE_CHECKING:
    from pathlib import Path

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TURNS = ("Hi", "Hello!", "And now?\n\nTwo lines", "Yes.", "Ж 你 🙂")


def talk(*turns: str, system: str | None = None) -> list[Any]:
    said = [
        {"role": role, "content": turn}
        for role, turn in zip(("user", "assistant") * 3, turns, strict=False)
    ]
    return [*([] if system is None else [{"role": "system", "content": system}]), *said]


def template(name: str = "vicuna_v1.1", **settings: Any) -> ChatTemplate:
    return resolve_template(llama_tokenizer(), ModelSpec("m", "m", template=name, **settings))


@pytest.mark.parametrize(
    "name", ["vicuna_v1.1", "zephyr", "mistral", "llama-2", "qwen-7b-chat", "one_shot"]
)
@pytest.mark.parametrize("system", [None, "", "Be brief."])
@pytest.mark.parametrize("turns", [1, 3, 5])
def test_fastchat_makes_the_same_prompt(name: str, system: str | None, turns: int) -> None:
    conversation = get_conv_template(name)
    if system is not None:
        conversation.set_system_message(system)
    for place, text in enumerate(TURNS[:turns]):
        conversation.append_message(conversation.roles[place % 2], text)
    conversation.append_message(conversation.roles[1], None)
    made = template(name)
    for _ in range(2):  # nothing of a conversation stays for the next
        assert made.render(talk(*TURNS[:turns], system=system)) == conversation.get_prompt()


@pytest.mark.parametrize(
    ("name", "system", "prompt"),
    [
        ("vicuna_v1.1", None, VICUNA_SYSTEM + " USER: Hi ASSISTANT: Yo</s>USER: Bye ASSISTANT:"),
        ("vicuna_v1.1", "", " USER: Hi ASSISTANT: Yo</s>USER: Bye ASSISTANT:"),
        (
            "zephyr",
            "S",
            "<|system|>\nS</s>\n<|user|>\nHi</s>\n<|assistant|>\nYo</s>\n<|user|>\nBye</s>\n<|assistant|>\n",
        ),
        ("mistral", None, "[INST] Hi [/INST] Yo</s>[INST] Bye [/INST]"),
        ("mistral", "S", "[INST] S\nHi [/INST] Yo</s>[INST] Bye [/INST]"),
    ],
)
def test_prompts_as_the_models_were_trained(name: str, system: str | None, prompt: str) -> None:
    assert template(name).render(talk("Hi", "Yo", "Bye", system=system)) == prompt


THINKING = (
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{{ '\\n' }}{% endfor %}"
    "assistant: {% if enable_thinking is not defined or enable_thinking %}<think>\n"
    "{% else %}<think></think>{% endif %}"
)


def test_a_template_of_a_thinking_model_is_switched() -> None:
    made = ChatTemplate(llama_tokenizer(THINKING), "m")
    turns = talk("Hi", "<think>Hm.</think>Yo", "Bye")
    assert made.render(turns) == "user: Hi\nassistant: Yo\nuser: Bye\nassistant: <think>\n"
    assert made.drops_thoughts
    assert made.opening(turns) == "<think>"
    off = made.with_thinking(False)
    assert off.render(turns).endswith("assistant: <think></think>")
    assert off.opening(turns) == ""
    assert made.with_thinking(True).opening(turns) == "<think>"


def test_a_template_without_thinking_refuses_to_switch_it() -> None:
    for made in (ChatTemplate(llama_tokenizer(ZEPHYR), "m"), template()):
        assert not made.drops_thoughts
        assert made.opening(talk("Hi")) == ""
        with pytest.raises(UserError, match="the chat template of m has no switch for thinking"):
            made.with_thinking(True)


def test_which_template_is_taken() -> None:
    own, bare = llama_tokenizer(ZEPHYR), llama_tokenizer()
    assert resolve_template(own, ModelSpec("zephyr-7b", "z")).conversation is None
    assert resolve_template(own, ModelSpec("m", "m", template="mistral")).name == "mistral"
    for spec, name in (
        (ModelSpec("m", "lmsys/vicuna-7b-v1.3@main"), "vicuna_v1.1"),
        (ModelSpec("vicuna-7b", "/cache/snapshots/0123"), "vicuna_v1.1"),
        (ModelSpec("m", "FasterDecoding/medusa-1.0-zephyr-7b-beta"), "zephyr"),
    ):
        assert resolve_template(bare, spec).name == name
    with pytest.raises(
        UserError, match=r"neither the tokenizer of m nor fastchat .* --template NAME .*list"
    ):
        resolve_template(bare, ModelSpec("m", "owner/unheard-of"))
    with pytest.raises(UserError, match=r"no chat template 'vicuna_v1.2'; close are vicuna_v1.1"):
        named_template("vicuna_v1.2")


@pytest.mark.parametrize("own", [ZEPHYR, MISTRAL])
def test_there_is_one_bos_where_the_template_wants_one(own: str) -> None:
    bos = llama_tokenizer().bos_token_id
    assert (
        template().encode(talk("Hi")).count(bos) == template().encode(talk(*TURNS)).count(bos) == 1
    )
    ids = ChatTemplate(llama_tokenizer(own), "m").encode(talk(*TURNS))
    assert ids.count(bos) == (own == MISTRAL)  # zephyr's own has none
    written = Conversation(
        "odd", system_message="<s>", sep_style=SeparatorStyle.NO_COLON_SINGLE, roles=("U", "A")
    )
    assert ChatTemplate(llama_tokenizer(), "m", written).encode(talk("Hi"))[:2].count(bos) == 1


@pytest.mark.parametrize("reply", ["Yo", " Yo\n", "written otherwise by the template"])
def test_where_a_reply_ends(reply: str) -> None:
    text = "USER: A</s> ASSISTANT: Yo</s><s>"
    start = text.index(" Yo")
    assert text[start : template().reply_end(text, start, reply)] == " Yo</s>"
    assert text[start : template("qwen-7b-chat").reply_end(text, start, reply)] == " Yo</s>"
    assert ChatTemplate(llama_tokenizer(ZEPHYR), "m").reply_end(text, start, reply) == len(text)


def test_a_tokenizers_own_template_takes_no_empty_system_message() -> None:
    own = ChatTemplate(llama_tokenizer(ZEPHYR), "m")
    assert (
        own.render(talk("Hi", system=""))
        == own.render(talk("Hi"))
        == "<|user|>\nHi</s>\n<|assistant|>\n"
    )
    assert own.render(talk("Hi", system="S")).startswith("<|system|>\nS</s>")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (talk("Hi", "Yo"), "ends with a reply, which cannot be continued"),
        ([*talk("Hi"), *talk("again")], "message 2 is of user"),
        (talk("Hi", "", "x"), "message 2 is empty"),
        ([*talk("Hi", "Yo"), *talk(system="late")], "message 3 is of system"),
    ],
)
def test_conversations_that_no_template_was_made_for(messages: list[Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        template().encode(messages)
    if "ends" in words:
        with pytest.raises(UserError, match=words):
            ChatTemplate(tokenizer(), "m").encode(messages)


def test_a_model_without_a_template_says_how_to_name_one() -> None:
    engine = make_engine(random_backbone(), tokenizer=tokenizer(None))
    with pytest.raises(
        UserError, match=r"model has no chat template: name one with --template NAME"
    ):
        engine.encode(talk("Hi"))


def test_a_model_without_a_template_completes_plain_text(tmp_path: Path) -> None:
    folder = save_model(tmp_path, random_model(vocabulary=260), chat_template=None)
    options = LoadOptions(device="cpu", dtype="float32", engine="torch")
    loaded = load_model(ModelSpec("tiny", str(folder)), options)
    assert [notice for notice in loaded.notices if "completes plain text (--raw)" in notice]
    assert loaded.template.name == "none, plain text"
    whole = [*talk("One", " two", "three", system="S")]
    assert loaded.template.render(whole) == "One two\nthree"
    engine = make_engine(loaded.backbone, tokenizer=loaded.tokenizer, template=loaded.template)
    assert engine.raw
    assert engine.encode(talk("Hi")) == loaded.tokenizer.encode("Hi")
    with pytest.raises(UserError, match="tiny has no chat template: name one with"):
        engine.raw = False
    asked = load_model(ModelSpec("tiny", str(folder)), replace(options, raw=True))
    assert asked.template.raw
    assert asked.notices == ()


def test_plain_text_begins_with_bos_and_has_no_stop_strings() -> None:
    made = template("qwen-7b-chat")
    assert made.stop_ids or made.stop
    raw = made.switched(True)
    assert (raw.stop, raw.render(talk("Hi"))) == ((), "Hi")
    assert raw.encode(talk("Hi")) == made.tokenizer("Hi")["input_ids"]
    assert raw.encode(talk("Hi"))[0] == made.tokenizer.bos_token_id
    assert raw.switched(False) == made


def test_the_templates_stop_strings_and_ids_end_a_reply() -> None:
    backbone = random_backbone()
    plain = make_engine(backbone)
    prompt = [1, 2, 3]
    ids = reply(plain, prompt, mode="vanilla", temperature=0, max_new_tokens=24)
    text = plain.tokenizer.decode(ids)
    stop = Conversation("s", stop_str=[text[6:9], "never said"], stop_token_ids=[ids[12]])
    made = ChatTemplate(plain.tokenizer, "m", stop)
    settings: dict[str, Any] = {"mode": "vanilla", "temperature": 0, "max_new_tokens": 24}
    by_text = make_engine(backbone, template=made)
    steps = decode(by_text, prompt, **settings)
    assert steps[-1].finish == "stop"
    assert "".join(step.text for step in steps) == text[: text.index(text[6:9])]
    assert reply(by_text, prompt, **settings, ignore_eos=True) == ids
    assert made.stop_ids == {ids[12]}
    by_id = make_engine(backbone, template=made, eos=None)
    stop.stop_str = None
    assert reply(by_id, prompt, **settings) == ids[: ids.index(ids[12]) + 1]


def test_the_templates_system_message_is_the_engines_own() -> None:
    backbone = random_backbone()
    assert make_engine(backbone, template=template()).system == VICUNA_SYSTEM
    assert make_engine(backbone, template=template(), system="Mine").system == "Mine"


def test_an_old_llama_tokenizer_keeps_its_space_after_the_end_of_a_turn(tmp_path: Path) -> None:
    vicuna_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    old = AutoTokenizer.from_pretrained(tmp_path, **tokenizer_settings(tmp_path))
    ids = ChatTemplate(old, "m", named_template("vicuna_v1.1")).encode(talk("Hi", "Yo", "Bye"))
    assert (ids[0], ids.count(old.bos_token_id)) == (old.bos_token_id, 1)
    assert str(old.convert_ids_to_tokens(ids[ids.index(old.eos_token_id) + 1])).startswith("▁")


def test_the_flag_lists_its_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_parser().parse_args(["chat", "--template", "zephyr"]) == argparse.Namespace(
        **vars(make_parser().parse_args(["chat"])) | {"template": "zephyr"}
    )
    with pytest.raises(SystemExit) as left:
        make_parser().parse_args(["bench", "--template", "list"])
    assert left.value.code == 0
    assert {"vicuna_v1.1", "zephyr", "mistral"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("vicuna-7b-v1.5", "vicuna_v1.1"),
        ("medusa-vicuna-7b-v1.3", "vicuna_v1.1"),
        ("Llama-2-7b-chat-hf", "llama-2"),
        ("Qwen2.5-7B-Instruct", "qwen-7b-chat"),
        ("chatglm3-6b", "chatglm3"),
        ("my-prompt-model", None),
        ("unvicunated-7b", None),
        ("backbone", None),
    ],
)
def test_fastchat_finds_families_by_whole_parts_of_a_name(
    name: str, template: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = matching_template(name)
    assert (found and found.name) == template
    assert capsys.readouterr().out == ""


def test_a_template_that_was_guessed_is_told() -> None:
    notices: list[str] = []
    bare = tokenizer(None)
    guessed = resolve_template(bare, ModelSpec("vicuna-7b-v1.5", "/none"), notices)
    assert guessed.name == "vicuna_v1.1"
    assert "that of vicuna_v1.1 was chosen by its name" in notices[0]
    named = ModelSpec("vicuna-7b-v1.5", "/none", template="zephyr")
    assert resolve_template(bare, named, notices).name == "zephyr"
    assert resolve_template(tokenizer(), ModelSpec("vicuna-7b-v1.5", "/none"), notices).name
    assert len(notices) == 1
