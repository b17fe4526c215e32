"""The README.md that travels with exported heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml
from huggingface_hub import metadata_load

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from medusa_chat.decoding.trees.accuracy import Accuracy


@dataclass(frozen=True)
class Card:
    """What a model card tells.

    Attributes:
        base: hub id, or folder, of the backbone; `public` if it is an id.
        licence: of the backbone, in words; licence_id: as its own card tells it, or "".
        facts: rows of the table, in order.
        use: command lines, by program.
        notices: what a user should know, a line each.
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
        """Markdown, with the front matter that the hub reads."""
        front = {
            **({"license": self.licence_id} if self.licence_id else {}),
            **({"base_model": self.base} if self.public else {}),
            **({"pipeline_tag": "text-generation"} if self.whole else {}),
            "tags": ["medusa", "speculative-decoding"],
        }
        facts = {"base model": self.base, "licence of the base model": self.licence, **self.facts}
        sections = [
            f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n# {self.title}",
            "Heads that guess the tokens after the next one ([Medusa](https://arxiv.org/abs/2401.10774)), so that a"
            " model decodes several tokens per step. Written by medusa-chat; reading the files back gave the same"
            " logits.",
            _table(["", ""], facts.items()),
            "## Use\n\n"
            + "\n\n".join(
                f"{program}:\n\n```sh\n{line}\n```" for program, line in self.use.items()
            ),
        ]
        if self.notices:
            sections.append("## To know\n\n" + "\n".join(f"- {line}" for line in self.notices))
        if self.accuracy:
            sections.append(_measured(self.accuracy))
        return "\n\n".join(sections) + "\n"


def licence_of(folder: Path) -> str:
    """The licence id that a model's own card tells the hub, or ""."""
    card = card_of(folder)
    try:
        told = (metadata_load(card) or {}).get("license") if card else ""
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return ""  # no card that a program can read
    return told if isinstance(told, str) else ""


def card_of(folder: Path) -> Path | None:
    """A model's own card."""
    return next(
        (folder / name for name in ("README.md", "MODEL_CARD.md") if (folder / name).is_file()),
        None,
    )


def _measured(accuracy: Accuracy) -> str:
    ranks = [k for k in (1, 2, 3, 5, 10) if k <= min(accuracy.widths)]
    rows = [
        [str(k), *(f"{row[rank - 1]:.1%}" for rank in ranks)]
        for k, row in enumerate(accuracy.top, 1)
    ]
    return (
        "## Measured\n\nHow often the model's own greedy token is among a head's likeliest guesses"
        " (`medusa-chat calibrate`).\n\n"
        + _table(["head", *(f"top-{rank}" for rank in ranks)], rows)
    )


def _table(header: list[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
