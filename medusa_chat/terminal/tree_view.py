"""A step's candidate tree, drawn."""

from __future__ import annotations

from dataclasses import dataclass

from rich.text import Text
from rich.tree import Tree

from medusa_chat.events import Candidates, proposer
from medusa_chat.terminal.theme import LABEL, head_style
from medusa_chat.terminal.wrapping import escape_controls

SHOWN_IN_FULL = 20  # nodes; a larger tree has its rejected branches folded
SIBLINGS = 3  # rejected children shown of an accepted node in a folded tree

Path = tuple[int, ...]


def draw(candidates: Candidates) -> Tree:
    """Draw a tree from its root down; accepted nodes are bold with a tick."""
    texts = dict(zip(candidates.paths, candidates.texts, strict=True))
    accepted = {candidates.paths[node] for node in candidates.accepted}
    drawing = _Drawing(texts, accepted)
    tree = Tree(drawing.label(()), guide_style=LABEL)
    drawing.grow(tree, ())
    return tree


@dataclass(frozen=True)
class _Drawing:
    texts: dict[Path, str]
    accepted: set[Path]

    def grow(self, branch: Tree, path: Path) -> None:
        """Add the children of a node, and count those that are folded away."""
        hidden = self._descendants(path)
        for child in self._shown_children(path):
            hidden -= 1 + self._descendants(child)
            self.grow(branch.add(self.label(child)), child)
        if hidden and path in self.accepted:
            branch.add(Text(f"… {hidden} more", LABEL))
        elif hidden and isinstance(branch.label, Text):
            branch.label.append(f"  … {hidden} more", LABEL)

    def label(self, path: Path) -> Text:
        shown = escape_controls(self.texts[path]).replace(" ", "␣")
        label = Text(shown or "(end or part of a character)", head_style(proposer(path)))
        if path not in self.accepted:
            return label
        label.stylize("bold")
        return Text.assemble(label, (" ✓", "bold"))

    def _shown_children(self, path: Path) -> list[Path]:
        children = sorted(other for other in self.texts if other and other[:-1] == path)
        if len(self.texts) <= SHOWN_IN_FULL:
            return children
        rejected = [child for child in children if child not in self.accepted]
        kept = rejected[: SIBLINGS if path in self.accepted else 0]
        return [child for child in children if child in self.accepted or child in kept]

    def _descendants(self, path: Path) -> int:
        depth = len(path)
        return sum(len(other) > depth and other[:depth] == path for other in self.texts)
