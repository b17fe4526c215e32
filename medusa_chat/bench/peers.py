"""Other decoders of the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from medusa_chat.config import ModelSpec
from medusa_chat.model.linear.packed import pack_linears
from medusa_chat.model.linear.quantization import quant_of
from medusa_chat.model.pretrained import load_pretrained

if TYPE_CHECKING:
    from medusa_chat.decoding.engine import Engine


class TransformersPeer:
    """Greedy generate() of transformers, with its default attention and cache."""

    def __init__(self, engine: Engine) -> None:
        backbone = engine.backbone
        spec = ModelSpec(engine.name, backbone.model.name_or_path)
        quant = quant_of(backbone.model.config)
        model, _ = load_pretrained(spec, backbone.dtype, quant or "none", backbone.device)
        self.model = model.eval()
        if quant == "int8":
            # On a CPU bitsandbytes cuts activations to 8 bits. The engine does not.
            pack_linears(self.model)

    @torch.inference_mode()
    def generate(self, prompt: list[int], max_new_tokens: int, lookup: int = 0) -> list[int]:
        """Ids of the reply, EOS included. With `lookup` so many tokens are copied from the text."""
        ids = torch.tensor([prompt], device=self.model.device)
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            prompt_lookup_num_tokens=lookup or None,
        )
        reply: list[int] = output[0, len(prompt) :].tolist()
        return reply
