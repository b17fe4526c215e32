"""Reading heads: tensor by tensor straight into the stacks that decode, each checked on the way."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.config import LAYOUTS, UserError
from medusa_chat.model.heads import MedusaHeads
from medusa_chat.model.layouts.names import NAMINGS, Parts, sort_names
from medusa_chat.model.layouts.said import said_otherwise
from medusa_chat.model.layouts.tensors import TensorFiles

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SAME = {"tgi": ("v0.1", "v2"), "tensorrt-llm": ("v0.1", "tensorrt-llm engine")}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PADDINGS = tuple(
    2**n for n in range(3, 11)
)  # vocabularies are padded to a multiple of one of these


@dataclass(frozen=True)
class ReadHeads:
    """Heads as a file held them.

    Attributes:
        layout: one of config.LAYOUTS, or "tensorrt-llm engine"; heads of v0.1 or v2 may also be TGI's or the input of
            TensorRT-LLM.
        notices: what the user should know, a line each: the config says otherwise, padding was cut or added, ...
    """

    heads: MedusaHeads
    layout: str
    notices: tuple[str, ...] = ()


def read_heads(
    path: Path,
    hidden: int,
    vocabulary: int,
    *,
    dtype: torch.dtype | None = None,
    lm_head: Tensor | None = None,
    layout: str = "",
) -> ReadHeads:
    """Read heads of any public layout and check them against the backbone.

    Args:
        path: a safetensors file, a pickle of tensors, or the index of shards; see `find_heads`.
        hidden, vocabulary: of the backbone.
        dtype: of the heads; None keeps the file's.
        lm_head: [V, hidden], the backbone's, to compare one with that a file shares among its heads.
        layout: the one of config.LAYOUTS that is expected; another one is worth a notice.

    Raises:
        UserError: the file is missing or damaged, a key is unknown or missing, a shape does not fit, or a number is
            none (NaN, infinity).
    """
    files = TensorFiles(path)
    return _Reading(files, sort_names(str(path), files.files), hidden, vocabulary).run(
        dtype, lm_head, layout
    )


class _Reading:
    """One file's heads on their way into the stacks."""

    def __init__(self, files: TensorFiles, parts: Parts, hidden: int, vocabulary: int) -> None:
        self.files, self.parts, self.hidden, self.vocabulary = files, parts, hidden, vocabulary
        self.notices: list[str] = []
        self.path = str(files.path)

    def run(self, dtype: torch.dtype | None, lm_head: Tensor | None, expected: str) -> ReadHeads:
        parts, biases = self.parts, self._complete()
        ids = self._ids()
        own = bool(parts.lm_heads) or (
            parts.shared is not None and not self._is_backbones(lm_head, ids)
        )
        used = [
            *parts.blocks.values(),
            *parts.lm_heads.values(),
            *([parts.shared] if parts.shared else []),
        ]
        stored = reduce(torch.promote_types, [self._tensor(name).dtype for name in used])
        with _default_dtype(dtype or stored):  # no float32 copy first
            heads = MedusaHeads(
                parts.heads, parts.layers, self.hidden, self.vocabulary if own else None
            )
        heads.requires_grad_(False)
        for (head, layer, kind), name in parts.blocks.items():
            self._fill(name, (heads.weight if kind == "weight" else heads.bias)[layer, head])
        if heads.lm_heads is not None:
            self._fill_lm_heads(heads.lm_heads, ids)
        layout = self._layout(own)
        self._tell(layout, expected, own, biases)
        return ReadHeads(heads.requires_grad_(True), layout, tuple(self.notices))

    def _complete(self) -> bool:
        """Whether blocks have biases: all do, or none; raises UserError for a block or LM head that is missing."""
        parts, naming = self.parts, NAMINGS[self.parts.naming]
        biases = any(kind == "bias" for *_, kind in parts.blocks)
        kinds = ("weight", "bias") if biases else ("weight",)
        every = (
            (h, b, kind) for h in range(parts.heads) for b in range(parts.layers) for kind in kinds
        )
        if absent := next((key for key in every if key not in parts.blocks), None):
            raise UserError(f"{self.path}: tensor {naming.block_name(*absent)} is missing")
        layered = "{layer}" in naming.lm_head
        belong = {(head, parts.layers if layered else None): head for head in range(parts.heads)}
        if stray := next((name for key, name in parts.lm_heads.items() if key not in belong), None):
            raise UserError(f"{self.path}: LM head {stray} belongs to no head")
        for key, head in belong.items():
            if parts.lm_heads and key not in parts.lm_heads:
                raise UserError(
                    f"{self.path}: tensor {naming.lm_head_name(head, parts.layers)} is missing"
                )
        return biases

    def _tensor(self, name: str) -> Tensor:
        tensor = self.files.get(name)
        if tensor.dtype not in _FLOATS:
            raise UserError(
                f"{self.path}: tensor {name} holds {str(tensor.dtype)[6:]}, not numbers of 16 bits or more"
            )
        return tensor

    def _finite(self, name: str) -> Tensor:
        tensor = self._tensor(name)
        if not _all_finite(tensor):
            raise UserError(
                f"{self.path}: tensor {name} holds NaN or infinity; the heads are damaged"
            )
        return tensor

    def _fill(self, name: str, target: Tensor) -> None:
        self._check_shape(name, self._tensor(name), tuple(target.shape))
        target.copy_(self._finite(name))
        self._check_range(name, target)

    def _check_range(self, name: str, target: Tensor) -> None:
        if target.dtype == torch.float16 and not _all_finite(target):
            raise UserError(
                f"{self.path}: tensor {name} holds numbers too large for float16; bfloat16 takes them"
            )

    def _check_shape(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{self.path}: tensor {name} has shape {list(tensor.shape)}, the backbone needs {list(shape)};"
                " were these heads trained for another model?"
            )

    def _ids(self) -> Tensor | None:
        """The ids that rows of truncated LM heads stand for (vLLM's token_map), [rows]."""
        name = self.parts.token_map
        if name is None:
            return None
        ids = self.files.get(name)
        if ids.dtype not in (torch.int32, torch.int64) or ids.ndim != 1 or not len(ids):
            raise UserError(f"{self.path}: {name} is not a list of token ids")
        if not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary or len(ids.unique()) < len(
            ids
        ):
            raise UserError(
                f"{self.path}: {name} names tokens twice, or beyond the backbone's {self.vocabulary}"
            )
        return ids.long().clone()

    def _fill_lm_heads(self, lm_heads: Tensor, ids: Tensor | None) -> None:
        names = {head: name for (head, _), name in self.parts.lm_heads.items()}
        for head, rows in enumerate(lm_heads):
            self._fill_rows(names.get(head) or self.parts.shared or "", rows, ids, tell=head == 0)

    def _fill_rows(self, name: str, target: Tensor, ids: Tensor | None, tell: bool) -> None:
        """Put an LM head's rows where their tokens are.

        A token without a row gets the mean of all rows: its logit is the mean of the others', never the likeliest and,
        among thousands, never near it. (No weights of a layer without bias are below all others for every input.)
        """
        rows = self._rows(name, ids)
        if ids is not None:
            if rows not in (len(ids), self.vocabulary):
                raise UserError(
                    f"{self.path}: tensor {name} has {rows} rows, token_map names {len(ids)} tokens"
                )
            if tell:
                self.notices.append(
                    f"the heads know {len(ids)} of {self.vocabulary} tokens and guess no others"
                )
            kept = self._finite(name) if rows == len(ids) else self._finite(name)[ids]
        else:
            kept = self._finite(name)[: self.vocabulary]
            ids = torch.arange(len(kept))
            if tell and rows != self.vocabulary:
                self.notices.append(
                    f"the heads have {rows} rows for {self.vocabulary} tokens, taken for padding"
                )
        if len(ids) < self.vocabulary:
            target[:] = kept.mean(0, dtype=torch.float32)
        target.index_copy_(0, ids, kept.to(target.dtype))
        self._check_range(name, target)

    def _rows(self, name: str, ids: Tensor | None) -> int:
        """The rows of an LM head, which are the backbone's but for padding, or those that ids stand for."""
        tensor = self._tensor(name)
        shape = (self.vocabulary, self.hidden)
        fits = tensor.ndim == 2 and tensor.shape[1] == self.hidden
        if not fits or (ids is None and not _padded(tensor.shape[0], self.vocabulary)):
            self._check_shape(name, tensor, shape)
        return tensor.shape[0]

    def _is_backbones(self, lm_head: Tensor | None, ids: Tensor | None) -> bool:
        """Whether the LM head that all heads of a file share is the backbone's own."""
        name = self.parts.shared
        assert name is not None
        self._rows(name, ids)
        theirs = self._finite(name)
        if ids is not None and len(ids) < self.vocabulary:
            return False
        if lm_head is None or not lm_head.is_floating_point():
            self.notices.append(
                f"{name} is taken to be the backbone's LM head: they cannot be compared"
            )
            return True
        rows = min(len(theirs), len(lm_head))
        pairs = zip(theirs[:rows].split(4096), lm_head[:rows].split(4096), strict=True)
        same = all(
            torch.allclose(a.float(), b.float().cpu(), rtol=0.01, atol=1e-5) for a, b in pairs
        )
        if not same:
            self.notices.append(
                f"{name} is not the backbone's LM head, so that each head keeps a copy of it"
            )
        return same

    def _layout(self, own: bool) -> str:
        if self.parts.naming == "official":
            return "v0.1" if own else "v2"
        return self.parts.naming

    def _tell(self, layout: str, expected: str, own: bool, biases: bool) -> None:
        """What the config or the model list says otherwise, and what was left out."""
        parts = self.parts
        shared = not own or parts.shared is not None
        facts = {"heads": parts.heads, "layers": parts.layers, "shared": shared, "biases": biases}
        self.notices += said_otherwise(self.files.path.parent / "config.json", facts)
        if expected and expected not in LAYOUTS:
            raise UserError(f"unknown layout {expected!r} of heads; there are {', '.join(LAYOUTS)}")
        if expected and layout not in _SAME.get(expected, (expected,)):
            self.notices.append(
                f"the heads were expected in the layout {expected}, and are in {layout}"
            )
        if not biases:
            self.notices.append(
                "the heads have no biases, which some converters drop: they may guess worse for it"
            )
        if parts.replaced:
            self.notices.append(
                f"tensors that training replaced ({parts.replaced} original_module) are left out"
            )
        if parts.lora:
            self.notices.append(
                f"an adapter's tensors ({parts.lora}) are left out: the heads were trained with it on"
            )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _all_finite(tensor: Tensor) -> bool:
    return not tensor.numel() or all(bool(bound.isfinite()) for bound in tensor.aminmax())


def _padded(rows: int, vocabulary: int) -> bool:
    """Whether two counts of rows differ by padding alone."""
    small, large = sorted((rows, vocabulary))
    return 8 * (large - small) <= large and any(
        large == -(-small // multiple) * multiple for multiple in (1, *_PADDINGS)
    )
