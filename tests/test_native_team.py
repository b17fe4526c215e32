"""The team of threads: each unit once; safe with forks, signals, other teams, neighbours."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from medusa_chat.native import build
from tests.helpers import native_kernels as native

if TYPE_CHECKING:
    from collections.abc import Iterator

JOBS = Path(__file__).parent / "native" / "jobs.c"


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile the jobs against the library and load them."""
    made = tmp_path_factory.mktemp("jobs") / "jobs.so"
    library = native.library_path()
    compiler = build.system_compiler() or build.zig_compiler()
    assert compiler is not None
    flags = ["-std=gnu11", "-O2", "-fPIC", "-shared", "-pthread", f"-I{build.SOURCE}"]
    link = [str(library), f"-Wl,-rpath,{library.parent}"]
    subprocess.run([*compiler.command, *flags, str(JOBS), *link, "-o", str(made)], check=True)
    loaded = ctypes.CDLL(str(made))
    loaded.count_units.restype = ctypes.c_double
    return loaded


@contextmanager
def team_of(threads: int) -> Iterator[ctypes.c_void_p]:
    """Make a team and free it."""
    team = ctypes.c_void_p(native.library().mc_team_new(threads))
    assert team.value
    try:
        yield team
    finally:
        native.library().mc_team_free(team)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_every_unit_is_done_once_before_a_barrier_opens(jobs: ctypes.CDLL, threads: int) -> None:
    with team_of(threads) as team:
        assert native.library().mc_team_threads(team) == threads
        for units in (0, 1, 7, 500):
            for _ in range(20):
                assert jobs.count_units(team, 10, units, 0, None) >= 0


def test_members_share_the_work(jobs: ctypes.CDLL) -> None:
    members = (ctypes.c_int * 2)()
    with team_of(2) as team:
        assert jobs.count_units(team, 5, 200, 20_000, members) >= 0
    assert sum(members) == 1000
    assert min(members) > 50


def test_the_caller_works_alone_while_the_others_hold_it_up(jobs: ctypes.CDLL) -> None:
    """One unit a phase, which sleeps: the other member waits, as if a program had its core."""
    members = (ctypes.c_int * 8)()
    with team_of(2) as team:
        for _ in range(16):
            assert jobs.count_units(team, 20, 1, -1_000_000, None) >= 0
        for _ in range(128):
            assert jobs.count_units(team, 3, 50, 0, members) >= 0
            assert list(members[:2]) == [150, 0]
        assert jobs.count_units(team, 5, 200, 20_000, members) >= 0
        assert members[1] > 0


def test_a_team_that_slept_works_again(jobs: ctypes.CDLL) -> None:
    with team_of(2) as team:
        for _ in range(5):
            time.sleep(0.02)
            assert jobs.count_units(team, 3, 10, 0, None) >= 0


def test_two_teams_work_at_the_same_time(jobs: ctypes.CDLL) -> None:
    results: list[float] = []

    def work() -> None:
        with team_of(2) as team:
            results.extend(jobs.count_units(team, 50, 20, 1000, None) for _ in range(10))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 20
    assert min(results) >= 0


def test_no_team_is_made_of_no_threads() -> None:
    assert not native.library().mc_team_new(0)


def test_a_child_of_fork_works_alone_and_does_not_hang(jobs: ctypes.CDLL) -> None:
    with team_of(2) as team:
        assert jobs.count_units(team, 5, 10, 0, None) >= 0
        child = os.fork()
        if child == 0:
            done = jobs.count_units(team, 5, 10, 0, None)
            native.library().mc_team_free(team)
            with team_of(2) as own:
                again = jobs.count_units(own, 5, 10, 0, None)
            os._exit(0 if done >= 0 and again >= 0 else 1)
        assert _status_of(child) == 0
        assert jobs.count_units(team, 5, 10, 0, None) >= 0


def _status_of(child: int) -> int:
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


def test_signals_reach_the_main_thread_while_a_team_works(jobs: ctypes.CDLL) -> None:
    """Members take no signals (count_units checks their masks); Python's handler runs."""
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        with team_of(2) as team:
            timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            while not caught:
                assert jobs.count_units(team, 10, 10, 10_000, None) >= 0
            timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught == [signal.SIGINT]


def test_a_program_that_forgets_its_team_still_ends() -> None:
    code = "from tests.helpers import native_kernels as native\n"
    code += "print(bool(native.library().mc_team_new(2)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "True"
    assert done.returncode == 0


@pytest.mark.slow
def test_memory_and_undefined_behaviour_are_clean(tmp_path: Path) -> None:
    """Kernels over odd sizes, the team, choices of nodes: under gcc's or clang's sanitizers."""
    compiler = build.system_compiler()
    if compiler is None:
        pytest.skip("no system compiler, hence no sanitizers")
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g")
    parts = native.KERNEL_PARTS + native.CHOICE_PARTS
    library = build.build(tmp_path, compiler, flags, parts)
    link = [str(library), f"-Wl,-rpath,{tmp_path}", "-lm"]
    options = ["-std=c11", "-pthread", *flags, f"-I{build.SOURCE}"]
    for name in ("check", "check_choice"):
        program = tmp_path / name
        source = Path(__file__).parent / "native" / f"{name}.c"
        subprocess.run(
            [*compiler.command, *options, str(source), *link, "-o", str(program)], check=True
        )
        done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
