"""`medusa-chat distill`: the model answers seed prompts, so that its heads learn from its own words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from medusa_chat.config import Message, resolve_model
from medusa_chat.model.loading import load_pretrained
from medusa_chat.prompts import Prompt, read_prompts


def distill(
    model: str, prompts: list[Path], out: Path, *, limit: int | None, turns: int, batch: int, max_new_tokens: int,
    temperature: float, seed: int, progress: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Write conversations with the user's turns of `prompts` and the model's own answers to `out`, a line each.

    A run that was cut off goes on behind the lines that `out` holds; the result is the same.
    """
    backbone, tokenizer = load_pretrained(resolve_model(model), None)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:  # the mask hides whatever stands there
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    wanted = read_prompts(prompts, limit)
    done = _keep_whole_batches(out, batch)
    with out.open("a", encoding="utf-8") as lines:
        for start in range(done, len(wanted), batch):
            # Each batch draws from its own seed, so that it does not matter which ones an earlier run had done.
            torch.manual_seed(seed + start // batch)
            group = wanted[start : start + batch]
            for conversation in _answer(backbone, tokenizer, group, turns, max_new_tokens, temperature):
                lines.write(json.dumps({"source": "self", "messages": conversation}) + "\n")
            lines.flush()
            progress(min(start + batch, len(wanted)), len(wanted))


def _keep_whole_batches(out: Path, batch: int) -> int:
    """Conversations in `out` that are kept: what was cut off within a batch is answered again."""
    lines = out.read_bytes().splitlines(keepends=True) if out.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    kept = whole[: len(whole) // batch * batch]
    if len(kept) < len(lines):
        out.write_bytes(b"".join(kept))
    return len(kept)


def _answer(
    backbone: Any, tokenizer: Any, prompts: list[Prompt], turns: int, max_new_tokens: int, temperature: float
) -> list[list[Message]]:
    """Let the model answer the first `turns` user turns of each prompt, all prompts at once."""
    conversations: list[list[Message]] = [[] for _ in prompts]
    for turn in range(turns):
        asked = [i for i, prompt in enumerate(prompts) if turn < len(prompt.turns)]
        for i in asked:
            conversations[i].append({"role": "user", "content": prompts[i].turns[turn]})
        texts = _generate(backbone, tokenizer, [conversations[i] for i in asked], max_new_tokens, temperature)
        for i, text in zip(asked, texts, strict=True):
            conversations[i].append({"role": "assistant", "content": text})
    return conversations


@torch.inference_mode()
def _generate(
    backbone: Any, tokenizer: Any, conversations: list[list[Message]], max_new_tokens: int, temperature: float
) -> Iterator[str]:
    if not conversations:
        return iter(())
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations]
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(backbone.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    ids = backbone.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=max_new_tokens, **sampling
    )
    return iter(tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True))
