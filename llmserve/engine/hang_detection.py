"""An engine from which nothing comes: whether it works or hangs."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class HangDetector:
    """Tells work from a hang by CPU time, which compilers and copies of GPU engines take too.

    An engine hangs if nothing comes from it for `quiet_s`, in whose second half it takes less
    than `share` of a core. A GPU that hangs can keep a core busy, so silence of `at_most_s` is
    a hang in any case. `cpu_s` is asked as seldom as possible: it looks at all processes.
    """

    def __init__(
        self,
        now_s: float,
        cpu_s: Callable[[], float],
        *,
        quiet_s: float,
        at_most_s: float,
        share: float,
    ) -> None:
        self._cpu_s = cpu_s
        self._quiet_s = quiet_s
        self._share = share
        self._end_s = now_s + at_most_s
        self._restart(now_s)

    def _restart(self, now_s: float) -> None:
        self._since_s = now_s
        self._half: tuple[float, float] | None = None  # when it was over, and the CPU time then

    def is_hang(self, now_s: float, *, heard: bool = False) -> bool:
        """`heard`: something has come since the last look, such as a line of its log. Blocks."""
        if now_s >= self._end_s:
            return True
        if heard:
            self._restart(now_s)
        elif self._half is None:
            if now_s - self._since_s >= self._quiet_s / 2:
                self._half = now_s, self._cpu_s()
        elif now_s - self._since_s >= self._quiet_s:
            then_s, before_s = self._half
            if self._cpu_s() - before_s < self._share * (now_s - then_s):
                return True
            self._restart(now_s)
        return False


def cpu_s(pids: Iterable[int]) -> float:
    """CPU time of processes and of all below them, also of those that have ended there."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            total += sum(map(_cpu_s, (process, *process.children(recursive=True))))
    return total


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system + times.children_user + times.children_system
