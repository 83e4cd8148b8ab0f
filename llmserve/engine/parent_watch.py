"""The tie between the server and an engine's processes: they end when the server does.

The tie is a pipe. Its write end is in the server alone, so the kernel closes it however the
server ends. Each process that is started while `ParentWatch.tying` holds asks the kernel to kill
its process group at that moment: a loop that holds the interpreter's lock cannot delay it.

multiprocessing pickles a process's `_config`, a copy of its parent's, ahead of its target.
So what is in there runs in the new process before anything of vLLM's is imported.
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
_tying: ContextVar[ParentWatch | None] = ContextVar("tying", default=None)  # a thread's own


class ParentWatch:
    """Ties the processes of one engine to their owner, which may `cut` it at any time.

    A tether that is garbage is cut, so an engine without an owner ends.
    """

    def __init__(self) -> None:
        self._read_end, write_end = os.pipe()
        # Open as long as a process may be started: its number must not become another file's.
        weakref.finalize(self, os.close, self._read_end)
        self._close = weakref.finalize(self, os.close, write_end)
        self._started: list[Any] = []  # multiprocessing's Popen objects

    @contextlib.contextmanager
    def tying(self) -> Iterator[None]:
        """Tie each process that the calling thread starts with multiprocessing."""
        _config_of(multiprocessing.current_process())[_KEY] = _Knot()
        token = _tying.set(self)
        try:
            yield
        finally:
            _tying.reset(token)

    def cut(self) -> None:
        """Kill all that is tied, and all that is being started; again is no mistake."""
        self._close()

    @property
    def is_cut(self) -> bool:
        return not self._close.alive

    @property
    def pids(self) -> list[int]:
        """Of the processes that were started here, dead or alive; not of those below them."""
        return [pid for each in self._started if (pid := getattr(each, "pid", None))]

    def knot(self) -> tuple[Any, ...]:
        """What the process that is being started calls first."""
        if self.is_cut:
            raise RuntimeError("the start was ended")
        self._started.append(get_spawning_popen())
        return _tie, (reduction.DupFd(self._read_end),)


class _Knot:
    """An entry of `_config`; in the new process it becomes a `_Mark`: workers are not tied again."""

    def __reduce__(self) -> tuple[Any, ...]:
        tether = _tying.get()
        return (type(None), ()) if tether is None else tether.knot()


class _Mark:
    """An entry of `_config` that each process below an engine's marks itself with, as it begins."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _marked, ()


def _marked() -> _Mark:
    run_folder.mark()
    return _Mark()


def _config_of(process: Any) -> dict[str, Any]:
    config: dict[str, Any] = process._config  # noqa: SLF001  # tests/unit/test_parent_watch.py notices a change
    return config


def _tie(passed: Any) -> _Mark:
    """Runs in the new process: it leads a group, which is killed when the pipe is closed.

    The terminal's Ctrl-C then reaches the server alone.
    """
    read_end: int = passed.detach()
    with contextlib.suppress(PermissionError):  # it leads its group already
        os.setpgid(0, 0)
    try:
        _have_group_killed(read_end)
    except (AttributeError, OSError):  # not Linux
        threading.Thread(target=_kill_group_at_end, args=(read_end,), daemon=True).start()
    return _marked()


def _have_group_killed(read_end: int) -> None:
    """Have the kernel do it. Nothing is written to the pipe: its one event is its end."""
    # Opened anew: who gets which signal belongs to the open file, which others share.
    own = os.open(f"/proc/self/fd/{read_end}", os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(own, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(own, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(own, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
    poll = select.poll()
    poll.register(read_end, 0)
    if poll.poll(0):  # it was closed before
        os.killpg(0, signal.SIGKILL)


def _kill_group_at_end(read_end: int) -> None:
    os.read(read_end, 1)
    os.killpg(0, signal.SIGKILL)
