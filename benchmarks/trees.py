"""Fixed against dynamic trees, with and without copies: acceptance length and speedup at 8 to 64 nodes.

    python benchmarks/trees.py --prompts VALID_PROMPTS [--limit 40] [--model NAME] [--rounds 1]

Four kinds of replies, all greedy:
- chat: the model's own, to the first two turns of each conversation;
- read back: the model's own, where the conversation's reply in the file quotes what was said before (two fifths of its
  runs of four tokens), such as a booking that is confirmed;
- repeat, edit: the reply is given, not the model's own: the text of the prompt "Repeat this text: ..." again, and
  again with every twelfth word replaced. The bundled model cannot do either when it is asked to. Steps accept what
  the given text says; trees, heads and copies are what they would be for a model that writes it.

Each prompt is answered in every way, one after the other, after a vanilla reply that the speedup compares with.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

import medusa_chat
from medusa_chat.config import Sampling
from medusa_chat.decoding import engine as engine_module
from medusa_chat.decoding.acceptance import Numbers, Rule, TreeTensors, Verdict, greedy
from medusa_chat.machine.devices import device_name
from medusa_chat.prompts import Prompt, read_prompts
from medusa_chat.stats import Stats

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from medusa_chat.decoding.engine import Engine

SIZES = (8, 16, 32, 64)
WAYS = [
    (f"{kind}-{nodes}", copies)
    for nodes in SIZES
    for kind in ("static", "dynamic")
    for copies in (False, True)
]
QUOTED, RUN = 0.4, 4  # share of a reply's runs of RUN tokens that stand before it already
REPLACED = 12  # of so many words one is another in an edited text
SHORTEST, LONGEST = 24, 160  # tokens of a text that is repeated


@dataclass(frozen=True)
class Task:
    """Ids of a prompt, and the reply where it is given."""

    prompt: list[int]
    reply: list[int] | None = None


def main() -> None:
    options = parse()
    engine = medusa_chat.load(
        options.model, options.heads, tree="static-16", probing=False, copies=False
    )
    prompts = read_prompts(options.prompts, None)
    found = {}
    for name, tasks in workloads(engine, prompts, options.limit).items():
        print(f"{name}: {len(tasks)} replies", file=sys.stderr)
        found[name] = (
            measure(engine, tasks, options.max_new_tokens, options.rounds) if tasks else {}
        )
    show(found)
    device = device_name(engine.backbone.device)
    print(
        json.dumps(
            {"device": device, "model": engine.name, "torch": torch.__version__, "trees": found}
        )
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--prompts", type=Path, nargs="+", required=True, help="files of conversations"
    )
    parser.add_argument("--limit", type=int, default=40, help="replies of each kind")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--model")
    parser.add_argument("--heads")
    return parser.parse_args()


def workloads(engine: Engine, prompts: Sequence[Prompt], limit: int) -> dict[str, list[Task]]:
    """Up to `limit` replies of each kind."""
    texts = [message["content"] for prompt in prompts for message in prompt.reference]
    sized = [text for text in texts if SHORTEST <= len(tokens_of(engine, text)) <= LONGEST]
    sized = sized[:: max(len(sized) // limit, 1)][:limit]
    return {
        "chat": [Task(engine.encode(prompt.opening())) for prompt in prompts[:limit]],
        "read back": list(read_back(engine, prompts))[:limit],
        "repeat": [given(engine, text, text) for text in sized],
        "edit": [given(engine, text, edited(text)) for text in sized],
    }


def read_back(engine: Engine, prompts: Sequence[Prompt]) -> Iterator[Task]:
    """Conversations up to a reply that quotes them."""
    for prompt in prompts:
        for i in range(1, len(prompt.reference), 2):
            before = [*prompt.reference[:i]]
            known, reply = (
                runs(engine, " ".join(m["content"] for m in before)),
                runs(engine, " " + prompt.reference[i]["content"]),
            )
            if len(reply) >= 2 * RUN and sum(run in set(known) for run in reply) >= QUOTED * len(
                reply
            ):
                yield Task(engine.encode(before))
                break


def runs(engine: Engine, text: str) -> list[tuple[int, ...]]:
    ids = tokens_of(engine, text)
    return [tuple(ids[place : place + RUN]) for place in range(len(ids) - RUN + 1)]


def tokens_of(engine: Engine, text: str) -> list[int]:
    ids: list[int] = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def given(engine: Engine, text: str, reply: str) -> Task:
    return Task(
        engine.encode([{"role": "user", "content": f"Repeat this text: {text}"}]),
        tokens_of(engine, reply),
    )


def edited(text: str) -> str:
    words = text.split(" ")
    return " ".join(
        "something" if place % REPLACED == REPLACED - 1 else word
        for place, word in enumerate(words)
    )


@dataclass(frozen=True)
class Following(Rule):
    """A rule that accepts a given text, whatever the backbone thinks of it."""

    text: Tensor

    def __call__(
        self, logits: Tensor, candidates: Tensor, tree: TreeTensors, position: int | Tensor
    ) -> Verdict:
        """Accept the candidates that are the text's tokens."""
        places = (tree.depths + position + 1).clamp(max=len(self.text) - 1)
        wanted = functional.one_hot(self.text.to(logits.device)[places], logits.shape[-1])
        return greedy(wanted, candidates, tree)


def following(text: list[int]) -> Following:
    return Following("greedy", Numbers.of(Sampling()), torch.tensor(text + [0] * 64))


def answered(engine: Engine, task: Task, mode: str, max_new_tokens: int) -> Stats:
    """One reply, prefilled anew."""
    engine.forget()
    if task.reply is None:
        return Stats.of(
            engine.generate(
                task.prompt, Sampling(max_new_tokens=max_new_tokens).with_value("mode", mode)
            )
        )
    sampling = Sampling(max_new_tokens=len(task.reply), ignore_eos=True).with_value("mode", mode)
    with patch.object(
        engine_module, "make_rule", lambda sampling: following(task.prompt + task.reply)
    ):
        return Stats.of(engine.generate(task.prompt, sampling))


def measure(
    engine: Engine, tasks: list[Task], max_new_tokens: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Acceptance length and speedup of each way, over all tasks and rounds together."""
    totals: dict[str, list[Stats]] = {}
    for task in [*tasks] * rounds:
        totals.setdefault("vanilla", []).append(answered(engine, task, "vanilla", max_new_tokens))
        for tree, copies in WAYS:
            engine.trees.use(tree)
            engine.trees.use_copies(copies)
            name = f"{tree} copies" if copies else tree
            totals.setdefault(name, []).append(answered(engine, task, "greedy", max_new_tokens))
    vanilla = pace(totals.pop("vanilla"))
    return {name: figures(stats, vanilla) for name, stats in totals.items()}


def pace(stats: list[Stats]) -> float:
    return sum(each.new_tokens for each in stats) / sum(each.seconds for each in stats)


def figures(stats: list[Stats], vanilla: float) -> dict[str, float]:
    length = sum(each.tree_tokens for each in stats) / sum(each.tree_steps for each in stats)
    return {"acceptance_length": round(length, 3), "speedup": round(pace(stats) / vanilla, 3)}


def show(found: dict[str, dict[str, dict[str, float]]]) -> None:
    table = Table(
        "tree", "copies", *(f"{name}: {what}" for name in found for what in ("length", "speedup"))
    )
    for tree, copies in WAYS:
        rows = [ways.get(f"{tree} copies" if copies else tree, {}) for ways in found.values()]
        cells = [
            f"{row[key]:.2f}" for row in rows for key in ("acceptance_length", "speedup") if row
        ]
        table.add_row(tree, "on" if copies else "off", *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    sys.exit(main())
