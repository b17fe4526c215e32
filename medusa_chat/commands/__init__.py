"""The sub-commands of `medusa-chat`: one module each, with `add_flags` and `run`.

chat.py       talk to a model, or answer one prompt
race.py       with heads against without, side by side
prompt.py     the prompt of a command that answers once
bench.py      measure speed              verify.py     compare replies of two ways to decode
train.py      train heads                distill.py    let the model answer prompts
calibrate.py  measure heads' accuracies  export.py     write heads for other programs
models.py     list known models          catalogue.py  sizes and accuracies of that list
doctor.py     examine this machine       device_findings.py  what it says of devices
flags.py      flags that several sub-commands share
open_chat.py  open the chat              completion.py scripts for shells

A module's docstring is its help text, and `add_flags` and `run` import nothing heavy by
themselves: `--help` answers without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from medusa_chat.commands import (
    bench,
    calibrate,
    chat,
    distill,
    doctor,
    export,
    models,
    race,
    train,
    verify,
)

if TYPE_CHECKING:
    import argparse


class Command(Protocol):
    """A module that is a sub-command. The first line of its docstring is the help text."""

    __doc__: str | None

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        """Add the flags of this sub-command."""

    def run(self, options: argparse.Namespace) -> int:
        """Do it; returns the exit status."""


COMMANDS: dict[str, Command] = {
    "chat": chat,
    "race": race,
    "bench": bench,
    "verify": verify,
    "train": train,
    "distill": distill,
    "calibrate": calibrate,
    "export": export,
    "models": models,
    "doctor": doctor,
}
