"""Real processes and real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from llmserve.engine import parent_watch as module
from llmserve.engine import run_folder
from llmserve.engine.parent_watch import ParentWatch
from tests import tied

if TYPE_CHECKING:
    import multiprocessing
    from collections.abc import Iterator
    from pathlib import Path

WITHIN_S = 60.0  # a kernel's signal comes at once; machines can be slow


@pytest.fixture
def tether() -> Iterator[ParentWatch]:
    made = ParentWatch()
    yield made
    made.cut()


def ends(pids: list[int]) -> bool:
    alive: list[psutil.Process] = []
    for pid in pids:
        try:
            alive.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    running = [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]
    return not psutil.wait_procs(running, timeout=WITHIN_S)[1]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize(("kind", "pids"), [("slow", 1), ("busy", 2)])
def test_tether_server_killed_ends_engines_and_workers(
    kind: str, pids: int, how: signal.Signals
) -> None:
    line = [sys.executable, "-m", "tests.tied", kind]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = [int(pid) for _ in range(2) for pid in server.stdout.readline().split()]
        left = [
            each.pid for each in psutil.Process(server.pid).children() if each.name() == "sleep"
        ]
        try:
            assert len(found) == 2 * pids
            server.send_signal(how)
            assert ends(found)
        finally:
            for pid in left:
                os.kill(pid, signal.SIGKILL)


def test_tether_cut_ends_its_engine_and_no_other(tether: ParentWatch) -> None:
    other = ParentWatch()
    mine, others = tied.start(tether), tied.start(other)
    tether.cut()
    mine.join(WITHIN_S)
    assert mine.exitcode == -signal.SIGKILL
    assert others.is_alive()
    other.cut()
    others.join(WITHIN_S)
    assert others.exitcode == -signal.SIGKILL


def test_tether_cut_before_a_start_starts_nothing(tether: ParentWatch) -> None:
    tether.cut()
    with pytest.raises(RuntimeError, match="the start was ended"):
        tied.start(tether)
    assert tether.pids == []


def test_tether_cut_during_a_start_ends_it(tether: ParentWatch) -> None:
    """Between the check and the new process: in multiprocessing's own code."""
    process = tied.spawn.Process(target=tied.sleeper, args=())
    knot = module._Knot()
    process._config["llmserve.engine.parent_watch"] = knot  # type: ignore[attr-defined]
    token = module._tying.set(tether)
    try:
        process._args = (_Cutting(tether),)  # type: ignore[attr-defined]
        process.start()
    finally:
        module._tying.reset(token)
    process.join(WITHIN_S)
    assert process.exitcode == -signal.SIGKILL


class _Cutting:
    """Pickled after the tie is checked and before the process exists."""

    def __init__(self, tether: ParentWatch) -> None:
        self.tether = tether

    def __reduce__(self) -> tuple[type[tuple[int]], tuple[()]]:
        self.tether.cut()
        return tuple, ()


def test_tether_that_is_garbage_is_cut() -> None:
    process = tied.start(ParentWatch())
    process.join(WITHIN_S)
    assert process.exitcode == -signal.SIGKILL


def test_tether_ties_its_own_thread_s_processes_only(tether: ParentWatch) -> None:
    started: list[multiprocessing.process.BaseProcess] = []

    def untied() -> None:
        started.append(tied.spawn.Process(target=tied.sleeper))
        started[0].start()

    with tether.tying():
        thread = threading.Thread(target=untied)
        thread.start()
        thread.join()
    tether.cut()
    assert tether.pids == []
    assert started[0].exitcode is None
    started[0].kill()
    started[0].join()


def test_tether_tells_the_pids_of_what_it_started(tether: ParentWatch) -> None:
    processes = [tied.start(tether) for _ in range(2)]
    assert tether.pids == [each.pid for each in processes]


def test_tether_leaves_no_descriptor_open() -> None:
    before = psutil.Process().num_fds()
    for _ in range(20):
        ParentWatch().cut()
    assert psutil.Process().num_fds() == before


def test_tether_without_the_kernel_s_signal_ends_its_engine() -> None:
    """As on a system that has none."""
    code = (
        "import fcntl; del fcntl.F_SETSIG\n"
        "import os, time; from types import SimpleNamespace\n"
        "from llmserve.engine import parent_watch\n"
        "parent_watch._tie(SimpleNamespace(detach=lambda: 0)); print('tied', flush=True)\n"
        "time.sleep(600)"
    )
    line = [sys.executable, "-c", code]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"tied\n"
        process.stdin.close()
        assert process.wait(WITHIN_S) == -signal.SIGKILL


def test_tether_s_processes_and_those_below_mark_themselves(
    tether: ParentWatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they begin, before anything of vLLM's is imported there."""
    folder = tmp_path / "llmserve-1"
    folder.mkdir()
    (folder / "lock").touch()
    monkeypatch.setenv(run_folder.SOCKETS, str(folder))
    process = tied.start(tether)
    assert process.pid is not None
    below = psutil.Process(process.pid)
    while len(pids := [each for each in folder.iterdir() if each.name.isdecimal()]) < 2:
        assert below.is_running()
        time.sleep(0.01)
    assert {int(each.name) for each in pids} == {
        process.pid,
        *(each.pid for each in below.children() if "resource_tracker" not in str(each.cmdline())),
    }
