"""Hidden states of packed rows from the native step: as the chat runs the model, and faster."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.config import LoadOptions
from medusa_chat.model.loading import load_model
from medusa_chat.native.step import NativeStep
from medusa_chat.native.structures import MOST_ROWS

if TYPE_CHECKING:
    from medusa_chat.config import ModelSpec


class NativeReader:
    """Runs packed rows through the native step, a document behind another in one cache."""

    def __init__(
        self,
        spec: ModelSpec,
        quant: str,
        length: int,
        dtype: torch.dtype,
        ignore_memory: bool = False,
    ) -> None:
        """Load a model as the chat does on a CPU.

        Args:
            spec: the model; its heads are not loaded.
            quant: of its layers, as in a Recipe.
            length: tokens in a row.
            dtype: of the states.
            ignore_memory: load even if less memory is free than the model needs.

        Raises:
            UserError: the native step does not run the model, or the memory does not suffice.
        """
        wanted = replace(spec, heads=None, quant=quant.replace("none", spec.quant))
        options = LoadOptions(
            device="cpu", engine="native", context=length, ignore_memory=ignore_memory
        )
        backbone = load_model(wanted, options).backbone
        packed = backbone.native
        assert packed is not None
        self._dtype = dtype
        self._step = NativeStep(packed.model, None, packed.team, backbone.new_cache(length))

    @torch.no_grad()
    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return the last hidden states, [rows, length, hidden].

        Args:
            ids: [rows, length].
            positions: [rows, length]; 0 begins a document, which sees nothing before it.
        """
        return torch.stack([self._row(*row) for row in zip(ids, positions, strict=True)])

    def _row(self, ids: Tensor, positions: Tensor) -> Tensor:
        tokens, places = ids.tolist(), positions.tolist()
        firsts = (torch.arange(len(ids)) - positions).tolist()
        states = []
        for start in range(0, len(tokens), MOST_ROWS):
            block = slice(start, start + MOST_ROWS)
            count = len(tokens[block])
            self._step.texts(tokens[block], firsts[block], places[block], logits_from=count)
            states.append(self._step.hidden[:count].to(self._dtype, copy=True))
        return torch.cat(states)
