"""How each public layout names the tensors of heads.

Block l of head h is a linear layer. Head h's own LM head follows, if it has one. Counts start at 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from medusa_chat.config import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

COUNT = r"\d{1,9}"
TOKEN_MAP = "token_map"
PARENT_BIAS = ("parent_bias.first", "parent_bias.second")  # in our own files only


@dataclass(frozen=True)
class Naming:
    """Templates of names; `{layer}` in the LM head's is the number of blocks.

    Attributes:
        prefix: text before each name.
        block: template of a block's tensors.
        lm_head: template of an LM head's weight.
        whole: the file may also hold a backbone's tensors.
        optional: the prefix may be left out.
    """

    prefix: str
    block: str
    lm_head: str
    whole: bool = False
    optional: bool = False

    def block_name(self, head: int, layer: int, kind: str) -> str:
        """Name the `weight` or `bias` of a block."""
        return self._written_prefix + self.block.format(head=head, layer=layer, kind=kind)

    def lm_head_name(self, head: int, layers: int) -> str:
        """Name the LM head of a head of `layers` blocks."""
        return self._written_prefix + self.lm_head.format(head=head, layer=layers)

    @property
    def _written_prefix(self) -> str:
        return "" if self.optional else self.prefix

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """Patterns of a block's names and of an LM head's."""
        return self._pattern(self.block), self._pattern(self.lm_head)

    def _pattern(self, template: str) -> re.Pattern[str]:
        prefix = re.escape(self.prefix)
        if self.optional:
            prefix = f"(?:{prefix})?"
        pattern = re.escape(template)
        for name, allowed in (("head", COUNT), ("layer", COUNT), ("kind", "weight|bias")):
            pattern = pattern.replace(rf"\{{{name}\}}", f"(?P<{name}>{allowed})")
        return re.compile(prefix + pattern)


BLOCK = "{head}.{layer}.linear.{kind}"
LM_HEAD = "{head}.{layer}.weight"
NAMINGS = {
    # v0.1 with own LM heads, v2 without; also TGI's, and the input of TensorRT-LLM.
    "official": Naming("", BLOCK, LM_HEAD),
    "v1.0": Naming("medusa_head.", BLOCK, LM_HEAD, whole=True),
    "modelopt": Naming("medusa_heads.", BLOCK, LM_HEAD, whole=True),
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
PEFT = re.compile(r"^(?:base_model\.model\.)+|(?<=\.)modules_to_save\.[^.]+\.")
REPLACED = ".original_module."
LORA = ".lora_"


@dataclass
class Parts:
    """Names of a file's tensors of heads, by their part in a head.

    Attributes:
        naming: key of NAMINGS.
        blocks: by (head, layer, kind).
        lm_heads: by (head, layer); layer is None if the naming has none.
        shared: one LM head for all heads, in the file (vLLM).
        token_map: the ids of the tokens that heads rank (vLLM, and our own).
        parent_bias: names of PARENT_BIAS that the file has (our own).
        replaced: number of tensors that training replaced, which are left out.
        lora: number of an adapter's tensors, which are left out.
    """

    naming: str
    blocks: dict[tuple[int, int, str], str] = field(default_factory=dict)
    lm_heads: dict[tuple[int, int | None], str] = field(default_factory=dict)
    shared: str | None = None
    token_map: str | None = None
    parent_bias: set[str] = field(default_factory=set)
    replaced: int = 0
    lora: int = 0

    @property
    def heads(self) -> int:
        """Number of heads."""
        return 1 + max(head for head, *_ in self.blocks)

    @property
    def layers(self) -> int:
        """Number of blocks of a head."""
        return 1 + max(layer for _, layer, _ in self.blocks)


def is_heads_tensor(name: str) -> bool:
    """Return whether a tensor in the file of a whole model belongs to Medusa heads."""
    return _plain(name).startswith(("medusa_head.", "medusa_heads."))


def naming_of(name: str) -> str | None:
    """Return the naming that a tensor's name follows; None if it is no part of a head."""
    plain = _plain(name)
    for key, naming in NAMINGS.items():
        if any(pattern.fullmatch(plain) for pattern in naming.patterns):
            return key
    return None


def sort_names(file: str, names: Iterable[str]) -> Parts:
    """Sort the tensors of heads by their part, apart from a backbone's.

    Raises:
        UserError: there are no heads, layouts are mixed, or no layout has such a name.
    """
    every = list(names)
    found = {name: naming for name in every if (naming := naming_of(name))}
    parts = Parts(_only_naming(file, every, found))
    for name in every:
        if REPLACED in name and is_heads_tensor(name):
            parts.replaced += 1
        elif name in found:
            _place(file, parts, name)
        else:
            _place_other(file, parts, name)
    if not parts.blocks:
        raise UserError(f"{file} holds no Medusa heads: there are LM heads, but no blocks")
    if _only_first_lm_head(parts):
        parts.shared = parts.lm_heads.pop((0, None))
    return parts


def _plain(name: str) -> str:
    """Strip what PEFT puts around a name."""
    wrapped = "base_model." in name or "modules_to_save." in name
    return PEFT.sub("", name) if wrapped else name


def _only_naming(file: str, names: list[str], found: dict[str, str]) -> str:
    if not found:
        example = ""
        if names:
            example = f": {min(names)!r} is no tensor of a head in any known layout"
        raise UserError(f"{file} holds no Medusa heads{example}")
    example, first = next(iter(found.items()))
    for name, naming in found.items():
        if naming != first:
            raise UserError(
                f"{file}: unknown tensor {name!r} together with {example!r}: they are of two"
                " layouts of heads"
            )
    return first


def _only_first_lm_head(parts: Parts) -> bool:
    """Return whether the only LM head is the first head's: vLLM takes it for a shared one."""
    if parts.naming != "vllm" or parts.shared is not None or parts.heads == 1:
        return False
    return list(parts.lm_heads) == [(0, None)]


def _place(file: str, parts: Parts, name: str) -> None:
    """Add a block's tensor or an LM head."""
    block, lm_head = NAMINGS[parts.naming].patterns
    if match := block.fullmatch(_plain(name)):
        key = int(match["head"]), int(match["layer"]), match["kind"]
        twin = parts.blocks.setdefault(key, name)
    else:
        match = lm_head.fullmatch(_plain(name))
        assert match
        layer = match.groupdict().get("layer")
        place = int(match["head"]), None if layer is None else int(layer)
        twin = parts.lm_heads.setdefault(place, name)
    if twin != name:
        raise UserError(f"{file}: {twin} and {name} are the same tensor of a head")


def _place_other(file: str, parts: Parts, name: str) -> None:
    """Add a tensor that is neither a block's nor a head's own LM head."""
    bare = _plain(name).removeprefix("medusa_heads.")
    if parts.naming == "vllm" and bare == "lm_head.weight":
        parts.shared = name
    elif parts.naming in ("vllm", "official") and bare == TOKEN_MAP:
        parts.token_map = name
    elif parts.naming == "official" and name in PARENT_BIAS:
        parts.parent_bias.add(name)
    elif not NAMINGS[parts.naming].whole or is_heads_tensor(name):
        raise UserError(
            f"{file}: unknown tensor {name!r}; these are no Medusa heads in a known layout"
        )
    elif LORA in name:
        parts.lora += 1
