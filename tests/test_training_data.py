"""Training data: targets, packed documents, and the errors of damaged files."""

from __future__ import annotations

import json
import random
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fastchat.conversation import get_conv_template
from transformers import AutoTokenizer

from medusa_chat.config import BUNDLED, UserError, make_recipe
from medusa_chat.model.pretrained import tokenizer_settings
from medusa_chat.model.templates import ChatTemplate, named_template
from medusa_chat.training.data import IGNORED, Document, Example, PackedRows, encode, read_documents
from medusa_chat.training.starting import new_heads
from medusa_chat.training.trainee import Trainee
from tests.helpers.hub_checkpoints import llama_tokenizer, vicuna_tokenizer
from tests.helpers.tiny import CHAT_TEMPLATE, END, prompt_ids, random_model, tokenizer

if TYPE_CHECKING:
    from pathlib import Path

# Qwen3's way: thoughts are written on lines of their own, and only in the last turn.
FORGETFUL = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% set parts = message.content.split('</think>') %}"
    "{% if parts|length > 1 and loop.last %}"
    "<think>\n{{ parts[0].replace('<think>', '').strip() }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].strip() }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def talk(*contents: str, system: str = "") -> tuple[Any, ...]:
    roles = ("user", "assistant") * len(contents)
    turns = [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=False)
    ]
    return (*([{"role": "system", "content": system}] if system else []), *turns)


def examples(document: Document, template: str = CHAT_TEMPLATE) -> list[tuple[str, str]]:
    """Per example all its text, and the text of its targets."""
    tok = tokenizer(template)
    made = []
    for example in encode(ChatTemplate(tok, "m"), document):
        targets = [i for i, on in zip(example.ids, example.trained, strict=True) if on]
        made.append((str(tok.decode(example.ids)), str(tok.decode(targets))))
    return made


def write_lines(file: Path, *items: Any) -> Path:
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    return file


# ---- targets ----


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_only_the_assistants_tokens_are_targets(system: str) -> None:
    ((text, targets),) = examples(
        Document(talk("Hi there", "Hello!", "Bye", "So long.", system=system))
    )
    assert text.startswith(
        "<|system|>Be brief.<|end|><|user|>Hi there" if system else "<|user|>Hi there"
    )
    assert targets == "Hello!<|end|>So long.<|end|>"


def test_a_question_left_open_carries_no_loss() -> None:
    ((text, targets),) = examples(Document(talk("Hi", "Hello!", "Still there?")))
    assert "Still there?" in text
    assert targets == "Hello!<|end|>"


def test_a_reply_that_repeats_the_question_is_told_from_it() -> None:
    assert examples(Document(talk("Hi", "Hi", "Hi", "Hi")))[0][1] == "Hi<|end|>Hi<|end|>"


def test_everything_is_a_target_for_a_backbone_from_scratch() -> None:
    (example,) = encode(
        ChatTemplate(tokenizer(), "m"), Document(talk("Hi", "Hello!", system="x")), everything=True
    )
    assert all(example.trained)


def test_where_the_template_forgets_thoughts_each_reply_is_an_example() -> None:
    document = Document(
        talk("Hi", "<think>Polite.</think>Hello!", "Bye", "<think>Sad.</think>So long.")
    )
    first, second = examples(document, FORGETFUL)
    thought = "<think>\nPolite.\n</think>\n\nHello!<|end|>"
    assert first == ("<|user|>Hi<|end|><|assistant|>" + thought, thought)
    thought = "<think>\nSad.\n</think>\n\nSo long.<|end|>"
    assert (
        second[0]
        == "<|user|>Hi<|end|><|assistant|>Hello!<|end|><|user|>Bye<|end|><|assistant|>" + thought
    )
    assert second[1] == thought


@pytest.mark.parametrize(
    ("template", "reply", "targets"),
    [
        (CHAT_TEMPLATE, "So long, and ", "Hello!<|end|>So long, and"),
        (CHAT_TEMPLATE, "Hello!", "Hello!<|end|>Hello!"),
        (FORGETFUL, "<think>Sad.</think>   So", "Hello!<|end|><think>\nSad.\n</think>\n\nSo"),
    ],
)
def test_a_reply_that_was_cut_off_does_not_teach_its_end(
    template: str, reply: str, targets: str, tmp_path: Path
) -> None:
    turns = [*talk("Hi", "Hello!", "Bye"), {"role": "assistant", "content": reply, "cut": True}]
    (document,) = read_documents(write_lines(tmp_path / "d.jsonl", {"messages": turns}))
    text, trained = examples(document, template)[-1]
    assert trained == targets
    assert text.endswith(targets[-2:])


# ---- with fastchat's templates ----


@pytest.mark.parametrize(
    ("name", "system", "targets"),
    [
        ("vicuna_v1.1", None, " Hello!</s> So long.</s>"),
        ("vicuna_v1.1", "Be brief.", " Hello!</s> So long.</s>"),
        (
            "llama-2",
            "Be brief.",
            " Hello! </s> So long. </s>",
        ),  # and not <s>, which begins the next turn
        ("mistral", None, " Hello!</s> So long.</s>"),
        ("zephyr", "Be brief.", "Hello!</s>So long.</s>"),
        ("one_shot", None, " Hello!\n### So long.\n###"),
        ("qwen-7b-chat", None, "Hello!<|im_end|>So long.<|im_end|>"),
    ],
)
def test_fastchats_prompt_is_trained_on_and_the_replies_are_its_targets(
    name: str, system: str | None, targets: str
) -> None:
    conversation, tok = get_conv_template(name), llama_tokenizer()
    if name == "qwen-7b-chat":
        tok.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        conversation.stop_token_ids = [tok.convert_tokens_to_ids("<|im_end|>")]
    template = ChatTemplate(tok, "m", conversation.copy())
    messages = talk("Hi", "Hello!", "Hello!", "So long.", system=system or "")
    if system is not None:
        conversation.set_system_message(system)
    for place, message in enumerate(messages[bool(system) :]):
        conversation.append_message(conversation.roles[place % 2], message["content"])
    (example,) = encode(template, Document(messages))
    assert example.ids == tok(conversation.get_prompt().removeprefix("<s>"))["input_ids"]
    assert (
        tok.decode([i for i, on in zip(example.ids, example.trained, strict=True) if on]) == targets
    )


def test_a_reply_is_read_behind_the_very_ids_that_the_chat_prefills(tmp_path: Path) -> None:
    """With Vicuna's own kind of tokenizer, whose words begin with their space."""
    vicuna_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tok = AutoTokenizer.from_pretrained(tmp_path, **tokenizer_settings(tmp_path))
    template = ChatTemplate(tok, "m", named_template("vicuna_v1.1"))
    messages = talk("Hi", "Hello, you!", "And now?", "Two\nlines.")
    (example,) = encode(template, Document(messages))
    expected = [False] * len(example.ids)
    for before in (1, 3):
        prompt = template.encode(messages[:before])
        assert example.ids[: len(prompt)] == prompt
        end = example.ids.index(tok.eos_token_id, len(prompt)) + 1
        reply = str(tok.decode(example.ids[len(prompt) : end]))
        assert reply.strip() == messages[before]["content"] + "</s>"
        expected[len(prompt) : end] = [True] * (end - len(prompt))
    assert example.trained == expected


def test_with_fastchat_a_reply_that_was_cut_off_does_not_teach_its_end() -> None:
    template = ChatTemplate(llama_tokenizer(), "m", named_template("vicuna_v1.1"))
    (example,) = encode(template, Document(talk("Hi", "Hello, "), cut=True))
    targets = [i for i, on in zip(example.ids, example.trained, strict=True) if on]
    assert template.tokenizer.decode(targets) == " Hello,"


def test_the_bundled_models_ids_are_those_of_its_own_template() -> None:
    tok = AutoTokenizer.from_pretrained(BUNDLED)
    messages = talk("Hi there", "Hello!", "Bye", "So long.", system="Be brief.")
    (example,) = encode(ChatTemplate(tok, "bundled"), Document(messages))
    rendered: Any = tok.apply_chat_template(list(messages), return_dict=True)
    assert example.ids == rendered["input_ids"]
    targets = [i for i, on in zip(example.ids, example.trained, strict=True) if on]
    assert tok.decode(targets) == "Hello!<|end|>So long.<|end|>"


# ---- texts ----


def test_plain_text_is_all_targets_and_ends_once(tmp_path: Path) -> None:
    tok = tokenizer()
    (tmp_path / "book.txt").write_text("Once upon\na time.")
    (document,) = read_documents(tmp_path / "book.txt")
    lines = write_lines(
        tmp_path / "d.jsonl", {"text": "One"}, {"text": "  "}, {"text": "Two<|end|>"}
    )
    documents = [document, *read_documents(lines)]
    assert [d.text for d in documents] == ["Once upon\na time.", "One", "Two<|end|>"]
    (book,) = encode(ChatTemplate(tok, "m"), document)
    assert (tok.decode(book.ids), all(book.trained)) == ("Once upon\na time.", True)
    tok.eos_token = "<|end|>"
    ids = [next(encode(ChatTemplate(tok, "m"), d)).ids for d in documents]
    assert [i.count(END) for i in ids] == [1, 1, 1]
    assert all(i[-1] == END for i in ids)


# ---- files ----


def test_sharegpt_as_it_is_found(tmp_path: Path) -> None:
    def shared(*turns: tuple[str, str]) -> dict[str, Any]:
        return {"id": "x", "conversations": [{"from": who, "value": what} for who, what in turns]}

    file = tmp_path / "s.json"
    items = [
        shared(("human", "Hi"), ("gpt", "Hello!")),
        shared(),
        shared(
            ("gpt", "I was"),
            ("gpt", "here first"),
            ("human", "Hi"),
            ("chatgpt", "Hello!"),
            ("human", "Bye"),
        ),
        shared(("gpt", "Nobody asked")),
        shared(("human", "Anybody?")),
        shared(("system", "Be brief."), ("user", "Hi"), ("bard", "Yo")),
    ]
    file.write_text(json.dumps(items))
    first, third, last = read_documents(file)
    assert first == Document(talk("Hi", "Hello!"), place=f"{file}, item 1")
    assert third == Document(talk("Hi", "Hello!", "Bye"), place=f"{file}, item 3")
    assert last == Document(talk("Hi", "Yo", system="Be brief."), place=f"{file}, item 6")
    assert list(read_documents(write_lines(tmp_path / "s.jsonl", *items)))[1].place.endswith(
        "s.jsonl, line 3"
    )


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("d.jsonl", b'{"text": "a"}\n\n{"text": \n', "d.jsonl, line 3: not JSON (Expecting value)"),
        (
            "d.jsonl",
            b'{"text": "a"}\n{"text": "\xff"}\n',
            "d.jsonl, line 2: not UTF-8 (invalid start byte)",
        ),
        (
            "d.jsonl",
            b'{"txt": "a"}\n',
            "d.jsonl, line 1: no 'messages', no ShareGPT 'conversations' and no 'text'",
        ),
        ("d.jsonl", b'{"text": "a"}\n[1]\n', "d.jsonl, line 2: no 'messages'"),
        (
            "d.jsonl",
            b'{"messages": [{"role": "ghost", "content": "a"}]}',
            "line 1: a turn needs a known role and text",
        ),
        (
            "d.jsonl",
            b'{"messages": [{"role": "user", "content": ["a"]}]}',
            "line 1: a turn needs a known role",
        ),
        ("d.jsonl", b'{"messages": ["a"]}', "line 1: a turn needs a known role"),
        ("d.json", b'[{"text": "a"},\n{"text": "b"]', "d.json, line 2: not JSON"),
        ("d.json", b'[{"text": "a"}, {"messages": 3}]', "d.json, item 2: no 'messages'"),
        ("d.json", b"3", "cannot read"),
        ("d.txt", b"\xff", "cannot read"),
        ("none.jsonl", None, "cannot read"),
    ],
)
def test_a_damaged_file_is_told_by_its_line(
    name: str, content: bytes | None, complaint: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as refusal:
        list(read_documents(file))
    assert complaint in str(refusal.value)
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_template_that_refuses_is_told_with_the_line() -> None:
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    document = Document(talk("Hi", "Yo", system="x"), place="d.jsonl, line 7")
    with pytest.raises(
        UserError, match=r"d\.jsonl, line 7: the chat template of m refuses .*: no system prompts"
    ):
        examples(document, strict + CHAT_TEMPLATE)


# ---- rows ----


def test_rows_keep_documents_apart() -> None:
    documents = [
        Example(list(range(10 * n, 10 * n + size)), [True] * size)
        for n, size in enumerate((3, 9, 3))
    ]
    rows = PackedRows(documents, 4)
    assert rows.ids.tolist() == [[0, 1, 2, 10], [11, 12, 13, 14], [15, 16, 17, 18], [20, 21, 22, 0]]
    assert rows.positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 0]]
    labels = [rows[i]["labels"].tolist() for i in range(4)]
    assert labels[0] == [
        IGNORED,
        1,
        2,
        IGNORED,
    ]  # the first token of a document follows from nothing
    assert labels[3] == [IGNORED, 21, 22, IGNORED]
    assert [int(rows[i]["rows"]) for i in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(5))
def test_no_token_is_lost_and_positions_count_within_a_document(seed: int) -> None:
    chance = random.Random(seed)
    length = chance.randrange(5, 20)
    documents = []
    for n in range(30):
        ids = chance.choices(range(1, 99), k=chance.randrange(1, 3 * length))
        documents.append(Example(ids, [chance.random() < 0.7 for _ in ids], f"line {n}"))
    rows = PackedRows(documents, length)
    flat = [
        (n, i, on) for n, d in enumerate(documents) for i, on in zip(d.ids, d.trained, strict=True)
    ]
    padding = -len(flat) % length
    assert rows.ids.flatten().tolist() == [i for _, i, _ in flat] + [0] * padding
    position, labels = -1, []
    for place, (n, i, on) in enumerate([*flat, *[(-1, 0, False)] * padding]):
        new = place % length == 0 or n != ([*flat, *[(-1, 0, False)] * padding])[place - 1][0]
        position = 0 if new else position + 1
        assert int(rows.positions.flatten()[place]) == position
        labels.append(i if on and position else IGNORED)
    assert torch.stack([rows[i]["labels"] for i in range(len(rows))]).flatten().tolist() == labels


def test_a_row_names_where_its_documents_come_from() -> None:
    sizes = (3, 9, 2, 1)
    documents = [
        Example([1] * size, [True] * size, f"d.jsonl, line {n}") for n, size in enumerate(sizes, 1)
    ]
    rows = PackedRows(documents, 4)
    places = ["d.jsonl, line 1 to d.jsonl, line 2", "d.jsonl, line 2", "d.jsonl, line 2"]
    assert [rows.place(row) for row in range(4)] == [*places, "d.jsonl, line 3 to d.jsonl, line 4"]
    assert (
        PackedRows([Example([1, 2], [True] * 2, "d.txt")], 4).place(0) == "d.txt"
    )  # the filling has no place


def test_data_without_a_target_are_refused() -> None:
    with pytest.raises(UserError, match="nothing to learn from"):
        PackedRows([Example([1, 2], [False, False])], 4)


def test_a_long_text_is_packed_in_time_that_grows_with_its_length() -> None:
    started = time.perf_counter()
    rows = PackedRows([Example([1] * 1_000_003, [True] * 1_000_003)], 10)
    assert (
        time.perf_counter() - started < 60
    )  # a second; a sum over all pieces for each piece takes many minutes
    assert len(rows) == 100_001


@pytest.mark.parametrize(
    "kind", ["llama", "gemma2", "gemma3", "qwen3-mixed", "mistral", "phi3-sliding"]
)
def test_a_packed_document_is_read_as_if_alone(kind: str) -> None:
    backbone = random_model(kind).double().requires_grad_(False)
    trainee = Trainee(
        backbone, new_heads(backbone, make_recipe("medusa1")).double(), make_recipe("medusa1")
    )
    documents = [prompt_ids(size, seed=size) for size in (17, 30, 40, 25)]
    rows = PackedRows([Example(ids, [True] * len(ids)) for ids in documents], 60)
    batch = [rows[0], rows[1]]
    hidden = trainee.hidden_states(
        *(torch.stack([row[key] for row in batch]) for key in ("input_ids", "position_ids"))
    )
    # Where each document, or what is left of one on the second row, stands.
    for row, start, ids in (
        (0, 0, documents[0]),
        (0, 17, documents[1]),
        (0, 47, documents[2][:13]),
        (1, 0, documents[2][13:]),
        (1, 27, documents[3]),
        (1, 52, [0] * 8),
    ):
        alone = backbone.base_model(
            input_ids=torch.tensor([ids]), use_cache=False
        ).last_hidden_state[0]
        torch.testing.assert_close(
            hidden[row, start : start + len(ids)], alone, rtol=1e-5, atol=1e-5
        )  # norms are in float32
