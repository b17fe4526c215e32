"""Tokens/s of torch's step with and without another busy program, for ways in which threads wait.

    python benchmarks/busy.py [NAME=VALUE ...]

Each argument is a setting of the environment to measure, such as GOMP_SPINCOUNT=10000; `default`
is what `medusa-chat` sets, and `none` sets nothing. The busy program is an endless loop on one
core. The result is a line of JSON for each setting. The model is the bundled one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from statistics import median

SECONDS = 4.0  # of decoding in each run
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
PROMPT = "Tell me a fairy tale about a river and a miller's daughter."


def main() -> None:
    for setting in sys.argv[1:] or ["none", "default"]:
        quiet = measured(setting)
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
            crowded = measured(setting)
            busy.kill()
        print(json.dumps({"setting": setting, "quiet": quiet, "busy": crowded}), flush=True)


def measured(setting: str) -> float:
    """Tokens/s of a new process with a setting."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    if "=" in setting:
        name, value = setting.split("=", 1)
        environment[name] = value
    command = [sys.executable, __file__, "--one", setting]
    return float(subprocess.check_output(command, env=environment, text=True))


def one(setting: str) -> float:
    """Tokens/s of this process: the median of replies, the first one left out."""
    if setting == "default":
        from medusa_chat.machine.openmp import let_threads_sleep

        let_threads_sleep()
    import medusa_chat

    engine = medusa_chat.load(engine="torch", tree="dynamic-16", probing=False)
    sampling = medusa_chat.Sampling(max_new_tokens=64, ignore_eos=True)
    rates = []
    until = time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        engine.forget()
        steps = list(engine.generate([{"role": "user", "content": PROMPT}], sampling))
        rates.append(sum(len(s.tokens) for s in steps) / sum(step.seconds for step in steps))
    return round(median(rates[1:] or rates), 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(one(sys.argv[2]))
    else:
        main()
