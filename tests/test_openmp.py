"""How torch's threads wait: chosen before torch is imported, and a user's own choice stays."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from medusa_chat.machine.openmp import WAITING, let_threads_sleep

LOOK = """
import sys, medusa_chat.cli as cli
cli.make_parser = lambda: sys.exit(f"{'torch' in sys.modules} {cli.os.environ['GOMP_SPINCOUNT']}")
cli.main(["models"])
"""


def test_every_command_chooses_before_torch_is_imported() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    done = subprocess.run(
        [sys.executable, "-c", LOOK], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == "False 1000\n"


@pytest.mark.parametrize("name", WAITING)
def test_the_users_own_choice_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in WAITING:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "7")
    let_threads_sleep()
    assert {each: os.environ.get(each) for each in WAITING} == dict.fromkeys(WAITING) | {name: "7"}
