"""The layouts that heads are exported to: names, configs, and what each program asks of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medusa_chat.hub.file_names import HEADS_FILE, PICKLE_FILE

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Facts:
    """What is exported.

    Attributes:
        own: whether each head has an LM head of its own; False: all use the backbone's.
        base: hub id, or folder, of the backbone.
        width: bytes of a number.
        model_type: the backbone's, as its config has it.
    """

    heads: int
    layers: int
    hidden: int
    vocabulary: int
    own: bool
    base: str
    width: int
    model_type: str

    @property
    def public(self) -> bool:
        """Whether the backbone is named by a hub id."""
        return not Path(self.base).is_absolute()


@dataclass(frozen=True)
class Target:
    """A layout as some program reads it.

    Attributes:
        naming: key of layouts.names.NAMINGS.
        file: of the heads; None: they are a shard of the whole model.
        shared: what becomes of heads that share the backbone's LM head: they are kept so, each gets a copy of it, or
            (once) the file gets one copy for all.
        config, use: keys of config.json; command lines by program, given the name of the exported folder.
        one_block: the program uses one residual block over and over where a head has several.
        only_shared: there is no place for LM heads of the heads' own.
        one_layer_shared: heads of several blocks have to have LM heads of their own.
        backbones: how the names of the only model types begin that the program takes; () for any.
    """

    description: str
    naming: str
    file: str | None
    shared: Literal["keep", "copies", "once"]
    config: Callable[[Facts], dict[str, Any]]
    use: Callable[[Facts, str], dict[str, str]]
    one_block: bool = False
    only_shared: bool = False
    one_layer_shared: bool = False
    backbones: tuple[str, ...] = ()

    @property
    def one_lm_head(self) -> bool:
        return self.shared == "once"

    def refusal(self, facts: Facts) -> str:
        """Why heads cannot be written so, or ""."""
        if self.only_shared and facts.own:
            return "they have LM heads of their own, and it has none; v0.1, tgi, vllm and others keep them"
        return ""

    def copies(self, facts: Facts) -> bool:
        """Whether each head gets a copy of the backbone's LM head."""
        if facts.own:
            return False
        return self.shared == "copies" or (self.one_layer_shared and facts.layers > 1)

    def notices(self, facts: Facts) -> list[str]:
        lines = []
        if self.copies(facts):
            size = facts.heads * facts.vocabulary * facts.hidden * facts.width
            lines.append(
                f"each head gets a copy of the LM head, which this layout wants: {_size(size)} more"
            )
        elif self.one_lm_head and not facts.own:
            size = facts.vocabulary * facts.hidden * facts.width
            lines.append(
                f"the file holds a copy of the LM head, which this layout wants: {_size(size)} more"
            )
        if self.one_block and facts.layers > 1:
            lines.append(
                f"the program that reads this layout applies one block {facts.layers} times, not {facts.layers} blocks:"
                " there the heads will guess badly"
            )
        if self.backbones and not facts.model_type.startswith(self.backbones):
            lines.append(
                f"the program that reads this layout may not take {facts.model_type} models"
            )
        return lines


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _counts(facts: Facts) -> dict[str, Any]:
    return {"medusa_num_heads": facts.heads, "medusa_num_layers": facts.layers}


def _official(facts: Facts) -> dict[str, Any]:
    return {"base_model_name_or_path": facts.base, **_counts(facts)}


def _version_2(facts: Facts) -> dict[str, Any]:
    return {**_official(facts), "version": "2"}


def _tgi(facts: Facts) -> dict[str, Any]:
    # No `architectures`: with any of its own, TGI finds no speculator there.
    return _official(facts) if facts.own or facts.layers > 1 else _version_2(facts)


def _tensorrt(facts: Facts) -> dict[str, Any]:
    # Its converter and its API spell the counts differently.
    return {**_official(facts), "num_medusa_heads": facts.heads, "num_medusa_layers": facts.layers}


def _vllm(facts: Facts) -> dict[str, Any]:
    # No other key may hold "num" and "heads" or "layers": vLLM would take it for one of these two.
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": facts.hidden,
        "vocab_size": facts.vocabulary,
        "truncated_vocab_size": None,
        "num_heads": facts.heads,
        "num_hidden_layers": facts.layers,
        "medusa_fc_bias": True,
        "original_lm_head": not facts.own,
    }


def _modelopt(facts: Facts) -> dict[str, Any]:
    return {"medusa": {"num_medusa_heads": facts.heads, "num_medusa_layers": facts.layers}}


def _use_official(facts: Facts, name: str) -> dict[str, str]:
    return {"FasterDecoding/Medusa": f"python -m medusa.inference.cli --model {name}"}


def _use_tgi(facts: Facts, name: str) -> dict[str, str]:
    return {
        "Text Generation Inference": f"text-generation-launcher --model-id {name} --speculate {facts.heads}"
    }


def _use_vllm(facts: Facts, name: str) -> dict[str, str]:
    settings = f'{{"method": "medusa", "model": "{name}", "num_speculative_tokens": {facts.heads}}}'
    return {"vLLM": f"vllm serve {facts.base} --speculative-config '{settings}'"}


def _use_tensorrt(facts: Facts, name: str) -> dict[str, str]:
    folders = f"--model_dir {facts.base} --medusa_model_dir {name} --output_dir converted"
    line = f"python examples/medusa/convert_checkpoint.py {folders}"
    return {
        "TensorRT-LLM": f"{line} --num_medusa_heads {facts.heads} --num_medusa_layers {facts.layers}"
    }


def _use_nothing(facts: Facts, name: str) -> dict[str, str]:
    return {}


TARGETS = {
    "v0.1": Target(
        "the official one of Medusa-1",
        "official",
        PICKLE_FILE,
        "copies",
        _official,
        _use_official,
        one_block=True,
    ),
    "v2": Target(
        "the official one with the base model's LM head",
        "official",
        HEADS_FILE,
        "keep",
        _version_2,
        _use_tgi,
        one_block=True,
        only_shared=True,
    ),
    "v1.0": Target(
        "the official one of Medusa-2, a whole model",
        "v1.0",
        None,
        "copies",
        _counts,
        _use_official,
        one_block=True,
    ),
    "tgi": Target(
        "Text Generation Inference's",
        "official",
        HEADS_FILE,
        "keep",
        _tgi,
        _use_tgi,
        one_layer_shared=True,
    ),
    "vllm": Target("vLLM's", "vllm", "model.safetensors", "once", _vllm, _use_vllm),
    "tensorrt-llm": Target(
        "what TensorRT-LLM converts",
        "official",
        HEADS_FILE,
        "copies",
        _tensorrt,
        _use_tensorrt,
        backbones=("llama", "qwen"),
    ),
    "modelopt": Target(
        "NVIDIA ModelOpt's, a whole model (TensorRT-LLM reads it with scales for FP8 only, which are not there)",
        "modelopt",
        None,
        "copies",
        _modelopt,
        _use_nothing,
        one_block=True,
    ),
}
