"""Training runs of a second: a backbone's folder, conversations, a recipe of a few steps."""

from __future__ import annotations

import hashlib
import json
import random
from typing import TYPE_CHECKING, Any

from medusa_chat.config import make_recipe
from medusa_chat.training.trainer import Run, train
from tests.helpers.tiny import END, random_model, save_model

if TYPE_CHECKING:
    from pathlib import Path

    from medusa_chat.events import TrainStep

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "nine", "red", "birds", "fly", "past"]


def backbone_folder(place: Path, kind: str = "llama", **changes: Any) -> Path:
    """Save a random model whose vocabulary holds that of tiny's tokenizer."""
    return save_model(place, random_model(kind, 320, pad_token_id=END, eos_token_id=END, **changes))


def write_talks(file: Path, count: int = 40, seed: int = 0) -> Path:
    """Write conversations of one or two turns, one on each line."""
    chance = random.Random(seed)
    lines = []
    for _ in range(count):
        turns = []
        for _ in range(chance.choice((1, 2))):
            words = [" ".join(chance.choices(WORDS, k=chance.randrange(1, 5))) for _ in range(2)]
            turns += [
                {"role": "user", "content": words[0]},
                {"role": "assistant", "content": words[1]},
            ]
        lines.append(json.dumps({"messages": turns}) + "\n")
    file.write_text("".join(lines))
    return file


def tiny_run(place: Path, out: str, name: str = "medusa1", **changes: Any) -> Run:
    """A run from `place`/backbone and `place`/talks.jsonl, made if needed, to `place`/`out`."""
    if not (place / "backbone").exists():
        backbone_folder(place / "backbone")
    if not (place / "talks.jsonl").exists():
        write_talks(place / "talks.jsonl")
    own: dict[str, Any] = {"heads": changes.pop("heads_from", None)}
    own |= {key: changes.pop(key) for key in ("held_out", "resume") if key in changes}
    settings = {
        "heads": 2,
        "max_steps": 10,
        "length": 32,
        "batch_size": 2,
        "warmup_steps": 2,
        "save_steps": 4,
        "logging_steps": 2,
        "lora_rank": 2,
    }
    recipe = make_recipe(name, **settings | changes)
    return Run(str(place / "backbone"), (place / "talks.jsonl",), place / out, recipe, **own)


def do(run: Run) -> tuple[list[TrainStep], list[str]]:
    """Train; returns the progress and the lines for the user."""
    steps: list[TrainStep] = []
    lines: list[str] = []
    train(run, steps.append, lines.append)
    return steps, lines


def products(folder: Path) -> dict[str, str]:
    """Hashes of a run's results, without its checkpoints and its log, which contains times."""
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest()
        for name, file in sorted(files.items())
        if not name.startswith(("training.", "checkpoints/"))
    }


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
