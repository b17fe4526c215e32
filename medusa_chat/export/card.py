"""The model card, README.md, of exported heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml
from huggingface_hub import metadata_load

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from medusa_chat.decoding.trees.accuracy import Accuracy

CARDS = ("README.md", "MODEL_CARD.md")
RANKS = (1, 2, 3, 5, 10)  # of the table of accuracies
INTRODUCTION = (
    "Heads that guess the tokens after the next one ([Medusa](https://arxiv.org/abs/2401.10774)),"
    " so that a model decodes several tokens per step. medusa-chat wrote these files, read them"
    " back, and got the same logits."
)


@dataclass(frozen=True)
class Card:
    """Contents of a model card.

    Attributes:
        base: hub id (`public`), or folder, of the backbone.
        licence: of the backbone, in words.
        licence_id: of the backbone, as its own card has it, or "".
        whole: the files hold the backbone too.
        facts: rows of the table, in order.
        use: command lines, by program.
    """

    title: str
    base: str
    public: bool
    licence: str
    licence_id: str
    whole: bool
    facts: Mapping[str, str]
    use: Mapping[str, str]
    notices: tuple[str, ...]
    accuracy: Accuracy | None

    def text(self) -> str:
        """Return the card as Markdown, with the front matter that the hub reads."""
        facts = {"base model": self.base, "licence of the base model": self.licence, **self.facts}
        front = yaml.safe_dump(self._front_matter(), sort_keys=False)
        commands = [f"{program}:\n\n```sh\n{line}\n```" for program, line in self.use.items()]
        sections = [
            f"---\n{front}---\n# {self.title}",
            INTRODUCTION,
            _table(["", ""], facts.items()),
            "\n\n".join(["## Use", *commands]),
        ]
        if self.notices:
            lines = "\n".join(f"- {line}" for line in self.notices)
            sections.append(f"## Notes\n\n{lines}")
        if self.accuracy:
            sections.append(_measured(self.accuracy))
        return "\n\n".join(sections) + "\n"

    def _front_matter(self) -> dict[str, str | list[str]]:
        front: dict[str, str | list[str]] = {}
        if self.licence_id:
            front["license"] = self.licence_id
        if self.public:
            front["base_model"] = self.base
        if self.whole:
            front["pipeline_tag"] = "text-generation"
        front["tags"] = ["medusa", "speculative-decoding"]
        return front


def licence_of(folder: Path) -> str:
    """Return the licence id in a model's own card, or "" if there is none."""
    card = card_of(folder)
    try:
        licence = (metadata_load(card) or {}).get("license") if card else ""
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return ""  # the card has no front matter that can be read
    return licence if isinstance(licence, str) else ""


def card_of(folder: Path) -> Path | None:
    """Find a model's own card."""
    files = (folder / name for name in CARDS)
    return next((file for file in files if file.is_file()), None)


def _measured(accuracy: Accuracy) -> str:
    ranks = [rank for rank in RANKS if rank <= min(accuracy.widths)]
    rows = [
        [str(head), *(f"{row[rank - 1]:.1%}" for rank in ranks)]
        for head, row in enumerate(accuracy.top, 1)
    ]
    table = _table(["head", *(f"top-{rank}" for rank in ranks)], rows)
    return (
        "## Measured\n\nHow often the model's own greedy token is among a head's likeliest guesses"
        f" (`medusa-chat calibrate`).\n\n{table}"
    )


def _table(header: list[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
