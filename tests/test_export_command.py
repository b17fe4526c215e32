"""`medusa-chat export`: heads guess alike in every layout; a failed export leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings, strategies
from safetensors.torch import load_file

from medusa_chat.cli import main
from medusa_chat.config import ACCURACY_FILE, LAYOUTS, ModelSpec, UserError
from medusa_chat.export import writing
from medusa_chat.export.folder import RECORD_FILE
from medusa_chat.export.writing import Export, export
from medusa_chat.model.layouts import find_heads, read_heads
from medusa_chat.model.layouts.write import write_tensors
from tests.helpers.complaints import refusal
from tests.helpers.full_disk import full_disk
from tests.helpers.public_layouts import logits_of, put, put_shards, tensors_of
from tests.helpers.tiny import END, random_backbone, random_heads, random_model, save_model

if TYPE_CHECKING:
    from medusa_chat.model.heads import MedusaHeads

V = 320
BACKBONE = random_backbone("llama", V)
LM_HEAD = BACKBONE.lm_head.weight.detach()
WHOLE = ("v1.0", "modelopt")
KINDS = [
    (layers, own, biases) for layers in (1, 2) for own in (True, False) for biases in (True, False)
]


def made(layers: int = 1, own: bool = True, biases: bool = True) -> MedusaHeads:
    heads = random_heads(BACKBONE, 3, layers, own)
    if not biases:
        heads.bias.zero_()
    return heads


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone without heads, with a licence and a card."""
    folder = save_model(
        tmp_path_factory.mktemp("base"), random_model("llama", V, pad_token_id=0, eos_token_id=END)
    )
    (folder / "LICENSE").write_text("do as you like")
    (folder / "NOTICE.txt").write_text("made by tests")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (folder / "modeling_odd.py").write_text("raise SystemExit")
    return folder


def source(folder: Path, heads: MedusaHeads) -> Path:
    return put(
        tensors_of(heads, "official"), folder / "heads" / "medusa_lm_head.safetensors"
    ).parent


def logits_in(folder: Path) -> torch.Tensor:
    file = find_heads(folder)
    assert file is not None
    return logits_of(read_heads(file, 32, V, lm_head=LM_HEAD).heads, LM_HEAD)


def do(base: Path, heads: Path, layout: str, out: Path, **job: Any) -> list[str]:
    return export(ModelSpec("tiny", str(base), heads=str(heads)), Export(layout, out, **job))


def refused(*arguments: Any, **named: Any) -> str:
    return refusal(do, *arguments, **named)


# ---- the matrix ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("layers", "own", "biases"), KINDS)
def test_every_layout_gives_the_same_logits(
    base: Path, tmp_path: Path, layout: str, layers: int, own: bool, biases: bool
) -> None:
    heads = made(layers, own, biases)
    given, out = source(tmp_path, heads), tmp_path / "new" / "out"
    if layout == "v2" and own:
        assert "they have LM heads of their own" in refused(base, given, layout, out)
        assert not out.exists()
        assert left(tmp_path) == {"heads"}
        return
    notices = do(base, given, layout, out)
    assert torch.equal(logits_in(out), logits_of(heads, LM_HEAD))
    copies = not own and (layout not in ("v2", "vllm", "tgi") or (layout, layers) == ("tgi", 2))
    assert any("each head gets a copy of the LM head" in line for line in notices) is copies
    # The official code and ModelOpt build one block and use it L times.
    assert any("applies one block 2 times" in line for line in notices) is (
        layers == 2 and layout in ("v0.1", "v2", *WHOLE)
    )
    read = read_heads(find_heads(out) or out, 32, V, lm_head=LM_HEAD, layout=layout)
    assert (read.heads.lm_heads is not None) is (own or copies)
    assert read.notices == ()  # its config says what is in it, and it is what it is called
    assert (out / "LICENSE").read_text() == "do as you like"
    assert not (out / "modeling_odd.py").exists()


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    kind=strategies.sampled_from(KINDS),
    way=strategies.lists(strategies.sampled_from(LAYOUTS), min_size=3, max_size=4),
)
def test_any_way_through_the_layouts(
    base: Path,
    tmp_path_factory: pytest.TempPathFactory,
    kind: tuple[int, bool, bool],
    way: list[str],
) -> None:
    """A copy of the LM head stays the head's own; nothing else may change."""
    folder, heads = tmp_path_factory.mktemp("way"), made(*kind)
    at, own = source(folder, heads), kind[1]
    for i, layout in enumerate(way):
        if layout == "v2" and own:
            continue
        model = (
            at
            if at.parent == folder and (at / "model-00001-of-00002.safetensors").exists()
            else base
        )
        do(model, at, layout, folder / str(i))
        at = folder / str(i)
        own = read_heads(find_heads(at) or at, 32, V, lm_head=LM_HEAD).heads.lm_heads is not None
        assert torch.equal(logits_in(at), logits_of(made(*kind), LM_HEAD))


# ---- what each program reads ----


def test_configs_are_those_that_the_programs_read(base: Path, tmp_path: Path) -> None:
    given = source(tmp_path, made(own=False))
    configs = {}
    for layout in LAYOUTS:
        do(base, given, layout, tmp_path / layout)
        configs[layout] = json.loads((tmp_path / layout / "config.json").read_text())
    official = {"base_model_name_or_path": str(base), "medusa_num_heads": 3, "medusa_num_layers": 1}
    assert configs["v0.1"] == official
    assert configs["v2"] == configs["tgi"] == official | {"version": "2"}
    assert configs["tensorrt-llm"] == official | {"num_medusa_heads": 3, "num_medusa_layers": 1}
    vllm = configs["vllm"]
    assert (vllm["num_heads"], vllm["num_hidden_layers"], vllm["medusa_fc_bias"]) == (3, 1, True)
    assert (vllm["original_lm_head"], vllm["vocab_size"], vllm["hidden_size"]) == (True, V, 32)
    # vLLM renames every key with "num" and "heads", and every one with "num" and "layers".
    assert [key for key in vllm if "num" in key] == ["num_heads", "num_hidden_layers"]
    backbone = json.loads((base / "config.json").read_text())
    assert configs["v1.0"] == backbone | {"medusa_num_heads": 3, "medusa_num_layers": 1}
    assert configs["modelopt"] == backbone | {
        "medusa": {"num_medusa_heads": 3, "num_medusa_layers": 1}
    }
    files = {layout: {file.name for file in (tmp_path / layout).iterdir()} for layout in LAYOUTS}
    travel = {
        "README.md",
        "BASE_MODEL_CARD.md",
        "LICENSE",
        "NOTICE.txt",
        "config.json",
        RECORD_FILE,
    }
    assert files["v0.1"] == travel | {"medusa_lm_head.pt"}
    assert (
        files["tgi"]
        == files["v2"]
        == files["tensorrt-llm"]
        == travel | {"medusa_lm_head.safetensors"}
    )
    assert files["vllm"] == travel | {"model.safetensors"}
    tensors = load_file(tmp_path / "vllm" / "model.safetensors")
    assert set(tensors) == {
        f"blocks.{h}.layers.0.{kind}" for h in range(3) for kind in ("weight", "bias")
    } | {"lm_head.weight"}
    assert torch.load(tmp_path / "v0.1" / "medusa_lm_head.pt", weights_only=True).keys() == {
        f"{h}.{rest}" for h in range(3) for rest in ("0.linear.weight", "0.linear.bias", "1.weight")
    }
    mode = stat.S_IMODE((tmp_path / "vllm" / "model.safetensors").stat().st_mode)
    assert mode == stat.S_IMODE((tmp_path / "vllm" / "config.json").stat().st_mode)


@pytest.mark.parametrize("layout", WHOLE)
def test_whole_models_answer_as_before(
    base: Path, tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a model of one file, from shards, and from a model with other heads among its shards."""
    given = source(tmp_path, made(own=False))
    flags = [
        "--dtype",
        "float32",
        "--tree",
        "chain-2",
        "--max-new-tokens",
        "8",
        "--prompt",
        "Hi",
        "--device",
        "cpu",
    ]

    def answer(*model: str) -> tuple[str, str]:
        capsys.readouterr()
        assert main([*model, *flags]) == 0
        return capsys.readouterr()

    expected = answer("--model", str(base), "--heads", str(given))
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for i, (name, tensor) in enumerate(load_file(base / "model.safetensors").items()):
        shards[i % 2][name] = tensor
    in_shards, in_pickles = tmp_path / "shards", tmp_path / "pickles"
    for folder in (in_shards, in_pickles):
        shutil.copytree(base, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    shards[1] |= tensors_of(made(2), "v1.0")  # heads of before, which have to go
    put_shards(shards, in_shards)
    put(load_file(base / "model.safetensors"), in_pickles / "pytorch_model.bin")
    for place in (base, in_shards, in_pickles):
        out = tmp_path / f"out-{place.name}"
        do(place, given, layout, out)
        suffix = ".bin" if place is in_pickles else ".safetensors"
        index = json.loads(next(out.glob(f"*{suffix}.index.json")).read_text())
        assert set(index["weight_map"].values()) == {
            file.name for file in out.glob(f"*-of-*{suffix}")
        }
        assert (
            not [name for name in index["weight_map"] if name.startswith("medusa_head.")]
            or layout == "v1.0"
        )
        assert answer("--model", str(out)) == expected


def test_a_tied_lm_head_is_found(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tied", random_model("llama-tied", V))
    heads = random_heads(random_backbone("llama-tied", V), 2, own=False)
    do(folder, source(tmp_path, heads), "vllm", tmp_path / "out")
    embeddings = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], embeddings
    )


def test_number_formats(base: Path, tmp_path: Path) -> None:
    given = source(tmp_path, made())
    for dtype in ("bfloat16", "float16"):
        do(base, given, "tgi", tmp_path / dtype, dtype=dtype)
        tensors = load_file(tmp_path / dtype / "medusa_lm_head.safetensors").values()
        assert {tensor.dtype for tensor in tensors} == {getattr(torch, dtype)}
    large = made()
    large.weight[0, 1, 2, 3] = 1e6
    assert "too large for float16" in refused(
        base, source(tmp_path, large), "tgi", tmp_path / "x", dtype="float16"
    )


# ---- the card ----


def test_the_card_has_base_licence_use_and_accuracy(base: Path, tmp_path: Path) -> None:
    given = source(tmp_path, made())
    (given / ACCURACY_FILE).write_text(
        json.dumps({"accuracy": [[0.5, 0.75], [0.25, 0.3], [0.125, 0.2]]})
    )
    for layout in LAYOUTS:
        if layout == "v2":
            continue
        do(base, given, layout, tmp_path / layout)
        card = (tmp_path / layout / "README.md").read_text()
        front = yaml.safe_load(card.split("---")[1])
        assert front["license"] == "mit"
        assert "base_model" not in front  # a folder is none
        assert f"| base model | {base} |" in card
        assert f"| layout | {layout}: " in card
        assert "medusa-chat --model " in card
        assert "| 1 | 50.0% | 75.0% |" in card
        assert ("vllm serve" in card) is (layout == "vllm")
        assert (tmp_path / layout / ACCURACY_FILE).is_file()
    assert (tmp_path / "tgi" / "BASE_MODEL_CARD.md").read_text().endswith("# Tiny\n")


def test_a_public_base_is_named_by_its_id(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "someone/tiny-7b"}))
    do(folder, source(tmp_path, made()), "tgi", tmp_path / "out")
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["base_model_name_or_path"]
        == "someone/tiny-7b"
    )
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert front["base_model"] == "someone/tiny-7b"


# ---- folders ----


def left(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_an_earlier_export_is_replaced_and_nothing_else(base: Path, tmp_path: Path) -> None:
    given, out = source(tmp_path, made()), tmp_path / "out"
    out.mkdir()
    do(base, given, "tgi", out)  # an empty folder is free
    do(base, given, "v0.1", out)
    assert "medusa_lm_head.safetensors" not in left(out)
    (out / RECORD_FILE).unlink()
    assert "holds other files; --overwrite" in refused(base, given, "tgi", out)
    do(base, given, "tgi", out, overwrite=True)
    assert "medusa_lm_head.pt" not in left(out)
    assert left(tmp_path) == {"heads", "out"}
    for place in (base, given, tmp_path, Path.cwd()):
        assert "holds the model, or the folder" in refused(
            base, given, "tgi", place, overwrite=True
        )
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(base, given, "tgi", tmp_path / "file")


def test_a_full_disk_leaves_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = source(tmp_path, made())
    for layout in ("tgi", "v0.1", "v1.0"):
        out = tmp_path / "out"
        words = [
            "export",
            "--model",
            str(base),
            "--heads",
            str(given),
            "--layout",
            layout,
            "--out",
            str(out),
        ]
        with full_disk() as limit:
            limit(50_000)
            assert main(words) == 2
        complaint = capsys.readouterr().err
        assert complaint.startswith("medusa-chat: error: ")
        assert complaint.count("\n") == 1
        assert left(tmp_path) == {"heads"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_leaves_the_earlier_export(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    given, out = source(tmp_path, made()), tmp_path / "out"
    do(base, given, "tgi", out)
    before = left(out)

    def stop(*_arguments: Any) -> None:
        raise error

    for name in ("write_card", "check_written", "copy_documents"):
        with monkeypatch.context() as patch:
            patch.setattr(writing, name, stop)
            with pytest.raises(error):
                do(base, given, "v0.1", out)
    renames: list[Any] = []

    def rename(old: Any, new: Any) -> None:
        renames.append(new)
        if len(renames) == 2:
            raise error
        os.replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(error):
            do(base, given, "v0.1", out)
    assert left(out) == before
    assert left(tmp_path) == {"heads", "out"}


def test_what_does_not_read_back_is_removed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(tensors: dict[str, torch.Tensor], file: Path) -> None:
        tensors["1.0.linear.bias"] = tensors["1.0.linear.bias"] + 1
        write_tensors(tensors, file)

    monkeypatch.setattr(writing, "write_tensors", wrong)
    given = source(tmp_path, made())
    assert "give other logits when they are read back" in refused(
        base, given, "tgi", tmp_path / "out"
    )
    assert left(tmp_path) == {"heads"}


def test_models_without_heads_or_without_a_backbone(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tiny has no Medusa heads to export"):
        export(ModelSpec("tiny", str(base)), Export("tgi", tmp_path / "out"))
    given = source(tmp_path, made())
    assert "cannot load the model" in refused(given, given, "tgi", tmp_path / "out")
    with pytest.raises(UserError, match="nobody/no-such-model"):
        export(
            ModelSpec("tiny", "nobody/no-such-model@v2", heads=str(given)),
            Export("tgi", tmp_path / "out"),
        )
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((base / "config.json").read_text())
    assert "there are no weights in" in refused(bare, given, "tgi", tmp_path / "out")
    assert left(tmp_path) == {"heads", "bare"}


# ---- the hub ----


class Hub:
    """Records the calls of an HfApi."""

    calls: ClassVar[list[tuple[str, Any, dict[str, Any]]]] = []
    error: ClassVar[Exception | None] = None

    def create_repo(self, repo_id: str, **named: Any) -> None:
        Hub.calls.append(("create_repo", repo_id, named))
        if Hub.error:
            raise Hub.error

    def upload_folder(self, *, repo_id: str, folder_path: Path, **named: Any) -> None:
        Hub.calls.append(("upload_folder", repo_id, {"files": left(Path(folder_path)), **named}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    Hub.calls, Hub.error = [], None
    monkeypatch.setattr(writing, "HfApi", Hub)
    return Hub


def test_push(
    base: Path, tmp_path: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = source(tmp_path, made()), tmp_path / "out"
    words = [
        "export",
        "--model",
        str(base),
        "--heads",
        str(given),
        "--layout",
        "tgi",
        "--out",
        str(out),
    ]
    assert main([*words, "--push", "me/heads", "--private"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"wrote {out} and uploaded it to me/heads\n"
    assert "others need a hub id there" in printed.err
    (create, upload) = hub.calls
    assert create == ("create_repo", "me/heads", {"private": True, "exist_ok": True})
    assert upload[:2] == ("upload_folder", "me/heads")
    assert upload[2]["files"] == left(out)
    assert "medusa-chat --model" in (out / "README.md").read_text()
    assert "--heads me/heads" in (out / "README.md").read_text()
    hub.error = OSError("401 Client Error with hf_AbCdEf0123456789 in it\nand more")
    assert main([*words, "--push", "me/heads"]) == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert (
        "cannot upload to me/heads: 401 Client Error with hf_*** in it; the files are in"
        in complaint
    )
    assert main([*words, "--push", "not an id"]) == 2
    assert "--push takes OWNER/NAME" in capsys.readouterr().err
    assert main([*words, "--private"]) == 2
    assert "--private needs --push" in capsys.readouterr().err


def test_push_without_a_network_is_one_line(
    base: Path, tmp_path: Path
) -> None:  # HF_HUB_OFFLINE is set in tests
    complaint = refused(base, source(tmp_path, made()), "tgi", tmp_path / "out", push="me/heads")
    assert complaint.startswith("cannot upload to me/heads: ")
    assert (tmp_path / "out" / "README.md").is_file()


def test_the_command_names_the_missing_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for words, complaint in (
        (["export", "--out", "x"], "--layout"),
        (["export", "--layout", "tgi"], "--out"),
        (["export", "--layout", "gguf", "--out", "x"], "invalid choice: 'gguf'"),
    ):
        assert main(words) == 2
        assert complaint in capsys.readouterr().err
