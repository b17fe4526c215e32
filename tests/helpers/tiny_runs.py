"""Training runs that last a second: a backbone's folder, conversations, and a recipe of a few steps."""

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
    """A random model whose vocabulary has room for tiny's tokenizer."""
    return save_model(place, random_model(kind, 320, pad_token_id=END, eos_token_id=END, **changes))


def write_talks(file: Path, count: int = 40, seed: int = 0) -> Path:
    """Conversations of one or two turns, a line each."""
    chance = random.Random(seed)
    lines = []
    for _ in range(count):
        turns = []
        for _ in range(chance.choice((1, 2))):
            said = [" ".join(chance.choices(WORDS, k=chance.randrange(1, 5))) for _ in range(2)]
            turns += [
                {"role": "user", "content": said[0]},
                {"role": "assistant", "content": said[1]},
            ]
        lines.append(json.dumps({"messages": turns}) + "\n")
    file.write_text("".join(lines))
    return file


def tiny_run(place: Path, out: str, name: str = "medusa1", **changes: Any) -> Run:
    """A run on `place`/backbone and `place`/talks.jsonl, which are made if need be, to `place`/`out`."""
    if not (place / "backbone").exists():
        backbone_folder(place / "backbone")
    if not (place / "talks.jsonl").exists():
        write_talks(place / "talks.jsonl")
    names = ("heads_from", "held_out", "resume")
    own: dict[str, Any] = {key: changes.pop(key) for key in names if key in changes}
    own["heads"] = own.pop("heads_from", None)
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
    """Train; returns what was shown and said."""
    steps: list[TrainStep] = []
    said: list[str] = []
    train(run, steps.append, said.append)
    return steps, said


def products(folder: Path) -> dict[str, str]:
    """Hashes of all that a run leaves for use: not its checkpoints and its log, which tells the time."""
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.startswith("training.")
    ]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
