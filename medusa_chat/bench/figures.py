"""Figures of replies: computed for each round, and the median of the rounds is the result."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

from medusa_chat.bench.replies import Round, Transcript, Turn, baseline_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from medusa_chat.bench.job import BenchJob

Figures = dict[str, Any]


def mode_figures(rounds: Sequence[Round], mode: str, baseline: str) -> Figures:
    """Figures of one mode over all prompts, by category and by turn."""
    figures = _figures(rounds, mode, baseline)
    conversations = rounds[0][mode]
    figures["categories"] = {}
    for category in sorted({each.category for each in conversations}):
        within = [_of_category(each, category) for each in rounds]
        figures["categories"][category] = _figures(within, mode, baseline)
    longest = max(len(each.turns) for each in conversations)
    figures["turns"] = [_turn_figures(rounds, mode, number) for number in range(longest)]
    return figures


def peer_figures(rounds: Sequence[Round], job: BenchJob) -> dict[str, Figures]:
    """Tokens/s of other decoders, and ours over theirs.

    Prefill counts on both sides, but for the figures that begin with `decode`.
    """
    figures: dict[str, Figures] = {}
    vanilla = baseline_name(replace(job.sampling, mode=job.modes[0]))
    ours = {*job.modes, "view", *(baseline_name(replace(job.sampling, mode=m)) for m in job.modes)}
    for peer in [way for way in rounds[0] if way not in ours]:
        turns = [_turns(each[peer]) for each in rounds]
        figures[peer] = {
            "tokens_per_second": round(median(_wall_rate(each[peer]) for each in rounds), 2),
            "decode_tokens_per_second": _median(map(_rate_after_first, turns), digits=2),
            "time_to_first_token_ms": _median(
                1000 * median(turn.first for turn in each) for each in turns
            ),
            "ratio": {mode: wall_ratio(rounds, mode, peer) for mode in job.modes},
            "decode_ratio": {mode: decode_ratio(rounds, mode, peer) for mode in job.modes},
            "vanilla_ratio": wall_ratio(rounds, vanilla, peer),
            "decode_vanilla_ratio": decode_ratio(rounds, vanilla, peer),
        }
    return figures


def decode_ratio(rounds: Sequence[Round], way: str, peer: str) -> float | None:
    """Tokens/s of our steps over those of a peer after its first token."""
    pairs = ((_turns(each[way]), _turns(each[peer])) for each in rounds)
    return _median(_ratio(_rate(ours), _rate_after_first(theirs)) for ours, theirs in pairs)


def wall_ratio(rounds: Sequence[Round], way: str, other: str) -> float:
    """Tokens/s of one way of decoding over another's. Prefill counts on both sides."""
    ratios = [_wall_rate(each[way]) / _wall_rate(each[other]) for each in rounds]
    return round(median(ratios), 4)


def _figures(rounds: Sequence[Round], mode: str, baseline: str) -> Figures:
    by_round = [_round_figures(each[mode], each[baseline]) for each in rounds]
    figures: Figures = {key: _median(row[key] for row in by_round) for key in by_round[0]}
    turns = [turn for each in rounds for turn in _turns(each[mode])]
    figures["head_acceptance"] = _head_acceptance(turns)
    figures["new_tokens"] = sum(turn.stats.new_tokens for turn in turns)
    figures["prompts"] = len(rounds[0][mode])
    return figures


def _head_acceptance(turns: Sequence[Turn]) -> dict[str, float]:
    reached: Counter[int] = Counter()
    accepted: Counter[int] = Counter()
    for turn in turns:
        reached.update(turn.stats.reached)
        accepted.update(turn.stats.accepted)
    return {str(head): round(accepted[head] / reached[head], 4) for head in sorted(reached)}


def _round_figures(
    conversations: Sequence[Transcript], baseline: Sequence[Transcript]
) -> dict[str, float | None]:
    """Figures of one round. `speedup` is that of `Stats`, `throughput_ratio` is of all steps."""
    turns = _turns(conversations)
    vanilla = _turns(baseline)
    tree_steps = sum(turn.stats.tree_steps for turn in turns)
    length = _ratio(sum(turn.stats.tree_tokens for turn in turns), tree_steps)
    step = _step_seconds(turns)
    vanilla_step = _step_seconds(vanilla)
    overhead = _ratio(step, vanilla_step)
    return {
        "acceptance_length": length,
        "overhead": overhead,
        "speedup": _ratio(length, overhead),
        "throughput_ratio": _ratio(_rate(turns), _rate(vanilla)),
        "tokens_per_second": _rate(turns),
        "vanilla_tokens_per_second": _rate(vanilla),
        "wall_tokens_per_second": _wall_rate(conversations),
        "step_ms": step and 1000 * step,
        "vanilla_step_ms": vanilla_step and 1000 * vanilla_step,
        "time_to_first_token_ms": 1000 * median(turn.first for turn in turns),
    }


def _turn_figures(rounds: Sequence[Round], mode: str, number: int) -> Figures:
    """Figures of the turn of that number in all conversations that have it."""
    conversations = [each for way in rounds for each in way[mode]]
    turns = [each.turns[number] for each in conversations if number < len(each.turns)]
    return {
        "conversations": len(turns) // len(rounds),
        "time_to_first_token_ms": round(1000 * median(turn.first for turn in turns), 4),
        "prefilled_tokens": round(median(turn.prefilled for turn in turns)),
    }


def _of_category(ways: Round, category: str) -> Round:
    return {
        way: [each for each in conversations if each.category == category]
        for way, conversations in ways.items()
    }


def _turns(conversations: Sequence[Transcript]) -> list[Turn]:
    return [turn for each in conversations for turn in each.turns]


def _step_seconds(turns: Sequence[Turn]) -> float | None:
    """Median over replies of a reply's median step; None if no reply took a step."""
    seconds = (turn.stats.tree_step_seconds or turn.stats.vanilla_step_seconds for turn in turns)
    return _median(seconds, digits=9)


def _rate(turns: Sequence[Turn]) -> float | None:
    """New tokens per second inside the engine, without prefill."""
    tokens = sum(turn.stats.new_tokens for turn in turns)
    return _ratio(tokens, sum(turn.stats.seconds for turn in turns))


def _rate_after_first(turns: Sequence[Turn]) -> float | None:
    """Tokens per second of a peer, without prefill and the token that comes with it."""
    tokens = sum(max(turn.stats.new_tokens - 1, 0) for turn in turns)
    return _ratio(tokens, sum(turn.stats.seconds for turn in turns))


def _wall_rate(conversations: Sequence[Transcript]) -> float:
    turns = _turns(conversations)
    return sum(turn.stats.new_tokens for turn in turns) / sum(turn.wall for turn in turns)


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value is not None and other else None


def _median(values: Iterable[float | None], digits: int = 4) -> float | None:
    """Median of the known values; None if no value is known."""
    known = [value for value in values if value is not None]
    return round(median(known), digits) if known else None
