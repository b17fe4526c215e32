"""GGUF files as models: the weights, the config and the tokenizer are those of the original."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

import medusa_chat
from medusa_chat.config import LoadOptions, Message, ModelSpec, UserError
from medusa_chat.hub.gguf.choice import chosen_files
from medusa_chat.hub.gguf.config import config_of
from medusa_chat.hub.gguf.folder import folder_of
from medusa_chat.hub.gguf.header import Header, TensorInfo, read_header
from medusa_chat.hub.gguf.tokenizer import tokenizer_of
from medusa_chat.hub.model_list import resolve_model
from medusa_chat.machine.contents import contents_of
from medusa_chat.machine.plans import Load, plan
from medusa_chat.model.loading import load_model
from medusa_chat.model.pretrained import load_pretrained
from medusa_chat.native.library import available
from tests.helpers.complaints import refusal
from tests.helpers.gguf_files import write_gguf
from tests.helpers.tiny import END, prompt_ids, random_model, reply
from tests.helpers.tiny import tokenizer as tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

TEXT = torch.tensor([prompt_ids(20, 260)])
FLOAT32 = LoadOptions(device="cpu", dtype="float32", engine="torch")
HI: list[Message] = [{"role": "user", "content": "hi"}]
# As the files say less than a config: layers of Gemma 3 follow its usual pattern.
CHANGES: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention"] * 4,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    },
}
CHANGES["gemma2"]["tie_word_embeddings"] = True


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def model_of(kind: str = "llama", **changes: Any) -> Any:
    return random_model(kind, 260, **changes)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(TEXT).logits
    return found


@pytest.mark.parametrize(
    "kind",
    ["llama", "llama-wide-heads", "llama-tied", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"],
)
def test_each_family_gives_the_logits_of_its_original(kind: str, tmp_path: Path) -> None:
    model = model_of(kind, **CHANGES.get(kind, {}))
    file = write_gguf(tmp_path / "m.gguf", model)
    loaded, _ = load_pretrained(ModelSpec("m", str(file)), torch.float32)
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits(loaded), logits(model))


def test_weights_are_those_that_transformers_reads(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", model_of(num_key_value_heads=2), kind="Q4_1")
    loaded, _ = load_pretrained(ModelSpec("m", str(file)), torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight, rtol=0, atol=0)


def test_a_quantized_file_in_shards_becomes_an_engine(tmp_path: Path) -> None:
    model = model_of()
    file = write_gguf(tmp_path / "m.gguf", model, kind="Q8_0", shards=3)
    assert file.name == "m-00001-of-00003.gguf"
    spec = resolve_model(str(file.with_name("m-00002-of-00003.gguf")))
    loaded = load_model(spec, LoadOptions(device="cpu"))
    if available() is None:  # the library was built
        assert loaded.backbone.native is not None
        assert loaded.backbone.native.weights == "int8"
    assert loaded.template.render(HI) == "<|user|>hi<|end|><|assistant|>"
    assert loaded.tokenizer.encode("hi") == tiny_tokenizer().encode("hi")
    file.with_name("m-00003-of-00003.gguf").unlink()
    assert "m-00003-of-00003.gguf: there is no such file" in refusal(load_model, spec, FLOAT32)


def test_special_tokens_end_replies_and_the_text_is_the_originals(tmp_path: Path) -> None:
    model = random_model("llama", 320)
    file = write_gguf(tmp_path / "m.gguf", model)
    engine = medusa_chat.load(str(file), device="cpu", dtype="float32", probing=False)
    assert engine.name == "m"
    expected = model.generate(
        torch.tensor([engine.encode(HI)]), max_new_tokens=12, do_sample=False, eos_token_id=END
    )
    found = reply(engine, HI, mode="greedy", max_new_tokens=12)
    assert found == expected[0, len(engine.encode(HI)) :].tolist()


def test_a_folder_is_made_once_and_anew_for_another_file(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", model_of())
    folder = folder_of(file)
    made = (folder / "config.json").stat().st_mtime_ns
    assert folder_of(file) == folder
    assert (folder / "config.json").stat().st_mtime_ns == made
    write_gguf(file, model_of(num_hidden_layers=3))
    assert json.loads((folder_of(file) / "config.json").read_text())["num_hidden_layers"] == 3


def test_memory_counts_the_model_unpacked(tmp_path: Path) -> None:
    model = model_of(hidden_size=64, intermediate_size=128)
    file = write_gguf(tmp_path / "m.gguf", model, kind="Q4_0")
    contents = contents_of(ModelSpec("m", str(folder_of(file))))
    assert contents is not None
    assert contents.layers + contents.plain == sum(each.numel() for each in model.parameters())
    assert contents.unpacked
    needed = plan(contents, Load(quant="int8", native=True))
    assert needed.total >= 2 * (contents.layers + contents.plain)


FAMILY = b"architecture\x08\0\0\0\5\0\0\0\0\0\0\0llama"
REPLACED = [
    (b"GGUF", b"PK34", "it is no GGUF file"),
    (b"GGUF\3", b"GGUF\x09", "its GGUF version is 9, and 2 and 3 can be read"),
    (FAMILY, FAMILY.replace(b"llama", b"mamba"), "files of the family mamba cannot be read"),
    (b"llama.block_count", b"llama.block_caunt", "its metadata lacks llama.block_count"),
    (b"gpt2", b"rwkv", "its tokenizer is of the kind rwkv"),
    (b"default", b"unknown", "splits a text in the way of unknown"),
    (b"blk.1.ffn_up.", b"blk.1.ffn_ap.", "weight model.layers.1.mlp.up_proj.weight is missing"),
    (b"blk.1.ffn_up.weight\2\0\0\0", b"blk.1.ffn_up.weight\xe7\0\0\0", "damaged"),
]


@pytest.mark.parametrize(("old", "new", "words"), REPLACED, ids=[each[2] for each in REPLACED])
def test_a_file_that_cannot_be_read_is_one_line(
    old: bytes, new: bytes, words: str, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "m.gguf", model_of())
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new))
    assert words in refusal(load_model, resolve_model(str(file)), FLOAT32)


@pytest.mark.parametrize(
    ("bytes_kept", "words"),
    [(-40, "it is cut off, as it has"), (300, "its header is cut off"), (0, "its header is cut")],
)
def test_a_file_that_is_cut_off_is_one_line(bytes_kept: int, words: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", model_of())
    file.write_bytes(file.read_bytes()[:bytes_kept])
    assert words in refusal(load_model, resolve_model(str(file)), FLOAT32)


def test_a_tensor_of_an_unknown_type_is_one_line(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", model_of())
    content = bytearray(file.read_bytes())
    name = b"blk.1.ffn_up.weight"
    content[content.index(name) + len(name) + 4 + 2 * 8] = 231  # after the number of sizes and them
    file.write_bytes(content)
    words = "tensor blk.1.ffn_up.weight has the unknown type 231"
    assert words in refusal(load_model, resolve_model(str(file)), FLOAT32)


VALUES = [
    ("llama.block_count", gguf.GGUFValueType.STRING, "two"),
    ("llama.embedding_length", gguf.GGUFValueType.FLOAT32, float("nan")),
    ("llama.attention.head_count", gguf.GGUFValueType.UINT32, 0),
    ("tokenizer.ggml.tokens", gguf.GGUFValueType.UINT32, 7),
    ("tokenizer.ggml.eos_token_id", gguf.GGUFValueType.STRING, "</s>"),
    ("tokenizer.ggml.merges", gguf.GGUFValueType.ARRAY, ["zz qq"]),
    ("general.alignment", gguf.GGUFValueType.UINT32, 0),
    ("general.alignment", gguf.GGUFValueType.STRING, "x"),
]


@pytest.mark.parametrize(("key", "kind", "value"), VALUES)
def test_metadata_of_a_wrong_type_or_size_is_one_line(
    key: str, kind: gguf.GGUFValueType, value: object, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "m.gguf", model_of(), changed={key: (value, kind)})
    words = refusal(load_model, resolve_model(str(file)), FLOAT32)
    assert words.startswith(f"cannot load the model {file}: its ")
    assert "damaged" in words


def test_lists_in_lists_without_an_end_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    lists = struct.pack("<IQ", 9, 1) * 100_000  # the type of a list, and one entry
    file.write_bytes(b"GGUF" + struct.pack("<IQQQcI", 3, 0, 1, 1, b"k", 9) + lists)
    assert "its header is cut off or damaged" in refusal(folder_of, file)


def test_a_name_that_is_no_file() -> None:
    assert "not a folder or a GGUF file" in refusal(resolve_model, "absent.gguf")
    assert "names no file after the colon" in refusal(resolve_model, "owner/name:")
    spec = resolve_model("owner/name:Q4_K_M@main")
    assert (spec.name, spec.backbone) == ("name:Q4_K_M", "owner/name:Q4_K_M@main")


NAMES = [
    "README.md",
    "mmproj-F16.gguf",
    "m-Q4_K_M.gguf",
    "m-Q8_0.gguf",
    "big/m-BF16-00001-of-00002.gguf",
    "big/m-BF16-00002-of-00002.gguf",
    "a.IQ4_XS.gguf",
    "b.IQ4_XS.gguf",
]


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("q4_k_m", ["m-Q4_K_M.gguf"]),
        ("m-Q8_0.gguf", ["m-Q8_0.gguf"]),
        ("BF16", NAMES[4:6]),
        ("big/m-BF16-00002-of-00002.gguf", NAMES[4:6]),
    ],
)
def test_a_file_or_quantization_names_files(wanted: str, chosen: list[str]) -> None:
    assert chosen_files("o/n", wanted, NAMES) == chosen


def test_a_file_that_a_repository_lacks() -> None:
    assert refusal(chosen_files, "o/n", "Q5_0", NAMES) == (
        "o/n has no GGUF file Q5_0; it has BF16, IQ4_XS, Q4_K_M, Q8_0"
    )
    assert "several files in IQ4_XS: a.IQ4_XS.gguf, b." in refusal(
        chosen_files, "o/n", "IQ4_XS", NAMES
    )
    assert refusal(chosen_files, "o/n", "Q4_0", ["a.bin"]) == "o/n has no GGUF files"


def header(file: Path, architecture: str = "llama", **metadata: Any) -> Header:
    values = {name.replace("__", "."): value for name, value in metadata.items()}
    return Header(file, {"general.architecture": architecture} | values, {})


def test_positions_are_stretched_as_the_file_says(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", model_of())
    read = read_header(file)
    factors = tmp_path / "factors"
    factors.write_bytes(torch.tensor([1.0, 1.0, 3.5, 8.0]).numpy().tobytes())
    table = TensorInfo("rope_freqs.weight", (4,), "F32", factors, 0, 16)
    read.tensors["rope_freqs.weight"] = table
    scaling = config_of(read)["rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"]) == ("llama3", 8.0)
    read.metadata.update({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0})
    read.metadata["llama.rope.scaling.original_context_length"] = 128
    assert config_of(read)["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    read.metadata["llama.rope.scaling.type"] = "other"
    with pytest.raises(UserError, match=r"stretched \(other\)"):
        config_of(read)
    read.metadata["llama.expert_count"] = 8
    with pytest.raises(UserError, match="mixtures of experts"):
        config_of(read)


def sentencepiece(file: Path, architecture: str = "llama", **more: Any) -> Tokenizer:
    pieces = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{byte:02X}>": 6 for byte in range(256)}
    pieces |= dict.fromkeys(["\u2581", "a", "b", "ab", "\u2581ab", "  "], 1)
    return tokenizer_of(
        header(
            file,
            architecture,
            tokenizer__ggml__model="llama",
            tokenizer__ggml__tokens=list(pieces),
            tokenizer__ggml__token_type=list(pieces.values()),
            tokenizer__ggml__scores=[0.0] * 259 + [-9.0, -8.0, -7.0, -1.0, -2.0, -3.0],
            tokenizer__ggml__bos_token_id=1,
            **more,
        )
    )


def test_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    made = sentencepiece(tmp_path)
    assert made.encode("ab ab").tokens == ["<s>", "\u2581ab", "\u2581ab"]
    assert "</s>" in made.encode("ab</s>é").tokens
    assert made.encode("ab</s>é").tokens[-2:] == ["<0xC3>", "<0xA9>"]
    assert made.decode(made.encode("ab aé").ids) == "ab aé"
    bare = sentencepiece(tmp_path, "gemma2", tokenizer__ggml__add_bos_token=False)
    assert bare.encode("ab  ab").tokens == ["ab", "\u2581", "\u2581ab"]
    assert bare.decode(bare.encode("ab  ab").ids) == "ab  ab"


def test_byte_level_vocabularies_split_as_their_name_says(tmp_path: Path) -> None:
    def pieces(pre: str) -> list[str]:
        ids: dict[str, int] = tiny_tokenizer().get_vocab()
        tokens = sorted(ids, key=ids.__getitem__)
        joined = [*tokens, "12", "123", "1234"]
        merges = ["1 2", "12 3", "123 4"]
        made = tokenizer_of(
            header(
                tmp_path,
                tokenizer__ggml__model="gpt2",
                tokenizer__ggml__pre=pre,
                tokenizer__ggml__tokens=joined,
                tokenizer__ggml__merges=merges,
            )
        )
        return made.encode("1234").tokens

    assert pieces("gpt-2") == ["1234"]
    assert pieces("llama-bpe") == ["123", "4"]
    assert pieces("qwen2") == pieces("smollm") == ["1", "2", "3", "4"]
