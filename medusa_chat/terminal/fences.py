"""Fences around code in Markdown, line by line."""

from __future__ import annotations

import re

OPENING = re.compile(r" {0,3}(?P<marks>`{3,}(?=[^`]*$)|~{3,})")


class Fences:
    """Tells which lines of a growing text are code."""

    def __init__(self) -> None:
        self._marks = ""  # of the fence that is open

    @property
    def open(self) -> bool:
        """True if the next line is code, or the end of it."""
        return bool(self._marks)

    def add(self, line: str) -> None:
        """Take in the next line."""
        found = OPENING.match(line)
        if not self._marks:
            self._marks = found["marks"] if found else ""
        elif line.strip().startswith(self._marks) and not line.strip().strip(self._marks[0]):
            self._marks = ""
