"""Looks after replicas that nobody is asking for right now: dead, hung, idle."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING

from llmserve.lifecycle.placement import Level
from llmserve.lifecycle.replica import State

if TYPE_CHECKING:
    from llmserve.lifecycle.lease import Task
    from llmserve.lifecycle.pool import Pool
    from llmserve.lifecycle.replica import Replica

log = logging.getLogger(__name__)

_LOOK_S = 0.5  # a dead engine is noticed this soon
_ASK_EVERY_S = 10.0
HUNG_S = 45.0  # an engine that does not answer for so long, and does not work, is killed

# States in which an engine answers; every other call into it has a bound of its own.
_ASKED = frozenset({State.READY, State.DRAINING, State.SLEEPING})


class HealthMonitor:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._restings: dict[Replica, Task] = {}
        self._asked: dict[Replica, Task] = {}  # whether it hangs

    async def run(self) -> None:
        """Until cancelled."""
        try:
            await asyncio.gather(self._for_ends(), self._for_hung())
        finally:
            for task in (*self._restings.values(), *self._asked.values()):
                task.cancel()

    async def _for_ends(self) -> None:
        """Engines that have died, and models that nobody asks for."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for replica in self._pool.replicas:
                try:
                    if not self._pool.supervisor.handle_death(replica):
                        self._rest_if_idle(replica)
                except Exception:  # of this one; the others are looked after
                    log.exception("model=%s unforeseen", replica.name)

    def _rest_if_idle(self, replica: Replica) -> None:
        if replica.transition_lock.locked() or replica in self._restings:
            return
        wanted = _level_for_idle(replica)
        if replica.state in (State.READY, State.SLEEPING) and replica.level > wanted:
            still = partial(_is_idle_for, replica, wanted)
            resting = asyncio.create_task(self._pool.life.lower(replica, wanted, still))
            self._restings[replica] = resting
            resting.add_done_callback(partial(self._rested, replica))

    def _rested(self, replica: Replica, resting: Task) -> None:
        del self._restings[replica]
        if not resting.cancelled() and (error := resting.exception()) is not None:
            log.error("model=%s unforeseen", replica.name, exc_info=error)

    async def _for_hung(self) -> None:
        """Engines that hang: they are killed, and then found dead."""
        while True:
            await asyncio.sleep(_ASK_EVERY_S)
            for replica in self._pool.replicas:
                if replica not in self._asked and replica.state in _ASKED:
                    asked = asyncio.create_task(self._kill_if_hung(replica))
                    self._asked[replica] = asked
                    asked.add_done_callback(partial(self._was_asked, replica))

    def _was_asked(self, replica: Replica, _: Task) -> None:
        del self._asked[replica]

    async def _kill_if_hung(self, replica: Replica) -> None:
        running = replica.running
        if running is None or running.dead:
            return
        try:
            if await running.responds(HUNG_S):
                return
        except Exception:
            log.exception("model=%s could not be asked whether it hangs", replica.name)
            return
        if replica.running is running and not running.dead:
            log.error("model=%s: no answer and no work for %g s; killed", replica.name, HUNG_S)
            running.kill()


def _level_for_idle(replica: Replica) -> Level:
    """How far down a replica goes that has been idle for so long."""
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
