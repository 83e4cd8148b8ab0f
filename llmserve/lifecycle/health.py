"""Watches replicas independently of requests: dead, hung and idle ones."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from llmserve.lifecycle.placement import Level
from llmserve.lifecycle.replica import State
from llmserve.lifecycle.timings import TIMINGS, LifecycleTimings

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from llmserve.lifecycle.lease import Task
    from llmserve.lifecycle.pool import Pool
    from llmserve.lifecycle.replica import Replica

log = logging.getLogger(__name__)

# States in which an engine answers; all other calls into it have bounds of their own.
_ASKED = frozenset({State.READY, State.DRAINING, State.SLEEPING})


class HealthMonitor:
    """Handles dead engines, lowers idle replicas, and kills engines that hang."""

    def __init__(self, pool: Pool, timings: LifecycleTimings = TIMINGS) -> None:
        self._pool = pool
        self._timings = timings
        self._lowered: dict[Replica, Task] = {}  # idle replicas
        self._asked: dict[Replica, Task] = {}  # whether they hang

    async def run(self) -> None:
        """Until cancelled."""
        try:
            await asyncio.gather(self._check_replicas(), self._check_for_hangs())
        finally:
            tasks = {*self._lowered.values(), *self._asked.values()}
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

    async def _check_replicas(self) -> None:
        """Dead engines have no event; idle times pass."""
        while True:
            await asyncio.sleep(self._timings.health_check_s)
            for replica in self._pool.replicas:
                try:
                    if not self._pool.supervisor.handle_death(replica):
                        self._lower_if_idle(replica)
                except Exception:  # of this replica; the others are checked
                    log.exception("model=%s unforeseen", replica.name)

    def _lower_if_idle(self, replica: Replica) -> None:
        if replica.transition_lock.locked() or replica in self._lowered:
            return
        level = _level_for_idle(replica)
        if replica.state in (State.READY, State.SLEEPING) and replica.level > level:
            life, still = self._pool.life, partial(_is_idle_for, replica, level)
            self._begin(self._lowered, replica, life.lower(replica, level, still))

    async def _check_for_hangs(self) -> None:
        while True:
            await asyncio.sleep(self._timings.hang_check_s)
            for replica in self._pool.replicas:
                if replica not in self._asked and replica.state in _ASKED:
                    self._begin(self._asked, replica, self._kill_if_hung(replica))

    def _begin(
        self, tasks: dict[Replica, Task], replica: Replica, work: Coroutine[Any, Any, None]
    ) -> None:
        tasks[replica] = asyncio.create_task(work)
        tasks[replica].add_done_callback(partial(self._finish, tasks, replica))

    def _finish(self, tasks: dict[Replica, Task], replica: Replica, task: Task) -> None:
        del tasks[replica]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("model=%s unforeseen", replica.name, exc_info=error)

    async def _kill_if_hung(self, replica: Replica) -> None:
        running, hang_s = replica.running, self._timings.hang_s
        if running is None or running.dead:
            return
        try:
            if await running.responds(hang_s):
                return
        except Exception:
            log.exception("model=%s did not answer whether it hangs", replica.name)
            return
        if replica.running is running and not running.dead:
            log.error("model=%s: no answer and no work for %g s; killed", replica.name, hang_s)
            running.kill()


def _level_for_idle(replica: Replica) -> Level:
    """The level for a replica that has been idle for so long."""
    idle, idle_s = replica.model.spec.idle, replica.idle_s
    if replica.load.requests:
        return Level.READY
    if idle.stop_after is not None and idle_s >= idle.stop_after:
        return Level.STOPPED
    if idle.sleep_after is not None and idle_s >= idle.sleep_after:
        return Level.HOST
    return Level.READY


def _is_idle_for(replica: Replica, level: Level) -> bool:
    return _level_for_idle(replica) <= level
