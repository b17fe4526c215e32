"""Figures of replies: each is computed round by round, and the median round is told."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

from medusa_chat.bench.replies import PEERS, Round, Run, Turn, baseline_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medusa_chat.bench.plan import Plan

Figures = dict[str, Any]


def mode_figures(rounds: Sequence[Round], mode: str, baseline: str) -> Figures:
    """One mode's figures over all prompts, of each category, and of each turn if there are several."""
    figures = _figures(rounds, mode, baseline)
    figures["categories"] = {
        category: _figures([_of_category(runs, category) for runs in rounds], mode, baseline)
        for category in sorted({run.category for run in rounds[0][mode]})
    }
    longest = max(len(run.turns) for run in rounds[0][mode])
    figures["turns"] = [_turn_figures(rounds, mode, number) for number in range(longest)]
    return figures


def peer_figures(rounds: Sequence[Round], plan: Plan) -> dict[str, Figures]:
    """Tokens/s of other decoders and ours over theirs, prefill included on both sides."""
    first = baseline_name(replace(plan.sampling, mode=plan.modes[0]))
    return {
        peer: {
            "tokens_per_second": round(median(_wall_rate(runs[peer]) for runs in rounds), 2),
            "ratio": {mode: wall_ratio(rounds, mode, peer) for mode in plan.modes},
            "vanilla_ratio": wall_ratio(rounds, first, peer),
        }
        for peer in PEERS
    }


def wall_ratio(rounds: Sequence[Round], way: str, other: str) -> float:
    """Tokens/s of one way over another's, prefill included on both sides."""
    return round(median(_wall_rate(runs[way]) / _wall_rate(runs[other]) for runs in rounds), 4)


def _figures(rounds: Sequence[Round], mode: str, baseline: str) -> Figures:
    per_round = [_round_figures(runs[mode], runs[baseline]) for runs in rounds]
    figures: Figures = {key: _median([row[key] for row in per_round]) for key in per_round[0]}
    whole = [turn.stats for runs in rounds for turn in _turns(runs[mode])]
    heads = sorted({head for stats in whole for head in stats.reached})
    tested = {head: sum(stats.reached[head] for stats in whole) for head in heads}
    return figures | {
        "head_acceptance": {
            str(head): round(sum(stats.accepted[head] for stats in whole) / tested[head], 4)
            for head in heads
        },
        "new_tokens": sum(stats.new_tokens for stats in whole),
        "prompts": len(rounds[0][mode]),
    }


def _round_figures(
    tree_runs: Sequence[Run], vanilla_runs: Sequence[Run]
) -> dict[str, float | None]:
    tree, vanilla = _turns(tree_runs), _turns(vanilla_runs)
    step, vanilla_step = _step(tree), _step(vanilla)
    rate, vanilla_rate = _rate(tree), _rate(vanilla)
    tree_steps = sum(turn.stats.tree_steps for turn in tree)
    return {
        "acceptance_length": _over(sum(turn.stats.tree_tokens for turn in tree), tree_steps),
        "overhead": _over(step, vanilla_step),
        "speedup": _over(rate, vanilla_rate),
        "tokens_per_second": rate,
        "vanilla_tokens_per_second": vanilla_rate,
        "wall_tokens_per_second": _wall_rate(tree_runs),
        "step_ms": step and 1000 * step,
        "vanilla_step_ms": vanilla_step and 1000 * vanilla_step,
        "time_to_first_token_ms": 1000 * median(turn.first for turn in tree),
    }


def _turn_figures(rounds: Sequence[Round], mode: str, number: int) -> Figures:
    """The turn of that number, over all conversations that have it."""
    turns = [run.turns[number] for runs in rounds for run in runs[mode] if number < len(run.turns)]
    return {
        "conversations": len(turns) // len(rounds),
        "time_to_first_token_ms": round(1000 * median(turn.first for turn in turns), 4),
        "prefilled_tokens": round(median(turn.prefilled for turn in turns)),
    }


def _of_category(runs: Round, category: str) -> Round:
    return {way: [run for run in found if run.category == category] for way, found in runs.items()}


def _turns(runs: Sequence[Run]) -> list[Turn]:
    return [turn for run in runs for turn in run.turns]


def _step(turns: Sequence[Turn]) -> float | None:
    """Median over replies of a reply's median step; None if no reply took any."""
    found = (turn.stats.tree_step_seconds or turn.stats.vanilla_step_seconds for turn in turns)
    return _median([seconds for seconds in found if seconds], digits=9)


def _rate(turns: Sequence[Turn]) -> float | None:
    """New tokens per second inside the engine, prefill aside."""
    return _over(
        sum(turn.stats.new_tokens for turn in turns), sum(turn.stats.seconds for turn in turns)
    )


def _wall_rate(runs: Sequence[Run]) -> float:
    turns = _turns(runs)
    return sum(turn.stats.new_tokens for turn in turns) / sum(turn.wall for turn in turns)


def _over(value: float | None, other: float | None) -> float | None:
    return value / other if value is not None and other else None


def _median(values: Sequence[float | None], digits: int = 4) -> float | None:
    """Of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return round(median(known), digits) if known else None
