"""Tiny checkpoints under the ids of real repositories, in their files and layouts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sentencepiece
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from medusa_chat.hub.model_list import split_revision
from tests.helpers.tiny import random_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from medusa_chat.config import ModelSpec
    from tests.helpers.hub_server import HubServer

VOCABULARY, HIDDEN = 400, 32
ZEPHYR = (
    "{% for message in messages %}<|{{ message.role }}|>\n"
    "{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
TEXT = (
    "USER: Hi ASSISTANT: Hello there. A chat between a curious user and an artificial"
    " intelligence assistant."
)
Tensors = dict[str, Tensor]


def llama_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Make a tokenizer of <unk>, <s>, </s> and bytes that starts every text with <s>."""
    alphabet = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in alphabet[:3]])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = template
    return made


def vicuna_tokenizer(folder: Path) -> None:
    """Write Vicuna's kind of tokenizer: a SentencePiece model without a template."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = special | {
        "add_bos_token": True,
        "add_eos_token": False,
        "tokenizer_class": "LlamaTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def heads(own: bool = True, count: int = 5, prefix: str = "") -> Tensors:
    """Make heads in the official layout."""
    generator = torch.Generator().manual_seed(0)
    made: Tensors = {}
    for head in range(count):
        made[f"{prefix}{head}.0.linear.weight"] = (
            torch.randn(HIDDEN, HIDDEN, generator=generator) * 0.1
        )
        made[f"{prefix}{head}.0.linear.bias"] = torch.zeros(HIDDEN)
        if own:
            made[f"{prefix}{head}.1.weight"] = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    return made


def save(file: Path, tensors: Tensors) -> None:
    from safetensors.torch import save_file

    if file.suffix == ".safetensors":
        save_file(tensors, file, {"format": "pt"})
    else:
        torch.save(tensors, file)


def save_shards(folder: Path, tensors: Tensors, form: str, shards: int = 2) -> None:
    """Save shards and their index; `form` is pytorch_model.bin or model.safetensors."""
    stem, suffix = form.rsplit(".", 1)
    place = {
        name: f"{stem}-{1 + i % shards:05}-of-{shards:05}.{suffix}"
        for i, name in enumerate(sorted(tensors))
    }
    for shard in set(place.values()):
        save(
            folder / shard,
            {name: tensors[name].contiguous() for name in tensors if place[name] == shard},
        )
    (folder / f"{form}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))


def backbone(
    folder: Path,
    form: str,
    kind: str = "llama",
    template: str | None = None,
    more: Iterable[tuple[str, Tensor]] = (),
    **config: Any,
) -> Path:
    """Write a model folder like those on the hub, with `more` tensors.

    Without a template it has Vicuna's tokenizer.
    """
    folder.mkdir(parents=True)
    model = random_model(kind, VOCABULARY, bos_token_id=1, eos_token_id=2)
    (folder / "config.json").write_text(json.dumps(model.config.to_diff_dict() | config))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2})
    )
    (folder / "README.md").write_text("card")
    save_shards(folder, dict(model.state_dict()) | dict(more), form)
    llama_tokenizer(template).save_pretrained(folder) if template else vicuna_tokenizer(folder)
    return folder


def heads_only(folder: Path, form: str, base: str, own: bool = True) -> Path:
    folder.mkdir(parents=True)
    save(folder / f"medusa_lm_head.{form}", heads(own))
    config = {
        "base_model_name_or_path": base,
        "medusa_num_heads": 2,
        "medusa_num_layers": 1,
    }  # 2 is wrong, as there
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def smollm2(folder: Path) -> Path:
    """Write one layer of SmolLM2-135M's shape, which the heads that ship for it fit."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    llama_tokenizer(ZEPHYR).save_pretrained(folder)
    return folder


def vicuna(folder: Path) -> Path:
    return backbone(folder, "pytorch_model.bin")


def medusa_1(form: str, kind: str = "llama", template: str | None = None) -> Callable[[Path], Path]:
    """Return the writer of a Medusa-2 checkpoint: a whole model with its heads."""
    more = heads(prefix="medusa_head.").items()
    return lambda folder: backbone(
        folder, form, kind, template, more, medusa_num_heads=5, medusa_num_layers=1
    )


def mistral(folder: Path) -> Path:
    """Write a model with its weights in two more forms that are not needed."""
    backbone(folder, "model.safetensors", "mistral-full", MISTRAL)
    for name in (
        "consolidated.safetensors",
        "pytorch_model.bin.index.json",
        "pytorch_model-00001-of-00001.bin",
    ):
        (folder / name).write_bytes(b"{}")
    return folder


REPOSITORIES: dict[str, Callable[[Path], Path]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": smollm2,
    **{f"lmsys/vicuna-{size}-v1.3": vicuna for size in ("7b", "13b", "33b")},
    **{
        f"FasterDecoding/medusa-vicuna-{size}-v1.3": lambda folder: heads_only(
            folder, "pt", "lmsys/vicuna"
        )
        for size in ("7b", "13b", "33b")
    },
    "FasterDecoding/medusa-1.0-vicuna-7b-v1.5": medusa_1("pytorch_model.bin"),
    "FasterDecoding/medusa-1.0-vicuna-13b-v1.5": medusa_1("pytorch_model.bin"),
    "FasterDecoding/medusa-1.0-vicuna-33b-v1.3": medusa_1("model.safetensors"),
    "FasterDecoding/medusa-1.0-zephyr-7b-beta": medusa_1(
        "pytorch_model.bin", "mistral-full", ZEPHYR
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": mistral,
    "text-generation-inference/Mistral-7B-Instruct-v0.2-medusa": lambda folder: heads_only(
        folder, "safetensors", "mistralai/Mistral-7B-Instruct-v0.2", own=False
    ),
}


def serve(server: HubServer, spec: ModelSpec, folder: Path) -> None:
    """Add a spec's repositories to the server; a revision of heads holds safetensors."""
    for source in filter(None, (spec.backbone, spec.heads)):
        if Path(source).exists():  # heads that ship
            continue
        name, revision = split_revision(source)
        if name not in server.repositories:
            server.add(name, REPOSITORIES[name](folder / name))
        if revision and revision not in server.repositories[name]:
            server.add(
                name,
                heads_only(folder / name / "proposed", "safetensors", "lmsys/vicuna"),
                revision,
            )
