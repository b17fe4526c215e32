"""The candidate tree of a step, drawn."""

from __future__ import annotations

from rich.text import Text
from rich.tree import Tree

from medusa_chat.events import Candidates, proposer
from medusa_chat.terminal.theme import LABEL, head_style

SHOWN_IN_FULL = 20  # nodes; a larger tree has its unaccepted branches folded
SIBLINGS = 3  # unaccepted children shown of an accepted node in a folded tree

Path = tuple[int, ...]


def draw(candidates: Candidates) -> Tree:
    """The tree from its root down. An accepted node is bold with a tick; of a large tree's others a few are shown."""
    texts = dict(zip(candidates.paths, candidates.texts, strict=True))
    accepted = {candidates.paths[row] for row in candidates.accepted}
    fold = len(texts) > SHOWN_IN_FULL
    tree = Tree(_label((), texts[()], () in accepted), guide_style=LABEL)
    _grow(tree, (), texts, accepted, fold)
    return tree


def _grow(
    branch: Tree, path: Path, texts: dict[Path, str], accepted: set[Path], fold: bool
) -> None:
    children = sorted(
        other for other in texts if len(other) == len(path) + 1 and other[:-1] == path
    )
    others = [child for child in children if child not in accepted]
    if fold:
        others = others[: SIBLINGS if path in accepted else 0]
    hidden = _descendants(path, texts)
    for child in children:
        if child in accepted or child in others:
            hidden -= 1 + _descendants(child, texts)
            node = branch.add(_label(child, texts[child], child in accepted))
            _grow(node, child, texts, accepted, fold)
    if hidden and path in accepted:
        branch.add(Text(f"… {hidden} more", LABEL))
    elif hidden and isinstance(branch.label, Text):
        branch.label.append(f"  … {hidden} more", LABEL)


def _descendants(path: Path, texts: dict[Path, str]) -> int:
    return sum(len(other) > len(path) and other[: len(path)] == path for other in texts)


def _label(path: Path, text: str, accepted: bool) -> Text:
    label = Text(visible(text), head_style(proposer(path)))
    if not accepted:
        return label
    label.stylize("bold")
    return Text.assemble(label, (" ✓", "bold"))


def visible(text: str) -> str:
    """A token's text with white space and control characters made visible."""
    shown = "".join(
        "␣" if char == " " else char if char.isprintable() else repr(char)[1:-1] for char in text
    )
    return shown or "(end or part of a character)"


def printable(text: str) -> Text:
    """Text of the user or of a file, as data: control characters made visible."""
    return Text("".join(char if char.isprintable() else repr(char)[1:-1] for char in text))
