"""Values of --model: the shipped list, the user's own, folders and hub ids; mistakes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from medusa_chat.cli import main
from medusa_chat.config import BUNDLED, LAYOUTS, SHIPPED_HEADS, ModelSpec, UserError
from medusa_chat.hub import model_list
from medusa_chat.hub.model_list import (
    is_hub_id,
    known_models,
    packaged_file,
    read_models,
    resolve_model,
    split_revision,
)
from medusa_chat.shapes import SHAPES
from tests.helpers.complaints import refusal

if TYPE_CHECKING:
    from pathlib import Path

NAMES = [
    "bundled",
    "smollm2",
    "vicuna-7b",
    "vicuna-13b",
    "vicuna-33b",
    "vicuna-7b-v1.5",
    "vicuna-13b-v1.5",
    "vicuna-33b-medusa2",
    "zephyr-7b-beta",
    "mistral-7b-instruct-v0.2",
]
UNTRIED = ["llama-3.1-8b-nebius", "llama-3.1-8b-philschmid", "gemma-7b-it"]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the place of the user's own list, in a folder of the test."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.setattr(model_list, "user_file", lambda: tmp_path / "settings" / "models.yaml")
    (tmp_path / "settings").mkdir()
    return tmp_path / "settings" / "models.yaml"


def refused(*arguments: object, **named: object) -> str:
    return refusal(resolve_model, *arguments, **named)


def test_the_list_that_ships() -> None:
    shipped = read_models(packaged_file())
    assert list(shipped) == NAMES + UNTRIED
    assert resolve_model(None) == resolve_model("bundled")
    assert resolve_model(None).backbone == str(BUNDLED)
    for name, spec in shipped.items():
        assert spec.licence != "unknown"
        assert spec.description
        assert spec.tried == (name not in UNTRIED)
        assert bool(spec.mirror) == (name == "smollm2")
        if name in ("bundled", "smollm2", *UNTRIED):
            continue
        assert spec.layout in LAYOUTS
        assert spec.shape in SHAPES
        assert (spec.quant, spec.quant_heads, spec.lm_heads) == ("nf4", "nf4", "own")
        assert spec.medusa_heads in (3, 5)
        assert (spec.heads is None) == (spec.layout == "v1.0")
        for place in (spec.backbone, spec.heads):
            if place:
                validate_repo_id(place)


def test_templates_are_fastchats() -> None:
    conversation = pytest.importorskip("fastchat.conversation")
    assert all(
        spec.template in conversation.conv_templates
        for spec in known_models().values()
        if spec.template
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "must hold a mapping 'models'"),
        ("models: []", "must hold a mapping"),
        ("- a", "must hold a mapping"),
        ("models: {a: b: c}", "cannot read the model list"),
        ("models: {a: text}", "entry 'a' must be a mapping"),
        (
            "models: {a: {backbone: x, hedas: y}}",
            "entry 'a' has an unknown key 'hedas'; known are backbone, heads",
        ),
        ("models: {a: {backbone: 3}}", "entry 'a': backbone must be text, not 3"),
        ("models: {a: {backbone: x, heads: }}", "entry 'a': heads must be text, not None"),
        ("models: {a: {heads: x}}", "entry 'a' lacks backbone"),
        ("models: {a: {}}", "entry 'a' lacks backbone"),
        ("models: {a: {backbone: x, name: y}}", "unknown key 'name'"),
        (
            "models: {a: {backbone: x, quant: nf5}}",
            "entry 'a': quant must be one of auto, none, nf4, .*not 'nf5'",
        ),
        (
            "models: {a: {backbone: x, quant_heads: 4}}",
            "entry 'a': quant_heads must be one of auto, none",
        ),
        (
            "models: {a: {backbone: x, shape: vicuna}}",
            "entry 'a': shape must be one of llama-1b, .*not 'vicuna'",
        ),
        ("models: {a: {backbone: x, layout: v3}}", "entry 'a': layout must be one of v0.1, v2"),
        (
            "models: {a: {backbone: x, medusa_heads: five}}",
            "entry 'a': medusa_heads must be a whole number",
        ),
        (
            "models: {a: {backbone: x, medusa_heads: -1}}",
            "entry 'a': medusa_heads must be a whole number",
        ),
        (
            "models: {a: {backbone: x, lm_heads: mine}}",
            "entry 'a': lm_heads must be one of own, shared",
        ),
    ],
)
def test_a_broken_list_names_file_entry_and_key(text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=complaint) as refused:
        known_models(file)
    assert "\n" not in str(refused.value)
    assert str(file) in str(refused.value)


def test_a_list_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the model list"):
        known_models(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00models")
    with pytest.raises(UserError, match="cannot read the model list"):
        known_models(tmp_path / "binary.yaml")


def test_every_key_of_an_entry_is_read(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(
        "models: {7: {backbone: a/b@v2, heads: c/d, layout: vllm, tree: chain-3,"
        " system: Be brief., licence: MIT, quant: int8, shape: llama-8b, medusa_heads: 4,"
        " lm_heads: shared}}"
    )
    spec = ModelSpec(
        "7",
        "a/b@v2",
        "c/d",
        layout="vllm",
        tree="chain-3",
        system="Be brief.",
        licence="MIT",
        quant="int8",
        shape="llama-8b",
        medusa_heads=4,
        lm_heads="shared",
    )
    assert read_models(file) == {"7": spec}


def test_the_users_list_adds_and_replaces(own: Path, tmp_path: Path) -> None:
    assert list(known_models()) == NAMES + UNTRIED
    own.write_text("models: {mine: {backbone: a/b}, vicuna-7b: {backbone: c/d}}")
    assert list(known_models()) == [*NAMES, *UNTRIED, "mine"]
    assert resolve_model("vicuna-7b") == ModelSpec("vicuna-7b", "c/d")
    assert resolve_model("vicuna-13b") == read_models(packaged_file())["vicuna-13b"]
    # A named list replaces the user's.
    other = tmp_path / "other.yaml"
    other.write_text("models: {theirs: {backbone: a/b}}")
    assert list(known_models(other)) == [*NAMES, *UNTRIED, "theirs"]
    assert "unknown model 'mine'" in refused("mine", models=other)


def test_folders_in_the_users_list_are_relative_to_it(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    own.write_text("models: {a: {backbone: ./a, heads: ../heads.pt}, b: {backbone: ~/b}}")
    assert resolve_model("a").backbone == str(own.parent / "a")
    assert resolve_model("a").heads == str(own.parent.parent / "heads.pt")
    assert resolve_model("b").backbone == "/home/somebody/b"


def test_every_command_with_a_model_takes_a_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "models.yaml"
    file.write_text("models: {a: {backbone: x, quant: nf5}}")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello\n" * 9)
    use = ["--model", "a", "--models", str(file)]
    out = ["--out", str(tmp_path / "out")]
    for words in (
        ["chat", *use, "--prompt", "hi"],
        ["bench", *use, "--prompts", str(prompts)],
        ["verify", *use, "--prompts", str(prompts)],
        ["calibrate", *use, "--data", str(prompts)],
        ["train", *use, "--data", str(prompts), *out],
        ["distill", *use, "--prompts", str(prompts), *out],
        ["export", *use, "--layout", "tgi", *out],
        ["models", "--models", str(file)],
    ):
        assert main(words) == 2, words
        printed = capsys.readouterr().err
        assert f"{file}: entry 'a': quant must be" in printed, words
        assert printed.count("\n") == 1


def test_folders_and_hub_ids_are_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == ModelSpec(tmp_path.name, str(tmp_path))
    assert resolve_model("owner/name") == ModelSpec("name", "owner/name")
    assert resolve_model("owner/name@refs/pr/1") == ModelSpec("name", "owner/name@refs/pr/1")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert resolve_model(f"~/{tmp_path.name}") == ModelSpec(tmp_path.name, str(tmp_path))
    assert resolve_model(None, "~/heads").heads == str(tmp_path.parent / "heads")
    monkeypatch.chdir(tmp_path)
    for wrong in (
        "nothing",
        "a/b/c",
        "./a/b",
        "../b",
        "/no/such",
        "~/no-such",
        "bundled@main",
        "nothing@main",
    ):
        assert "unknown model" in refused(wrong)


def test_a_revision_of_a_listed_model() -> None:
    listed = resolve_model("vicuna-7b")
    assert resolve_model("vicuna-7b@v2") == replace(listed, backbone=f"{listed.backbone}@v2")


def test_other_heads_than_the_listed_ones() -> None:
    spec = resolve_model("vicuna-7b", "somebody/heads@main")
    assert (spec.heads, spec.layout, spec.medusa_heads, spec.shape) == (
        "somebody/heads@main",
        "",
        0,
        "vicuna-7b",
    )


def test_heads_that_come_with_medusa_chat(tmp_path: Path) -> None:
    assert resolve_model("vicuna-7b", "shipped:mine").heads == str(SHIPPED_HEADS / "mine")
    (tmp_path / "list.yaml").write_text("models: {a: {backbone: b/c, heads: 'shipped:mine'}}")
    assert read_models(tmp_path / "list.yaml")["a"].heads == str(SHIPPED_HEADS / "mine")


def test_quantization_named_and_not() -> None:
    assert resolve_model("vicuna-7b", quant="none", quant_heads="int8").quant == "none"
    assert resolve_model("vicuna-7b", quant="none", quant_heads="int8").quant_heads == "int8"
    assert "quant_heads must be one of auto, none, nf4" in refused("vicuna-7b", quant_heads="nf5")


@pytest.mark.parametrize(
    ("place", "complaint"),
    [
        ("owner/name@", "names no revision after the @"),
        ("owner/name@a b", "names no revision"),
        ("owner/name@a@b", "names no revision"),
        ("owner/na me", "'owner/na me' is no hub id"),
        ("owner/-name", "is no hub id"),
        ("owner/na--me", "is no hub id"),
        ("/name@x", "unknown model"),
    ],
)
def test_ids_that_the_hub_cannot_have(place: str, complaint: str) -> None:
    assert complaint in refused(place)
    if "unknown" not in complaint:
        assert complaint in refused(None, place)


@pytest.mark.parametrize("place", ["a/b", "a/b@c", "a/b@refs/pr/1", "a.b/c", "a/b@", "a/b c"])
def test_places_that_are_hub_ids(place: str) -> None:
    assert is_hub_id(place)


@pytest.mark.parametrize(
    "place", ["", "a", "a@b", "a@b/c", "a/", "/a", "./a", "../a", "~/a", "a/b/c", "/a/b"]
)
def test_places_that_are_not(place: str) -> None:
    assert not is_hub_id(place)


def test_a_revision_apart_from_its_id() -> None:
    assert split_revision("owner/name") == ("owner/name", None)
    assert split_revision("owner/name@refs/pr/1") == ("owner/name", "refs/pr/1")
    assert split_revision("owner/name@") == ("owner/name", None)


def test_aliases_that_would_fill_the_memory(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (tmp_path / "models.yaml").write_text("\n".join(lines))
    assert "it has more than 20 aliases" in refusal(read_models, tmp_path / "models.yaml")
