"""LoopGuard: notices a reply that says the same again and again. No torch here."""

from __future__ import annotations

REPEATS = 4  # of a block, at least
LONGEST = 128  # tokens of a block
# Tokens that the repeats have together, at least. Tables, rules and arrays of one number repeat few
# different tokens for long; sentences do not repeat by intention (docs/chat.md, "Loops").
VARIED = 8  # different tokens in a block that says something
VARIED_SPAN = 120
UNIFORM_SPAN = 300
EVERY = 16  # tokens between two looks


class LoopGuard:
    """Takes a reply's tokens one by one. What it finds depends on the tokens alone."""

    def __init__(self) -> None:
        self._ids: list[int] = []

    def loops(self, token: int) -> bool:
        """Add a token; tell if the reply now ends in one block of tokens again and again."""
        self._ids.append(token)
        if len(self._ids) % EVERY:
            return False
        longest = min(LONGEST, len(self._ids) // REPEATS)
        return any(map(self._repeats, range(1, longest + 1)))

    def _repeats(self, length: int) -> bool:
        """Tell if the reply ends in repeats of a block of that length."""
        ids = self._ids
        if ids[-1] != ids[-1 - length] or ids[-2] != ids[-2 - length]:
            return False
        varied = len(set(ids[-length:])) >= VARIED
        span = max(VARIED_SPAN if varied else UNIFORM_SPAN, REPEATS * length)
        return len(ids) >= span and ids[-span:-length] == ids[length - span :]
