"""Many texts at once on the native step: each forward runs a row of every text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.native.step import NativeStep
from medusa_chat.native.structures import MOST_ROWS
from medusa_chat.sampling import COLD

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from medusa_chat.model.backbone import Backbone

Row = tuple[int, int, int]  # text, position in it, token


class NativeTexts:
    """Texts that grow together, each in its own part of one cache."""

    def __init__(self, backbone: Backbone, texts: int, length: int) -> None:
        """Make an empty cache for `texts` texts of at most `length` tokens."""
        packed = backbone.native
        assert packed is not None
        cache = backbone.new_cache(texts * length)
        self._step = NativeStep(packed.model, None, packed.team, cache)
        self._length = length
        self._places = [0] * texts

    def fill(self, texts: Sequence[Sequence[int]]) -> None:
        """Append tokens to each text, in order."""
        rows = [
            (text, self._places[text] + place, token)
            for text, tokens in enumerate(texts)
            for place, token in enumerate(tokens)
        ]
        for start in range(0, len(rows), MOST_ROWS):
            block = rows[start : start + MOST_ROWS]
            self._run(block, len(block))
        self._places = [
            place + len(tokens) for place, tokens in zip(self._places, texts, strict=True)
        ]

    def extend(self, texts: Sequence[int], tokens: Sequence[int], temperature: float) -> list[int]:
        """Append a token to some of the texts.

        Returns:
            The token that follows in each: the likeliest, or drawn with torch's generator.
        """
        rows = [
            (text, self._places[text], token) for text, token in zip(texts, tokens, strict=True)
        ]
        following: list[int] = []
        for start in range(0, len(rows), MOST_ROWS):
            block = rows[start : start + MOST_ROWS]
            self._run(block, 0)
            following += choose(self._step.logits(len(block)), temperature)
        for text in texts:
            self._places[text] += 1
        return following

    def _run(self, rows: Sequence[Row], logits_from: int) -> None:
        firsts = [self._length * text for text, _, _ in rows]
        places = [place for _, place, _ in rows]
        self._step.texts([token for _, _, token in rows], firsts, places, logits_from)


def choose(logits: Tensor, temperature: float) -> list[int]:
    """Take the likeliest token of each row, or draw one: logits [n, V]."""
    if temperature < COLD:
        chosen = logits.argmax(-1)
    else:
        # One uniform number a row: multinomial() draws one a token, and takes as long as the step.
        sums = (logits / temperature).softmax(-1).cumsum(-1)
        drawn = torch.rand(len(sums), 1) * sums[:, -1:]
        chosen = torch.searchsorted(sums, drawn, right=True)[:, 0].clamp_(max=sums.shape[-1] - 1)
    return chosen.tolist()


def continue_texts(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    ends: Collection[int],
    new_tokens: int,
    temperature: float,
) -> list[list[int]]:
    """Continue each prompt, which has a token at least, by `new_tokens`, or to an end if earlier.

    Args:
        backbone: packed for the native step.
        prompts: token ids.
        ends: ids that end a text; they are part of it.
        new_tokens: the most.
        temperature: of the draws; nearly 0 takes the likeliest token.
    """
    texts = NativeTexts(backbone, len(prompts), max(map(len, prompts)) + new_tokens)
    texts.fill([prompt[:-1] for prompt in prompts])
    found: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    last = [prompt[-1] for prompt in prompts]
    for _ in range(new_tokens):
        following = texts.extend(alive, last, temperature)
        for text, token in zip(alive, following, strict=True):
            found[text].append(token)
        alive = [text for text in alive if found[text][-1] not in ends]
        last = [found[text][-1] for text in alive]
        if not alive:
            break
    return found
