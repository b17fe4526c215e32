"""How the threads of torch's operations wait for work. No torch here."""

from __future__ import annotations

import os

# Read by the OpenMP library when torch loads it. torch's wheels for Linux bring GNU's.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SPINS = 1000  # about a microsecond; GNU's default is 300,000


def let_threads_sleep() -> None:
    """Let waiting threads sleep soon, unless the user's environment says how they wait.

    Call this before torch is imported. By default threads spin while they wait, and if another
    program takes a core, a step waits for a thread that has none while the others burn theirs.
    With the bundled model on two cores and torch's step this costs a fifth of the speed where
    nothing else runs, and more than doubles it next to a busy program (benchmarks/busy.py).
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
