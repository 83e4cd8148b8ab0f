"""Ends an engine's processes when the server ends.

Each engine has a pipe. Its write end is in the server alone, so the kernel closes it however the
server ends. Each process that starts inside `ParentWatch.watching` asks the kernel to kill its
process group at that moment: a loop that holds the interpreter's lock cannot delay it.

multiprocessing pickles a process's `_config`, a copy of its parent's, before its target. So an
entry of `_config` runs in the new process before vLLM is imported.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import select
import signal
import threading
import weakref
from contextvars import ContextVar
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from typing import TYPE_CHECKING, Any

from llmserve.engine import run_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

_KEY = "llmserve.engine.parent_watch"  # in `_config`
_active: ContextVar[ParentWatch | None] = ContextVar("active", default=None)  # a thread's own


class ParentWatch:
    """Watches the owner of one engine's processes. The owner may `kill` them at any time.

    A garbage-collected watch kills them too, so an engine without an owner ends.
    """

    def __init__(self) -> None:
        self._read_end, write_end = os.pipe()
        # Open while a process may be started: its number must not become another file's.
        weakref.finalize(self, os.close, self._read_end)
        self._close = weakref.finalize(self, os.close, write_end)
        self._started: list[Any] = []  # multiprocessing's Popen objects

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch each process that the calling thread starts with multiprocessing."""
        _config_of(multiprocessing.current_process())[_KEY] = _StartHook()
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    def kill(self) -> None:
        """Kill all processes, including those that are starting. Idempotent."""
        self._close()

    @property
    def is_killed(self) -> bool:
        return not self._close.alive

    @property
    def pids(self) -> list[int]:
        """The ids of the processes started here, dead or alive, without their children."""
        return [pid for each in self._started if (pid := getattr(each, "pid", None))]

    def first_call(self) -> tuple[Any, ...]:
        """Return the function that the starting process calls first, and its arguments."""
        if self.is_killed:
            raise RuntimeError("the start was cancelled")
        self._started.append(get_spawning_popen())
        return _join_watch, (reduction.DupFd(self._read_end),)


class _StartHook:
    """An entry of `_config`. In an engine core it becomes a `_ChildHook`: workers have no watch."""

    def __reduce__(self) -> tuple[Any, ...]:
        watch = _active.get()
        return (type(None), ()) if watch is None else watch.first_call()


class _ChildHook:
    """An entry of `_config` with which each process below an engine core registers itself."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _registered, ()


def _registered() -> _ChildHook:
    run_folder.register_process()
    return _ChildHook()


def _config_of(process: Any) -> dict[str, Any]:
    config: dict[str, Any] = process._config  # noqa: SLF001  # tests/unit/test_parent_watch.py notices a change
    return config


def _join_watch(passed: Any) -> _ChildHook:
    """Run in the new process: lead a process group that is killed when the pipe is closed.

    The terminal's Ctrl-C then reaches the server alone.
    """
    read_end: int = passed.detach()
    with contextlib.suppress(PermissionError):  # it leads its group already
        os.setpgid(0, 0)
    try:
        _signal_group_at_close(read_end)
    except (AttributeError, OSError):  # not Linux
        threading.Thread(target=_kill_group_at_close, args=(read_end,), daemon=True).start()
    return _registered()


def join_group(group: int, read_end: int) -> None:
    """Join the process group of an engine core, and kill it when the core's pipe is closed."""
    os.setpgid(0, group)
    _signal_group_at_close(read_end)


def _signal_group_at_close(read_end: int) -> None:
    """Have the kernel signal the group. The pipe carries no data: its one event is its end."""
    # A new open file: the signal's owner and number belong to it, and others share the first one.
    own = os.open(f"/proc/self/fd/{read_end}", os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(own, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(own, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(own, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
    poll = select.poll()
    poll.register(read_end, 0)
    if poll.poll(0):  # it was closed before
        os.killpg(0, signal.SIGKILL)


def _kill_group_at_close(read_end: int) -> None:
    os.read(read_end, 1)
    os.killpg(0, signal.SIGKILL)
