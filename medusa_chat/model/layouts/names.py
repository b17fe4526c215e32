"""How each public layout names the tensors of heads.

Block l of head h is a linear layer, then comes head h's own LM head, if it has one. Counts start at 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from medusa_chat.config import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Naming:
    """Names as templates; `{layer}` in the LM head's is the number of blocks.

    Attributes:
        prefix: before each name; `optional` if it may be left out.
        whole: whether a backbone's tensors may stand beside them in the same file.
    """

    prefix: str
    block: str
    lm_head: str
    whole: bool = False
    optional: bool = False

    def block_name(self, head: int, layer: int, kind: str) -> str:
        return ("" if self.optional else self.prefix) + self.block.format(
            head=head, layer=layer, kind=kind
        )

    def lm_head_name(self, head: int, layers: int) -> str:
        return ("" if self.optional else self.prefix) + self.lm_head.format(head=head, layer=layers)

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        prefix = re.escape(self.prefix) if not self.optional else f"(?:{re.escape(self.prefix)})?"
        block, lm_head = (
            re.compile(
                prefix
                + re.escape(template)
                .replace(r"\{head\}", r"(?P<head>\d{1,9})")
                .replace(r"\{layer\}", r"(?P<layer>\d{1,9})")
                .replace(r"\{kind\}", "(?P<kind>weight|bias)")
            )
            for template in (self.block, self.lm_head)
        )
        return block, lm_head


_OFFICIAL = "{head}.{layer}.linear.{kind}", "{head}.{layer}.weight"
NAMINGS = {
    "official": Naming(
        "", *_OFFICIAL
    ),  # v0.1 with own LM heads, v2 without; TGI, and TensorRT-LLM's input
    "v1.0": Naming("medusa_head.", *_OFFICIAL, whole=True),
    "modelopt": Naming("medusa_heads.", *_OFFICIAL, whole=True),
    "tensorrt-llm engine": Naming(
        "medusa_heads.",
        "{head}.medusa_layers.{layer}.linear.{kind}",
        "{head}.lm_head.weight",
        whole=True,
    ),
    "vllm": Naming(
        "medusa_heads.",
        "blocks.{head}.layers.{layer}.{kind}",
        "lm_heads.{head}.weight",
        optional=True,
    ),
}
# PEFT puts these around the modules that it saves whole (`modules_to_save`).
_PEFT = re.compile(r"^(?:base_model\.model\.)+|(?<=\.)modules_to_save\.[^.]+\.")
_REPLACED = ".original_module."


@dataclass
class Parts:
    """The tensors of heads by what they are; values are names in the file.

    Attributes:
        naming: key of NAMINGS.
        blocks: by (head, layer, kind); lm_heads: by (head, layer), None where the name tells no layer.
        shared: one LM head for all heads, in the file (vLLM); token_map: the ids of its rows.
        replaced, lora: tensors of an adapter that are left out.
    """

    naming: str
    blocks: dict[tuple[int, int, str], str] = field(default_factory=dict)
    lm_heads: dict[tuple[int, int | None], str] = field(default_factory=dict)
    shared: str | None = None
    token_map: str | None = None
    replaced: int = 0
    lora: int = 0

    @property
    def heads(self) -> int:
        return 1 + max(head for head, *_ in self.blocks)

    @property
    def layers(self) -> int:
        return 1 + max(layer for _, layer, _ in self.blocks)


def is_heads_tensor(name: str) -> bool:
    """Whether a tensor in the file of a whole model belongs to Medusa heads."""
    return _plain(name).startswith(("medusa_head.", "medusa_heads."))


def _plain(name: str) -> str:
    return _PEFT.sub("", name) if "base_model." in name or "modules_to_save." in name else name


def naming_of(name: str) -> str | None:
    """The naming that a tensor's name follows; None for one that is no part of a head."""
    plain = _plain(name)
    return next(
        (n for n, naming in NAMINGS.items() if any(p.fullmatch(plain) for p in naming.patterns)),
        None,
    )


def sort_names(file: str, names: Iterable[str]) -> Parts:
    """Tell the tensors of heads from a backbone's.

    Raises:
        UserError: there are no heads, layouts are mixed, or a name is none of any layout.
    """
    every = list(names)
    found = {name: naming for name in every if (naming := naming_of(name))}
    if not found:
        begin = f": {min(every)!r} is no tensor of a head in any known layout" if every else ""
        raise UserError(f"{file} holds no Medusa heads{begin}")
    first, *others = dict.fromkeys(found.values())
    if others:
        strange = next(name for name, naming in found.items() if naming != first)
        example = next(iter(found))
        raise UserError(
            f"{file}: unknown tensor {strange!r} beside {example!r}: they are of two layouts of heads"
        )
    parts = Parts(first)
    for name in every:
        if _REPLACED in name and is_heads_tensor(name):
            parts.replaced += 1
        elif name in found:
            _place(file, parts, name)
        else:
            _place_other(file, parts, name)
    if not parts.blocks:
        raise UserError(f"{file} holds no Medusa heads: there are LM heads, but no blocks")
    if (
        first == "vllm"
        and parts.shared is None
        and list(parts.lm_heads) == [(0, None)]
        and parts.heads > 1
    ):
        parts.shared = parts.lm_heads.pop((0, None))  # which vLLM takes for `original_lm_head` too
    return parts


def _place(file: str, parts: Parts, name: str) -> None:
    block, lm_head = NAMINGS[parts.naming].patterns
    if match := block.fullmatch(_plain(name)):
        twin = parts.blocks.setdefault(
            (int(match["head"]), int(match["layer"]), match["kind"]), name
        )
    else:
        match = lm_head.fullmatch(_plain(name))
        assert match
        layer = match.groupdict().get("layer")
        twin = parts.lm_heads.setdefault(
            (int(match["head"]), None if layer is None else int(layer)), name
        )
    if twin != name:
        raise UserError(f"{file}: {twin} and {name} are the same tensor of a head")


def _place_other(file: str, parts: Parts, name: str) -> None:
    """What is no block and no LM head of a head."""
    plain = _plain(name)
    if parts.naming == "vllm" and plain.removeprefix("medusa_heads.") == "lm_head.weight":
        parts.shared = name
    elif parts.naming == "vllm" and plain.removeprefix("medusa_heads.") == "token_map":
        parts.token_map = name
    elif not NAMINGS[parts.naming].whole or is_heads_tensor(name):
        raise UserError(
            f"{file}: unknown tensor {name!r}; these are no Medusa heads in a known layout"
        )
    elif ".lora_" in name:
        parts.lora += 1
