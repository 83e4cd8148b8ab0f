"""How replicas get from one state to another: the one owner of these transitions.

Start, sleep, wake, stop, and a new start after a death; and room for whoever comes, which
others make by going down the ladder of levels.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from typing import TYPE_CHECKING

from llmserve.errors import LLMServeError, StartupError
from llmserve.gpus.claims import GpuClaims
from llmserve.gpus.device import gib
from llmserve.lifecycle.eviction import Resident, room
from llmserve.lifecycle.placement import HOST_MEMORY, Level
from llmserve.lifecycle.replica import STARTING, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager

    from llmserve.lifecycle.eviction import Steps
    from llmserve.lifecycle.placement import Place, Takes
    from llmserve.lifecycle.replica import Backend, Replica, Running
    from llmserve.metrics import Metrics
    from llmserve.registry.config import ModelSpec

log = logging.getLogger(__name__)

_LOOK_S = 0.02  # whether somebody has room to give by now
# How long a replica that is asked for keeps its place when others want it, in times of what
# its coming cost; one that is idle keeps it for once that.
_TURN = 5.0
_TURN_S = (2.0, 60.0)  # not shorter, not longer
_WAKE_S = 0.5  # of a sleeper that has never been awakened


class ReplicaLifecycle:
    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._memory = backend.memory
        self._metrics = metrics
        self._booked: dict[Replica, Level] = {}  # what of the memory each may have
        self._order = GpuClaims()  # of those who want room, first come, first served

    # --- up

    async def start(self, replica: Replica) -> None:
        """To READY or FAILED, and then down again if it is to start asleep."""
        await self.to_ready(replica)
        if replica.state is State.READY and replica.model.spec.start == "sleeping":
            await self.lower(replica, Level.KV_RELEASED)  # others may send it further down

    async def to_ready(self, replica: Replica) -> None:
        """To READY or FAILED from wherever it is."""
        replica.started = time.monotonic()
        try:
            with self._expecting(replica):
                while self._has_room(replica) or await self._wait_for_room(replica):
                    async with replica.transition_lock:
                        if self._has_room(replica):  # nothing has taken it down meanwhile
                            if replica.state is not State.READY:
                                await self._start_or_wake(replica)
                            return
        except BaseException:  # cancelled: what it does not use is not kept for it
            if replica.state is not State.WAKING:  # its engine holds all until it has ended
                self._reserve(replica, replica.level)
            raise

    def _expecting(self, replica: Replica) -> AbstractContextManager[None]:
        if not replica.level:
            return contextlib.nullcontext()
        return self._memory.expecting(replica.placement)

    def _has_room(self, replica: Replica) -> bool:
        return self._booked.get(replica) is Level.READY

    async def _start_or_wake(self, replica: Replica) -> None:
        replica.began = time.monotonic()
        try:
            if not await self._wake(replica):
                await self._started(replica)
        except StartupError as error:
            await self._failed(replica, error.message)
        except Exception as error:
            # Whatever it is, it is this replica's: the others go on.
            log.exception("model=%s unforeseen", replica.name)
            await self._failed(replica, f"{type(error).__name__}: {error}")

    async def _failed(self, replica: Replica, note: str) -> None:
        await self.end(replica)
        self._reserve(replica, Level.STOPPED)
        pause_s = replica.failures.pause_s(0.0)
        replica.again_at = math.inf if pause_s is None else time.monotonic() + pause_s
        self.change(replica, State.FAILED, note)

    async def _started(self, replica: Replica) -> None:
        await self.end(replica)  # what could not wake
        replica.running = await self._backend.start(
            replica.model.spec,
            replica.placement,
            lambda state, note: self.change(replica, state, note),
        )
        self._record_ready(replica)
        await self._prepared(replica, replica.running)

    async def _prepared(self, replica: Replica, running: Running) -> None:
        """Nobody wants its place before that is done: its first sleep is short then."""
        if running.sleeps and Level.HOST in replica.holds:
            try:
                await running.prepare_sleep()
            except LLMServeError as error:
                log.error("model=%s: %s", replica.name, error.message)  # noqa: TRY400

    async def _wake(self, replica: Replica) -> bool:
        """False if there is no sleeper, or one that has to be started anew."""
        if replica.running is None or replica.running.dead:
            return False
        self.change(replica, State.WAKING)
        try:
            async with self._memory.moves(replica.placement, replica.level):
                await replica.running.wake()
        except LLMServeError as error:
            log.error("model=%s did not wake: %s", replica.name, error.message)  # noqa: TRY400
            return False
        self._record_ready(replica)
        return True

    def _record_ready(self, replica: Replica) -> None:
        replica.cost_s[replica.level] = time.monotonic() - replica.began
        replica.failures.forget()
        replica.level = Level.READY
        replica.used = time.monotonic()
        self.change(replica, State.READY)

    # --- down

    async def lower(
        self, replica: Replica, level: Level, still: Callable[[], bool] = lambda: True
    ) -> None:
        """Down to a level that it has, or the next below, once its requests have ended.

        It stays if the reason for it does not `still` hold when its turn comes.
        """
        level = max(each for each in (Level.STOPPED, *replica.holds) if each <= level)
        async with replica.transition_lock:
            if replica.level > level and still():
                await self._lower(replica, level)

    async def stop(self, replica: Replica) -> None:
        """End a replica whose way was cancelled, wherever on it that was."""
        async with replica.transition_lock:
            await self.end(replica)
            self._settle(replica, Level.STOPPED, State.STOPPED, "it was unloaded")

    async def _lower(self, replica: Replica, level: Level) -> None:
        if replica.state is State.READY:
            await self._drain(replica)
        running = replica.running
        if running is not None and running.sleeps and not running.dead and level:
            try:
                async with self._memory.moves(replica.placement):
                    await running.sleep(level)
            except LLMServeError as error:
                log.error("model=%s did not sleep: %s", replica.name, error.message)  # noqa: TRY400
            else:
                self._settle(replica, level, State.SLEEPING)
                return
        await self.end(replica)
        self._settle(replica, Level.STOPPED, State.STOPPED)

    async def _drain(self, replica: Replica) -> None:
        """Until its requests have ended; it gets no more. Cancelled, it serves on."""
        self.change(replica, State.DRAINING)
        try:
            while replica.load.requests:
                replica.unused.clear()
                await replica.unused.wait()
        except BaseException:
            self.change(replica, State.READY)
            raise

    def _settle(self, replica: Replica, level: Level, state: State, note: str = "") -> None:
        replica.level = level
        self._reserve(replica, level)
        self.change(replica, state, note)

    async def end(self, replica: Replica) -> None:
        """End an engine, dead or alive, and forget it."""
        running, replica.running = replica.running, None
        replica.level = Level.STOPPED
        if running is None:
            return
        try:
            await running.stop()
        except Exception:
            log.exception("model=%s did not stop cleanly", replica.name)

    # --- death

    async def revive(self, replica: Replica) -> None:
        """End what is left of a dead engine and start another, later each time.

        It keeps its place for the first time.
        """
        again = True
        while again:
            async with replica.transition_lock:
                await self.end(replica)
            await asyncio.sleep(replica.started - time.monotonic())
            await self.to_ready(replica)
            again = replica.state is not State.READY and self.restart_dead(
                replica, replica.note, 0.0
            )

    async def discard(self, replica: Replica) -> None:
        """End what is left of a dead engine that is not started again."""
        async with replica.transition_lock:
            await self.end(replica)
            self._reserve(replica, Level.STOPPED)

    def restart_dead(self, replica: Replica, note: str, lived_s: float) -> bool:
        """Whether a dead replica is started again, which it then waits for."""
        self.count_death(replica)
        pause_s = replica.deaths.pause_s(lived_s)
        if pause_s is None:
            times = replica.deaths.in_a_row
            replica.again_at = math.inf
            self.change(replica, State.FAILED, f"{note}; {times} times, not started again")
            return False
        replica.started = time.monotonic() + pause_s
        replica.queues_requests = False
        self.change(replica, State.WAITING, f"{note}; again in {pause_s:g} s")
        return True

    def count_death(self, replica: Replica) -> None:
        self._metrics.deaths.labels(replica.model.name, replica.number).inc()

    # --- what a request or a reload asks

    def forget_failures(self, replica: Replica) -> None:
        """Let a replica start again that failed too often."""
        replica.deaths.forget()
        replica.failures.forget()

    def queue_requests(self, replica: Replica) -> None:
        """Let requests wait for a replica while it is on its way."""
        replica.queues_requests = True

    def leave(self, replica: Replica) -> None:
        """Let others have the memory of a replica whose model has left."""
        replica.leaves = True

    def retire(self, replica: Replica) -> None:
        """Start a replica no more; it ends with its requests."""
        replica.retired = True

    async def rebuild(self, replicas: Iterable[Replica], spec: ModelSpec) -> None:
        """Give engines that go on the handlers of a changed entry: all of them, or none.

        Raises what the first failure raises.
        """
        async with contextlib.AsyncExitStack() as locks:  # none starts or ends meanwhile
            for replica in replicas:
                await locks.enter_async_context(replica.transition_lock)
            living = [
                (each, each.running) for each in replicas if each.running and not each.running.dead
            ]
            rebuilt = [await running.changed(spec) for _, running in living]
            for (replica, _), running in zip(living, rebuilt, strict=True):
                replica.running = running

    # --- states

    def change(self, replica: Replica, state: State, note: str = "") -> None:
        before = replica.state
        if before in STARTING and state not in STARTING:
            replica.seconds = time.monotonic() - replica.started
        replica.state, replica.note = state, note
        if state is not before:
            replica.since = time.monotonic()
        replica.model.record_change(replica, before)

    # --- room

    async def _wait_for_room(self, replica: Replica) -> bool:
        """Keep room for a replica, once others have made it; it fails if there can be none."""
        if replica.level is Level.STOPPED:
            replica.placement = replica.next_placement
        takes = self._takes(replica, Level.READY)
        places = takes.keys() - {HOST_MEMORY} or takes.keys()
        async with self._order.hold(places, alone=True):
            async with replica.transition_lock:  # a transition downward is over
                pass
            try:
                await self._make_room(replica, takes)
            except StartupError as error:
                async with replica.transition_lock:
                    await self._failed(replica, error.message)
                return False
            self._booked[replica] = Level.READY
            return True

    def _reserve(self, replica: Replica, level: Level) -> None:
        if level:
            self._booked[replica] = level
        else:
            self._booked.pop(replica, None)

    def _takes(self, replica: Replica, level: Level) -> Takes:
        return replica.holds.get(level, {})

    async def _make_room(self, replica: Replica, takes: Takes) -> None:
        """Until there is room. Raises StartupError if there can be none."""
        self._raise_if_hopeless(replica, takes)
        while (steps := self._eviction_steps(replica, takes)) != []:
            if steps is None:
                await self._wait_for_memory(replica)
                continue
            await asyncio.gather(*(self._evict(*step, replica) for step in steps))

    async def _evict(self, replica: Replica, level: Level, comer: Replica) -> None:
        to = level.name.lower()
        log.info("model=%s gives way to model=%s level=%s", replica.name, comer.name, to)
        replica.gave_way += 1
        self._metrics.evictions.labels(replica.model.name, replica.number, to).inc()
        idle = not replica.load.requests
        await self.lower(replica, level, lambda: not (idle and replica.load.requests))

    async def _wait_for_memory(self, replica: Replica) -> None:
        if replica.state is not State.WAITING:
            self.change(replica, State.WAITING, "for memory that others hold")
        await asyncio.sleep(_LOOK_S)

    def _eviction_steps(self, replica: Replica, takes: Takes) -> Steps[Replica] | None:
        """Who goes where; of those with requests only if the others do not suffice."""
        for busy in (False, True):
            others = [
                Resident(
                    other,
                    level,
                    other.holds,
                    level is other.level
                    and other.model is not replica.model
                    and _gives_way(other, busy=busy),
                    (other.model.spec.priority, -other.idle_s / max(_cost_s(other), _LOOK_S)),
                )
                for other, level in self._booked.items()
                if other is not replica
            ]
            steps = room(takes, self._memory.capacity, others)
            if steps is not None:
                return steps
        return None

    def fits(self, replicas: Iterable[Replica]) -> bool:
        """Whether they find room beside all that are here; at most sleepers give way."""
        wanted: Counter[Place] = Counter()
        for replica in replicas:
            wanted.update(self._takes(replica, Level.READY))
        here = [
            Resident(
                each,
                level,
                each.holds,
                gives_way=each.state is State.SLEEPING and _gives_way(each, busy=False),
            )
            for each, level in self._booked.items()
        ]
        return room(wanted, self._memory.capacity, here) is not None

    def _raise_if_hopeless(self, replica: Replica, takes: Takes) -> None:
        staying = [
            self._takes(each, level)
            for each, level in self._booked.items()
            if each is not replica and (each.is_pinned or each.model is replica.model)
        ]
        for place, capacity in self._memory.capacity.items():
            free = capacity - sum(held.get(place, 0) for held in staying)
            if takes.get(place, 0) > free:
                raise StartupError(
                    f"it needs {gib(takes[place])}, and pinned models and its own other replicas "
                    f"leave {gib(free)} of {place}"
                )


def _gives_way(replica: Replica, *, busy: bool) -> bool:
    if replica.is_pinned or replica.transition_lock.locked():
        return False
    if replica.state is not State.READY:
        return replica.state is State.SLEEPING
    stayed_s = time.monotonic() - replica.since
    if not replica.load.requests:
        return stayed_s >= min(_cost_s(replica), _TURN_S[1])
    shortest, longest = _TURN_S
    return busy and stayed_s >= min(max(shortest, _TURN * _cost_s(replica)), longest)


def _cost_s(replica: Replica) -> float:
    """What it will take to be ready again."""
    running = replica.running
    if running is None or not running.sleeps:
        return replica.cost_s.get(Level.STOPPED, 0.0)
    asleep = [seconds for level, seconds in replica.cost_s.items() if level]
    return max(asleep, default=_WAKE_S)
