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
from tests import watched_server

if TYPE_CHECKING:
    import multiprocessing
    from collections.abc import Iterator
    from pathlib import Path

WITHIN_S = 60.0  # a kernel's signal comes at once; machines can be slow


@pytest.fixture
def watch() -> Iterator[ParentWatch]:
    made = ParentWatch()
    yield made
    made.kill()


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
def test_watch_server_killed_ends_engines_and_workers(
    kind: str, pids: int, how: signal.Signals
) -> None:
    line = [sys.executable, "-m", "tests.watched_server", kind]
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


def test_watch_killed_ends_its_engine_and_no_other(watch: ParentWatch) -> None:
    other = ParentWatch()
    mine, others = watched_server.start(watch), watched_server.start(other)
    watch.kill()
    mine.join(WITHIN_S)
    assert mine.exitcode == -signal.SIGKILL
    assert others.is_alive()
    other.kill()
    others.join(WITHIN_S)
    assert others.exitcode == -signal.SIGKILL


def test_watch_killed_before_a_start_starts_nothing(watch: ParentWatch) -> None:
    watch.kill()
    with pytest.raises(RuntimeError, match="the start was cancelled"):
        watched_server.start(watch)
    assert watch.pids == []


def test_watch_killed_during_a_start_ends_it(watch: ParentWatch) -> None:
    """Between the check and the new process: in multiprocessing's own code."""
    process = watched_server.spawn.Process(target=watched_server.sleeper, args=())
    hook = module._StartHook()
    process._config["llmserve.engine.parent_watch"] = hook  # type: ignore[attr-defined]
    token = module._active.set(watch)
    try:
        process._args = (_Killing(watch),)  # type: ignore[attr-defined]
        process.start()
    finally:
        module._active.reset(token)
    process.join(WITHIN_S)
    assert process.exitcode == -signal.SIGKILL


class _Killing:
    """Pickled after the watch is checked and before the process exists."""

    def __init__(self, watch: ParentWatch) -> None:
        self.watch = watch

    def __reduce__(self) -> tuple[type[tuple[int]], tuple[()]]:
        self.watch.kill()
        return tuple, ()


def test_watch_that_is_garbage_is_killed() -> None:
    process = watched_server.start(ParentWatch())
    process.join(WITHIN_S)
    assert process.exitcode == -signal.SIGKILL


def test_watch_covers_its_own_thread_s_processes_only(watch: ParentWatch) -> None:
    started: list[multiprocessing.process.BaseProcess] = []

    def unwatched() -> None:
        started.append(watched_server.spawn.Process(target=watched_server.sleeper))
        started[0].start()

    with watch.watching():
        thread = threading.Thread(target=unwatched)
        thread.start()
        thread.join()
    watch.kill()
    assert watch.pids == []
    assert started[0].exitcode is None
    started[0].kill()
    started[0].join()


def test_watch_has_the_pids_of_started_processes(watch: ParentWatch) -> None:
    processes = [watched_server.start(watch) for _ in range(2)]
    assert watch.pids == [each.pid for each in processes]


def test_watch_leaves_no_descriptor_open() -> None:
    before = psutil.Process().num_fds()
    for _ in range(20):
        ParentWatch().kill()
    assert psutil.Process().num_fds() == before


def test_watch_without_the_kernel_s_signal_ends_its_engine() -> None:
    """As on a system that has none."""
    code = (
        "import fcntl; del fcntl.F_SETSIG\n"
        "import os, time; from types import SimpleNamespace\n"
        "from llmserve.engine import parent_watch\n"
        "parent_watch._join_watch(SimpleNamespace(detach=lambda: 0)); print('watched', flush=True)\n"
        "time.sleep(600)"
    )
    line = [sys.executable, "-c", code]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"watched\n"
        process.stdin.close()
        assert process.wait(WITHIN_S) == -signal.SIGKILL


def test_watched_processes_and_their_children_register(
    watch: ParentWatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they begin, before anything of vLLM's is imported there."""
    folder = tmp_path / "llmserve-1"
    folder.mkdir()
    (folder / "lock").touch()
    monkeypatch.setenv(run_folder.SOCKETS, str(folder))
    process = watched_server.start(watch)
    assert process.pid is not None
    below = psutil.Process(process.pid)
    while len(pids := [each for each in folder.iterdir() if each.name.isdecimal()]) < 2:
        assert below.is_running()
        time.sleep(0.01)
    assert {int(each.name) for each in pids} == {
        process.pid,
        *(each.pid for each in below.children() if "resource_tracker" not in str(each.cmdline())),
    }
