"""Compare fixed and dynamic trees, with and without copies, at 8 to 64 nodes.

    python benchmarks/trees.py [--prompts FILES] [--limit 40] [--model NAME] [--rounds 1]

Four kinds of replies, all greedy:
- chat: the model's own reply to the first turn of each conversation;
- read back: the model's own reply where the conversation's reply in the file quotes earlier text
  (two fifths of its runs of four tokens), such as a booking that is confirmed;
- repeat, edit: the reply is given: the text of the prompt "Repeat this text: ..." again, and again
  with every twelfth word replaced. The bundled model can do neither when it is asked to. Steps
  accept the given text; trees, heads and copies are those of a model that writes it.

The prompts of `medusa-chat bench`, which are the default, have no replies, so that only `chat` is
measured with them. For the other kinds name files of whole conversations ("messages").

Each prompt is answered in every way, one after the other, after a vanilla reply as the baseline.
`throughput_ratio` is tokens/s over those of vanilla decoding.
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
from medusa_chat.config import SHIPPED_PROMPTS
from medusa_chat.decoding.acceptance import Rule, TreeTensors, Verdict, greedy, make_rule
from medusa_chat.machine.devices import device_name
from medusa_chat.prompts import Prompt, read_prompts
from medusa_chat.sampling import Sampling
from medusa_chat.stats import Stats

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from medusa_chat.decoding.engine import Engine

SIZES = (8, 16, 32, 64)
QUOTED = 0.4  # smallest share of a reply's runs of tokens that occur in earlier text
RUN_TOKENS = 4
REPLACED = 12  # one of so many words is replaced in an edited text
SHORTEST = 24  # tokens of a text to repeat
LONGEST = 160

Figures = dict[str, dict[str, float]]  # by way


@dataclass(frozen=True)
class Way:
    """A tree, with copies or without."""

    tree: str
    copies: bool

    @property
    def name(self) -> str:
        return f"{self.tree} copies" if self.copies else self.tree


WAYS = [
    Way(f"{kind}-{nodes}", copies)
    for nodes in SIZES
    for kind in ("static", "dynamic")
    for copies in (False, True)
]


@dataclass(frozen=True)
class Task:
    """Ids of a prompt, and of the reply if it is given."""

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
        if tasks:
            found[name] = measure(engine, tasks, options.max_new_tokens, options.rounds)
    show(found)
    result = {"device": device_name(engine.backbone.device), "model": engine.name}
    print(json.dumps(result | {"torch": torch.__version__, "trees": found}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--prompts", type=Path, nargs="+", default=[SHIPPED_PROMPTS], help="files of conversations"
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
            before = list(prompt.reference[:i])
            earlier = runs(engine, " ".join(message["content"] for message in before))
            reply = runs(engine, " " + prompt.reference[i]["content"])
            quoted = sum(run in set(earlier) for run in reply)
            if len(reply) >= 2 * RUN_TOKENS and quoted >= QUOTED * len(reply):
                yield Task(engine.encode(before))
                break


def runs(engine: Engine, text: str) -> list[tuple[int, ...]]:
    """All runs of RUN_TOKENS tokens in a text."""
    ids = tokens_of(engine, text)
    return [tuple(ids[i : i + RUN_TOKENS]) for i in range(len(ids) - RUN_TOKENS + 1)]


def tokens_of(engine: Engine, text: str) -> list[int]:
    ids: list[int] = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def given(engine: Engine, text: str, reply: str) -> Task:
    prompt = engine.encode([{"role": "user", "content": f"Repeat this text: {text}"}])
    return Task(prompt, tokens_of(engine, reply))


def edited(text: str) -> str:
    words = text.split(" ")
    words[REPLACED - 1 :: REPLACED] = ["something"] * (len(words) // REPLACED)
    return " ".join(words)


@dataclass(frozen=True)
class Following(Rule):
    """A rule that accepts the given text, whatever the backbone computes."""

    text: tuple[int, ...] = ()

    def first(self, _logits: Tensor, position: int) -> int:
        """Return the token behind the prompt."""
        return self.text[position + 1]

    def __call__(
        self, logits: Tensor, candidates: Tensor, tree: TreeTensors, position: int | Tensor
    ) -> Verdict:
        """Accept candidates that are the text's."""
        known = torch.tensor([*self.text, *[0] * 64], device=logits.device)
        places = (tree.depths + position + 1).clamp(max=len(known) - 1)
        return greedy(functional.one_hot(known[places], logits.shape[-1]), candidates, tree)


def following(text: list[int]) -> Rule:
    """Make a rule that accepts the given text; no step decides for itself what is greedy."""
    return Following("exact", make_rule(Sampling()).numbers, text=tuple(text))


def answered(engine: Engine, task: Task, mode: str, max_new_tokens: int) -> Stats:
    """Decode one reply after a prefill of its whole prompt."""
    engine.forget()
    if task.reply is None:
        sampling = Sampling(max_new_tokens=max_new_tokens).with_value("mode", mode)
        return Stats.of(engine.generate(task.prompt, sampling))
    sampling = Sampling(max_new_tokens=len(task.reply), ignore_eos=True).with_value("mode", mode)
    rule = following(task.prompt + task.reply)
    with patch.object(engine.runner, "begin", lambda _prompt, _sampling: rule):
        return Stats.of(engine.generate(task.prompt, sampling))


def measure(engine: Engine, tasks: list[Task], max_new_tokens: int, rounds: int) -> Figures:
    """Acceptance length and throughput ratio of each way, over all tasks and rounds."""
    vanilla: list[Stats] = []
    by_way: dict[str, list[Stats]] = {way.name: [] for way in WAYS}
    for task in tasks * rounds:
        vanilla.append(answered(engine, task, "vanilla", max_new_tokens))
        for way in WAYS:
            engine.trees.use(way.tree)
            engine.trees.use_copies(way.copies)
            by_way[way.name].append(answered(engine, task, "greedy", max_new_tokens))
    baseline = rate(vanilla)
    return {name: figures(stats, baseline) for name, stats in by_way.items()}


def rate(stats: list[Stats]) -> float:
    """Tokens per second over all replies."""
    return sum(each.new_tokens for each in stats) / sum(each.seconds for each in stats)


def figures(stats: list[Stats], vanilla: float) -> dict[str, float]:
    length = sum(each.tree_tokens for each in stats) / sum(each.tree_steps for each in stats)
    ratio = rate(stats) / vanilla
    return {"acceptance_length": round(length, 3), "throughput_ratio": round(ratio, 3)}


def show(found: dict[str, Figures]) -> None:
    columns = [f"{name}: {figure}" for name in found for figure in ("length", "tokens/s ratio")]
    table = Table("tree", "copies", *columns)
    for way in WAYS:
        cells = [f"{value:.2f}" for by_way in found.values() for value in by_way[way.name].values()]
        table.add_row(way.tree, "on" if way.copies else "off", *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    sys.exit(main())
