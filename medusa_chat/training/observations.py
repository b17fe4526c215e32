"""Replies of a model with all that its heads guessed along them: what calibration counts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.config import Message, UserError
from medusa_chat.decoding.draft.ranking import CANDIDATES, Candidates, Noise
from medusa_chat.decoding.noise import gumbel_of
from medusa_chat.decoding.numbers import Numbers
from medusa_chat.native.model import NativeHeads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from medusa_chat.decoding.draft.ranking import Ranker
    from medusa_chat.decoding.engine import Engine
    from medusa_chat.decoding.trees.tree import NodePath
    from medusa_chat.events import Step
    from medusa_chat.prompts import Prompt
    from medusa_chat.sampling import Sampling

NO_GUESS = -1  # rank of a token that is not among the guesses
PAST_END = -2  # rank of a token after the reply's end

# Ranks of a reply: for each token but the last, the ranks that heads 1, 2, ... gave to the tokens
# that followed.
Ranks = list["NodePath"]


@dataclass(frozen=True)
class Observed:
    """A reply of n tokens, and the heads' candidates behind each of them but the last.

    Attributes:
        position: of the first token in the text.
        reply: the tokens.
        numbers: of the sampling that it was drawn with.
        candidates: tokens, log_p and indices are [n - 1, K, C] each.
    """

    position: int
    reply: list[int]
    numbers: Numbers
    candidates: Candidates

    def at(self, place: int) -> Candidates:
        """The candidates [K, C] of a step whose root is the token at `place`."""
        found = self.candidates
        assert found.log_p is not None
        return Candidates(found.tokens[place], found.log_p[place], found.indices[place])


@dataclass(frozen=True)
class Guessed:
    """A reply with the heads' guesses in their order.

    Attributes:
        observed: the reply.
        table: [K, n - 1], the rank that head k gave to the token at its place, or NO_GUESS or
            PAST_END.
        log_p: float32 [n - 1, K, C], of the guesses, likeliest first.
    """

    observed: Observed
    table: Tensor
    log_p: Tensor

    @property
    def ranks(self) -> Ranks:
        """At each token the ranks before the first head that missed."""
        columns = self.table.T.tolist()
        return [tuple(takewhile(lambda rank: rank >= 0, column)) for column in columns]


def answers(
    engine: Engine, prompt: Prompt, sampling: Sampling
) -> Iterator[tuple[list[int], list[Step]]]:
    """Answer a prompt's first two turns. Yields the ids before each reply, and its steps."""
    messages: list[Message] = prompt.system
    for turn in prompt.turns[:2]:
        messages.append({"role": "user", "content": turn})
        ids = engine.encode(messages)
        if len(ids) + 2 >= engine.context:
            return
        steps = list(engine.generate(ids, sampling))
        yield ids, steps
        text = "".join(step.text for step in steps)
        if not text.strip():  # templates refuse an empty reply
            return
        messages.append({"role": "assistant", "content": text})


def observe_all(
    engine: Engine,
    prompts: list[Prompt],
    sampling: Callable[[int], Sampling],
    progress: Callable[[int], None],
) -> list[Observed]:
    """Answer prompts and observe the replies that have a second token.

    Args:
        engine: with the torch step.
        prompts: first two turns of each.
        sampling: of a prompt, by its number.
        progress: called with the prompts that are done.
    """
    found = []
    for number, prompt in enumerate(prompts):
        law = sampling(number)
        for ids, steps in answers(engine, prompt, law):
            reply = [token.id for step in steps for token in step.tokens]
            if len(reply) > 1:
                found.append(observe(engine, ids, reply, law))
        progress(number + 1)
    return found


@torch.inference_mode()
def observe(engine: Engine, prompt: list[int], reply: list[int], sampling: Sampling) -> Observed:
    """Collect the heads' candidates along a reply of two tokens or more."""
    heads = engine.runner.heads
    if heads is None or isinstance(heads, NativeHeads):
        raise UserError("calibration needs Medusa heads, loaded with engine='torch'")
    backbone = engine.backbone
    text = torch.tensor(prompt + reply, device=backbone.device)
    # The first state is that of the prompt's last token, which the reply's first token follows.
    hidden = backbone.hidden_of_text(text)[len(prompt) - 1 : -2]
    log_p = heads.logits(hidden, backbone.lm_head).float().log_softmax(-1)
    top = log_p.topk(min(CANDIDATES, log_p.shape[-1]))
    indices = top.indices.transpose(0, 1).cpu()
    vocabulary = heads.vocabulary
    tokens = indices if vocabulary is None else vocabulary.tokens.cpu()[indices]
    candidates = Candidates(tokens, top.values.transpose(0, 1).cpu(), indices)
    return Observed(len(prompt), reply, Numbers.of(sampling), candidates)


@torch.inference_mode()
def guessed(observed: Observed, ranker: Ranker, vocabulary: int) -> Guessed:
    """Put the candidates along a reply into a ranker's order, each behind the tokens before it."""
    noise = noise_along(observed, ranker, vocabulary)
    ranked = ranker.rank_along(observed.candidates, parents_along(observed), noise)
    guesses = observed.candidates.tokens.gather(-1, ranked.order)
    return Guessed(observed, places_of_right(observed, guesses).T.contiguous(), ranked.log_p)


@dataclass(frozen=True)
class Scores:
    """What the weights of a coupling are fitted to, along a reply.

    Attributes:
        log_p: float32 [n - 1, K, C], tempered, of each candidate behind the token before it.
        noise: float32 [n - 1, K, C].
        right: [n - 1, K], the place of the token that followed among the candidates, or below 0.
    """

    log_p: Tensor
    noise: Tensor
    right: Tensor


@torch.inference_mode()
def scores_along(observed: Observed, ranker: Ranker, vocabulary: int) -> Scores:
    """Score the candidates along a reply that was drawn with noise."""
    noise = noise_along(observed, ranker, vocabulary)
    assert noise is not None
    log_p = ranker.log_p_along(observed.candidates, parents_along(observed))
    tempered = log_p / observed.numbers.temperature
    right = places_of_right(observed, observed.candidates.tokens)
    return Scores(tempered, noise.values, right)


def parents_along(observed: Observed) -> Tensor:
    """The token before each head's at each place of a reply: [n - 1, K]."""
    count, heads, _ = observed.candidates.tokens.shape
    ahead = torch.arange(count)[:, None] + torch.arange(heads)
    return torch.tensor(observed.reply)[ahead.clamp(max=count)]


def places_of_right(observed: Observed, guesses: Tensor) -> Tensor:
    """Places [n - 1, K] of the tokens that followed among guesses [n - 1, K, C].

    NO_GUESS if a token is not among them, PAST_END after the reply's end.
    """
    count, heads, _ = guesses.shape
    ahead = torch.arange(count)[:, None] + torch.arange(1, heads + 1)
    wanted = torch.tensor(observed.reply)[ahead.clamp(max=count)]
    found = guesses == wanted[..., None]
    places = torch.where(found.any(-1), found.int().argmax(-1), NO_GUESS)
    return places.masked_fill(ahead > count, PAST_END)


def noise_along(observed: Observed, ranker: Ranker, vocabulary: int) -> Noise | None:
    """The noise of all candidates along a reply, [n - 1, K, C]; None without coupling."""
    if ranker.coupling == "none":
        return None
    tokens = observed.candidates.tokens
    count, heads, width = tokens.shape
    places = torch.arange(count)[:, None] + torch.arange(1, heads + 1) + observed.position
    seed = int(observed.numbers.seed)
    noise = gumbel_of(seed, places.flatten(), tokens.reshape(-1, width), vocabulary)
    return Noise(noise.view(count, heads, width), observed.numbers)
