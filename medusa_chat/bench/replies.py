"""Replies to prompts in every way of decoding, taken in turn: the data of bench's figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from medusa_chat.bench.peers import load_peers
from medusa_chat.config import Message, UserError
from medusa_chat.stats import Stats

if TYPE_CHECKING:
    from medusa_chat.bench.job import BenchJob, Consume, Tick
    from medusa_chat.bench.peers import Peer
    from medusa_chat.decoding.engine import Engine
    from medusa_chat.events import Step
    from medusa_chat.prompts import Prompt
    from medusa_chat.sampling import Sampling

WARM_UP_PROMPTS = 2


@dataclass(frozen=True)
class Turn:
    """One reply.

    Attributes:
        first: seconds from the prompt to the first token, as a consumer sees it.
        wall: seconds from the prompt to the end of the reply.
        prefilled: tokens of the prompt that were run.
    """

    stats: Stats
    first: float
    wall: float
    prefilled: int
    text: str


@dataclass(frozen=True)
class Transcript:
    """The replies to one prompt in one way of decoding."""

    category: str
    turns: list[Turn]


Answer = Callable[[list[int]], Turn]
Round = dict[str, list[Transcript]]  # by way of decoding: one conversation for each prompt


def baseline_name(sampling: Sampling) -> str:
    """The baseline of a mode: vanilla decoding that samples as the mode does."""
    return "baseline" if sampling.greedy else "baseline-sampled"


def ways_of(engine: Engine, job: BenchJob) -> dict[str, Answer]:
    """All ways of decoding by name: baselines, modes, the view and the peers."""
    ways: dict[str, Answer] = {}
    for mode in job.modes:
        sampling = replace(job.sampling, mode=mode)
        temperature = 0.0 if sampling.greedy else sampling.temperature
        baseline = replace(sampling, mode="vanilla", temperature=temperature)
        ways.setdefault(baseline_name(sampling), _engine_answer(engine, baseline))
        ways[mode] = _engine_answer(engine, sampling)
    if job.view:
        sampling = replace(job.sampling, mode=job.modes[0])
        ways["view"] = _engine_answer(engine, sampling, job.view)
    for name, peer in load_peers(engine, job.peers).items():
        ways[name] = _peer_answer(engine, peer, job.sampling.max_new_tokens)
    return ways


def measure_replies(engine: Engine, job: BenchJob, tick: Tick) -> list[Round]:
    """Answer every prompt in every way, one way after the other, round by round."""
    ways = ways_of(engine, job)
    prompts = job.prompts
    for prompt in prompts[:WARM_UP_PROMPTS]:  # first calls allocate and choose kernels
        for answer in ways.values():
            converse(engine, prompt, job.turns, answer)
    rounds: list[Round] = []
    for number in range(job.rounds):
        found: Round = {name: [] for name in ways}
        for done, prompt in enumerate(prompts, 1):
            for name, answer in ways.items():
                found[name].append(converse(engine, prompt, job.turns, answer))
            tick(number * len(prompts) + done, job.rounds * len(prompts))
        rounds.append(found)
    return rounds


def fitting(engine: Engine, prompts: list[Prompt]) -> list[Prompt]:
    """The prompts whose first turn leaves space for a reply. Raises UserError if none does."""
    fit = [prompt for prompt in prompts if len(engine.encode(prompt.opening())) < engine.context]
    if not fit:
        raise UserError(
            f"none of the {len(prompts)} prompts fits into the {engine.context} tokens of"
            f" {engine.name}"
        )
    return fit


def converse(engine: Engine, prompt: Prompt, turns: int, answer: Answer) -> Transcript:
    """Answer up to `turns` turns from an empty cache, while they fit the context."""
    engine.forget()
    messages: list[Message] = prompt.system
    answered: list[Turn] = []
    for text in prompt.turns[:turns]:
        messages.append({"role": "user", "content": text})
        ids = engine.encode(messages)
        if len(ids) >= engine.context:
            break
        answered.append(answer(ids))
        if not answered[-1].text.strip():  # templates refuse an empty reply
            break
        messages.append({"role": "assistant", "content": answered[-1].text})
    return Transcript(prompt.category, answered)


def _engine_answer(engine: Engine, sampling: Sampling, consume: Consume = list) -> Answer:
    def answer(ids: list[int]) -> Turn:
        stats = Stats()
        pieces: list[str] = []
        first = 0.0
        started = time.perf_counter()

        def counted() -> Iterable[Step]:
            nonlocal first
            for step in engine.generate(ids, sampling):
                first = first or time.perf_counter() - started
                stats.add(step)
                pieces.append(step.text)
                yield step

        consume(counted())
        wall = time.perf_counter() - started
        return Turn(stats, first, wall, engine.prefilled, "".join(pieces))

    return answer


def _peer_answer(engine: Engine, peer: Peer, max_new_tokens: int) -> Answer:
    """Answer with another decoder; its time after the first token counts as that of its steps."""

    def answer(ids: list[int]) -> Turn:
        longest = min(max_new_tokens, engine.context - len(ids))
        reply = peer.reply(ids, longest)
        stats = Stats(new_tokens=reply.tokens, seconds=reply.seconds - reply.first)
        return Turn(stats, reply.first, reply.seconds, len(ids), reply.text)

    return answer
