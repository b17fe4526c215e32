"""Replies to prompts in every way of decoding, side by side: the raw material of bench's figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from medusa_chat.bench.peers import TransformersPeer
from medusa_chat.config import Message, Sampling, UserError
from medusa_chat.stats import Stats

if TYPE_CHECKING:
    from medusa_chat.bench.plan import Consume, Plan, Tick
    from medusa_chat.decoding.engine import Engine
    from medusa_chat.events import Step
    from medusa_chat.prompts import Prompt

PEERS = {
    "transformers": 0,
    "transformers-lookup": 10,
}  # -> tokens copied at once (prompt_lookup_num_tokens)
WARM_UPS = 2


@dataclass(frozen=True)
class Turn:
    """One reply: its figures, and the seconds from its prompt to its first token and to its end, as a consumer sees."""

    stats: Stats
    first: float
    wall: float
    prefilled: int
    text: str


@dataclass(frozen=True)
class Run:
    """One conversation in one way of decoding."""

    category: str
    turns: list[Turn]


Answer = Callable[[list[int]], Turn]
Round = dict[str, list[Run]]  # way -> a run for each prompt


def baseline_name(sampling: Sampling) -> str:
    """The way that a mode is compared with: vanilla decoding that samples as the mode does."""
    return "vanilla" if sampling.greedy else "vanilla-sampled"


def ways_of(engine: Engine, plan: Plan) -> dict[str, Answer]:
    """The ways of decoding by name. Each sampling mode has a vanilla baseline that samples alike."""
    ways: dict[str, Answer] = {}
    for mode in plan.modes:
        sampling = replace(plan.sampling, mode=mode)
        baseline = replace(sampling, mode="vanilla", sample=not sampling.greedy)
        ways.setdefault(baseline_name(sampling), _ours(engine, baseline))
        ways[mode] = _ours(engine, sampling)
    if plan.view:
        ways["view"] = _ours(engine, replace(plan.sampling, mode=plan.modes[0]), plan.view)
    if plan.peer:
        peer = TransformersPeer(engine)
        ways |= {
            name: _peers(engine, peer, plan.sampling.max_new_tokens, lookup)
            for name, lookup in PEERS.items()
        }
    return ways


def measure_replies(engine: Engine, plan: Plan, tick: Tick) -> list[Round]:
    """Every prompt of a plan whose prompts fit, in every way, one way after the other, round by round."""
    ways, prompts = ways_of(engine, plan), plan.prompts
    for prompt in prompts[:WARM_UPS]:  # first calls allocate and choose kernels
        for answer in ways.values():
            converse(engine, prompt, plan.turns, answer)
    rounds: list[Round] = []
    for number in range(plan.rounds):
        runs: Round = {name: [] for name in ways}
        for done, prompt in enumerate(prompts, 1):
            for name, answer in ways.items():
                runs[name].append(converse(engine, prompt, plan.turns, answer))
            tick(number * len(prompts) + done, plan.rounds * len(prompts))
        rounds.append(runs)
    return rounds


def fitting(engine: Engine, prompts: list[Prompt]) -> list[Prompt]:
    """The prompts whose first turn leaves room for a reply; raises UserError if there is none."""
    fit = [prompt for prompt in prompts if len(engine.encode(prompt.opening())) < engine.context]
    if not fit:
        raise UserError(
            f"none of the {len(prompts)} prompts fits into the {engine.context} tokens of {engine.name}"
        )
    return fit


def converse(engine: Engine, prompt: Prompt, turns: int, answer: Answer) -> Run:
    """Answer up to `turns` turns of a conversation that starts with an empty cache, while they fit the context."""
    engine.forget()
    messages: list[Message] = []
    answered: list[Turn] = []
    for text in prompt.turns[:turns]:
        messages.append({"role": "user", "content": text})
        ids = engine.encode(messages)
        if len(ids) >= engine.context:
            break
        answered.append(answer(ids))
        messages.append({"role": "assistant", "content": answered[-1].text})
    return Run(prompt.category, answered)


def _ours(engine: Engine, sampling: Sampling, consume: Consume = list) -> Answer:
    def answer(ids: list[int]) -> Turn:
        stats, pieces, first = Stats(), [], 0.0
        started = time.perf_counter()

        def counted() -> Iterable[Step]:
            nonlocal first
            for step in engine.generate(ids, sampling):
                first = first or time.perf_counter() - started
                stats.add(step)
                pieces.append(step.text)
                yield step

        consume(counted())
        return Turn(stats, first, time.perf_counter() - started, engine.prefilled, "".join(pieces))

    return answer


def _peers(engine: Engine, peer: TransformersPeer, max_new_tokens: int, lookup: int) -> Answer:
    """generate() tells nothing before its end, so its time to the first token stays unknown."""

    def answer(ids: list[int]) -> Turn:
        started = time.perf_counter()
        reply = peer.generate(ids, min(max_new_tokens, engine.context - len(ids)), lookup)
        seconds = time.perf_counter() - started
        text = engine.tokenizer.decode(reply, skip_special_tokens=True)
        return Turn(Stats(new_tokens=len(reply), seconds=seconds), seconds, seconds, len(ids), text)

    return answer
