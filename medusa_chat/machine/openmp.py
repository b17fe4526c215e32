"""How the threads of torch's operations wait for work. No torch here."""

from __future__ import annotations

import os

# Read by the OpenMP library when torch loads it: GNU's, which torch's wheels for Linux bring, and
# LLVM's or Intel's on other systems.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def let_threads_sleep() -> None:
    """Let waiting threads sleep soon, unless the user's environment says how they wait.

    Call this before torch is imported. By default threads spin while they wait, and if another
    program takes a core, a step waits for a thread that has none while the others burn theirs.
    benchmarks/busy.py measures it.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
