"""Whether an engine without output works or hangs."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class HangDetector:
    """Distinguishes work from a hang by CPU time, which compilers and GPU copies use too.

    An engine hangs if it has no output for `quiet_s` and uses less than `working_share` of a core
    in the second half of that time. A hung GPU can keep a core busy, so `at_most_s` without a
    result is a hang in any case. `cpu_s` is called rarely, since it reads all processes.
    """

    def __init__(
        self,
        now_s: float,
        cpu_s: Callable[[], float],
        *,
        quiet_s: float,
        at_most_s: float,
        working_share: float,
    ) -> None:
        self._cpu_s = cpu_s
        self._quiet_s = quiet_s
        self._working_share = working_share
        self._end_s = now_s + at_most_s
        self._restart(now_s)

    def _restart(self, now_s: float) -> None:
        self._since_s = now_s
        self._half: tuple[float, float] | None = None  # its time, and the CPU time then

    def is_hang(self, now_s: float, *, has_output: bool = False) -> bool:
        """Whether the engine hangs; `has_output`: it had output since the last call. Blocks."""
        if now_s >= self._end_s:
            return True
        if has_output:
            self._restart(now_s)
        elif self._half is None:
            if now_s - self._since_s >= self._quiet_s / 2:
                self._half = now_s, self._cpu_s()
        elif now_s - self._since_s >= self._quiet_s:
            then_s, before_s = self._half
            if self._cpu_s() - before_s < self._working_share * (now_s - then_s):
                return True
            self._restart(now_s)
        return False


def cpu_s(pids: Iterable[int]) -> float:
    """Return the CPU time of processes, their groups and all descendants, including ended ones.

    A forked worker is in the group of its engine core, but the zygote is its parent.
    """
    leaders = frozenset(pids)
    family: dict[int, psutil.Process] = {}
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if pid in leaders or os.getpgid(pid) in leaders:
                process = psutil.Process(pid)
                family |= {each.pid: each for each in process.children(recursive=True)}
                family[pid] = process
    return sum(map(_cpu_s, family.values()))


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system + times.children_user + times.children_system
