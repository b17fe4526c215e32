"""The layouts that heads are exported to: names, configs, and what each program needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medusa_chat.hub.file_names import HEADS_FILE, PICKLE_FILE
from medusa_chat.text import size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True)
class Facts:
    """Heads to export.

    Attributes:
        layers: residual blocks of a head.
        vocabulary: tokens of the backbone.
        ranked: tokens that the heads rank, all or some.
        parent_bias: rank of the bias by the parent's token; 0 if there is none.
        own: each head has an LM head of its own; else all use the backbone's.
        base: hub id, or folder, of the backbone.
        width: bytes of a number.
    """

    heads: int
    layers: int
    hidden: int
    vocabulary: int
    ranked: int
    parent_bias: int
    own: bool
    base: str
    width: int
    model_type: str

    @property
    def public(self) -> bool:
        """True if the backbone is named by a hub id."""
        return not Path(self.base).is_absolute()

    @property
    def cut(self) -> bool:
        """True if the heads rank a part of the vocabulary only."""
        return self.ranked < self.vocabulary

    def lm_head_bytes(self, rows: int) -> int:
        """Size of an LM head."""
        return rows * self.hidden * self.width


@dataclass(frozen=True)
class Target:
    """A layout as some program reads it.

    Attributes:
        description: the layout in words.
        naming: key of layouts.names.NAMINGS.
        file: of the heads; None if they are a shard of the whole model.
        shared: how heads that share the backbone's LM head are written: without one (keep), each
            with a copy (copies), or with one copy for all (once).
        config: returns the keys of config.json.
        program: a program that reads the layout, or "".
        command: its command line, with fields for `use`.
        one_block: the program applies one residual block repeatedly if a head has several.
        only_shared: heads cannot have LM heads of their own.
        one_layer_shared: heads of several blocks need LM heads of their own.
        token_map: heads may rank a part of the vocabulary only.
        backbones: prefixes of the model types that the program takes; () for any.
    """

    description: str
    naming: str
    file: str | None
    shared: Literal["keep", "copies", "once"]
    config: Callable[[Facts], dict[str, Any]]
    program: str = ""
    command: str = ""
    one_block: bool = False
    only_shared: bool = False
    one_layer_shared: bool = False
    token_map: bool = False
    backbones: tuple[str, ...] = ()

    def refusal(self, facts: Facts) -> str:
        """Return why heads cannot be written in this layout, or ""."""
        if self.only_shared and facts.own:
            return (
                "they have LM heads of their own, and it has none; v0.1, tgi, vllm and others keep"
                " them"
            )
        return ""

    def copies(self, facts: Facts) -> bool:
        """Return whether each head gets a copy of the backbone's LM head."""
        if facts.own:
            return False
        return self.shared == "copies" or (self.one_layer_shared and facts.layers > 1)

    def use(self, facts: Facts, name: str) -> dict[str, str]:
        """Return the command line for an exported folder, by program."""
        if not self.program:
            return {}
        fields = {"name": name, "base": facts.base, "heads": facts.heads, "layers": facts.layers}
        return {self.program: self.command.format(**fields)}

    def notices(self, facts: Facts) -> list[str]:
        """Return what a user should know, a line each."""
        lines = [*self._lost(facts), *self._added(facts)]
        if self.one_block and facts.layers > 1:
            lines.append(
                f"the program that reads this layout applies one block {facts.layers} times, not"
                f" {facts.layers} blocks: the heads will guess badly there"
            )
        if self.backbones and not facts.model_type.startswith(self.backbones):
            lines.append(
                f"the program that reads this layout may not take {facts.model_type} models"
            )
        return lines

    def _lost(self, facts: Facts) -> Iterator[str]:
        """Yield what the layout has no place for."""
        if facts.parent_bias:
            yield (
                f"the bias by the parent's token, of rank {facts.parent_bias}, is lost, and so are"
                " accuracies that were measured with it: only medusa-chat's own files hold one, and"
                " heads that were trained with it guess worse without"
            )
        if facts.cut and not self.token_map:
            after = (
                "their LM heads have rows for all tokens, of which they guess no others"
                if facts.own
                else "they rank all tokens of the LM head"
            )
            yield (
                f"the heads' vocabulary of {facts.ranked} tokens is lost, which this layout has no"
                f" place for: {after}"
            )

    def _added(self, facts: Facts) -> Iterator[str]:
        """Yield what the layout needs in addition, with its size."""
        if self.copies(facts):
            size = size_text(facts.heads * facts.lm_head_bytes(facts.vocabulary))
            yield f"each head gets a copy of the LM head, which this layout needs: {size} more"
        elif self.shared == "once" and not facts.own:
            size = size_text(facts.lm_head_bytes(facts.ranked))
            yield f"the file holds a copy of the LM head, which this layout needs: {size} more"


def _counts(facts: Facts) -> dict[str, Any]:
    return {"medusa_num_heads": facts.heads, "medusa_num_layers": facts.layers}


def _official(facts: Facts) -> dict[str, Any]:
    return {"base_model_name_or_path": facts.base, **_counts(facts)}


def _version_2(facts: Facts) -> dict[str, Any]:
    return {**_official(facts), "version": "2"}


def _tgi(facts: Facts) -> dict[str, Any]:
    # No `architectures`: TGI finds no speculator in a config that has any.
    return _official(facts) if facts.own or facts.layers > 1 else _version_2(facts)


def _converter_counts(facts: Facts) -> dict[str, Any]:
    return {"num_medusa_heads": facts.heads, "num_medusa_layers": facts.layers}


def _tensorrt(facts: Facts) -> dict[str, Any]:
    # Its converter and its API spell the counts differently.
    return _official(facts) | _converter_counts(facts)


def _vllm(facts: Facts) -> dict[str, Any]:
    # vLLM takes any key with "num" and "heads", or "num" and "layers", for one of these two.
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": facts.hidden,
        "vocab_size": facts.vocabulary,
        "truncated_vocab_size": facts.ranked if facts.cut else None,
        "num_heads": facts.heads,
        "num_hidden_layers": facts.layers,
        "medusa_fc_bias": True,
        "original_lm_head": not facts.own,
    }


def _modelopt(facts: Facts) -> dict[str, Any]:
    return {"medusa": _converter_counts(facts)}


# Command lines of programs, with fields of `Target.use`.
OFFICIAL_CLI = "python -m medusa.inference.cli --model {name}"
TGI_LAUNCHER = "text-generation-launcher --model-id {name} --speculate {heads}"
VLLM_SERVE = (
    """vllm serve {base} --speculative-config '{{"method": "medusa", "model": "{name}","""
    """ "num_speculative_tokens": {heads}}}'"""
)
TENSORRT_CONVERT = (
    "python examples/medusa/convert_checkpoint.py --model_dir {base} --medusa_model_dir {name}"
    " --output_dir converted --num_medusa_heads {heads} --num_medusa_layers {layers}"
)
TARGETS = {
    "v0.1": Target(
        "the official one of Medusa-1",
        naming="official",
        file=PICKLE_FILE,
        shared="copies",
        config=_official,
        program="FasterDecoding/Medusa",
        command=OFFICIAL_CLI,
        one_block=True,
    ),
    "v2": Target(
        "the official one with the base model's LM head",
        naming="official",
        file=HEADS_FILE,
        shared="keep",
        config=_version_2,
        program="Text Generation Inference",
        command=TGI_LAUNCHER,
        one_block=True,
        only_shared=True,
    ),
    "v1.0": Target(
        "the official one of Medusa-2, a whole model",
        naming="v1.0",
        file=None,
        shared="copies",
        config=_counts,
        program="FasterDecoding/Medusa",
        command=OFFICIAL_CLI,
        one_block=True,
    ),
    "tgi": Target(
        "Text Generation Inference's",
        naming="official",
        file=HEADS_FILE,
        shared="keep",
        config=_tgi,
        program="Text Generation Inference",
        command=TGI_LAUNCHER,
        one_layer_shared=True,
    ),
    "vllm": Target(
        "vLLM's",
        naming="vllm",
        file="model.safetensors",
        shared="once",
        config=_vllm,
        token_map=True,
        program="vLLM",
        command=VLLM_SERVE,
    ),
    "tensorrt-llm": Target(
        "the input of TensorRT-LLM's converter",
        naming="official",
        file=HEADS_FILE,
        shared="copies",
        config=_tensorrt,
        program="TensorRT-LLM",
        command=TENSORRT_CONVERT,
        backbones=("llama", "qwen"),
    ),
    "modelopt": Target(
        "NVIDIA ModelOpt's, a whole model (TensorRT-LLM needs scales for FP8 too, which it lacks)",
        naming="modelopt",
        file=None,
        shared="copies",
        config=_modelopt,
        one_block=True,
    ),
}
