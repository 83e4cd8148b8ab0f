"""How replicas change their state and level: start, sleep, wake, stop, restart, eviction."""

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
from llmserve.lifecycle.eviction import Resident, plan_eviction
from llmserve.lifecycle.parallel import in_parallel
from llmserve.lifecycle.placement import HOST_MEMORY, Level
from llmserve.lifecycle.replica import STARTING, State
from llmserve.lifecycle.timings import TIMINGS, LifecycleTimings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from llmserve.lifecycle.eviction import Steps
    from llmserve.lifecycle.placement import Place, Takes
    from llmserve.lifecycle.replica import Backend, Replica, Running
    from llmserve.metrics import Metrics
    from llmserve.registry.spec import ModelSpec

log = logging.getLogger(__name__)

_SHORTEST_S = 0.02  # of a load time and of a wait for the end of a residency


class ReplicaLifecycle:
    """The only writer of a replica's state and level, and of the memory reserved for it.

    A replica does not queue for memory under its transition lock, but takes that lock while it is
    first in the queue. The locks of the memory budget and of the backend are below.
    """

    def __init__(
        self, backend: Backend, metrics: Metrics, timings: LifecycleTimings = TIMINGS
    ) -> None:
        self._backend = backend
        self._memory = backend.memory
        self._metrics = metrics
        self._timings = timings
        self._reserved: dict[Replica, Level] = {}
        self._queue = GpuClaims()  # of replicas that wait for memory, in order of arrival
        self._memory_changed = asyncio.Event()

    # --- up

    async def start(self, replica: Replica) -> None:
        """To READY or FAILED; then to sleep if the model starts asleep."""
        await self.make_ready(replica)
        if replica.state is State.READY and replica.model.spec.start == "sleeping":
            await self.lower(replica, Level.KV_RELEASED)  # an eviction may lower it further

    async def make_ready(self, replica: Replica) -> None:
        """From any state to READY or FAILED."""
        replica.started = time.monotonic()
        try:
            expecting = self._memory.expecting(replica.placement)
            with expecting if replica.level else contextlib.nullcontext():
                while self._may_be_ready(replica) or await self._reserve_ready(replica):
                    async with self._transition(replica):
                        if self._may_be_ready(replica):  # not evicted before it had the lock
                            if replica.state is not State.READY:
                                await self._start_or_wake(replica)
                            return
        except BaseException:  # a cancellation: free the memory that it does not use
            if replica.state is not State.WAKING:  # a waking engine holds all of it until it ends
                self._reserve(replica, replica.level)
            raise

    def _may_be_ready(self, replica: Replica) -> bool:
        return self._reserved.get(replica) is Level.READY

    @contextlib.asynccontextmanager
    async def _transition(self, replica: Replica) -> AsyncIterator[None]:
        """Hold the transition lock, which protects a replica from eviction."""
        try:
            async with replica.transition_lock:
                yield
        finally:
            self.check_memory()

    async def _start_or_wake(self, replica: Replica) -> None:
        replica.began = time.monotonic()
        try:
            if not await self._wake(replica):
                await self._start_engine(replica)
        except StartupError as error:
            await self._fail(replica, error.message)
        except Exception as error:  # of this replica; the others continue
            log.exception("model=%s unforeseen", replica.name)
            await self._fail(replica, f"{type(error).__name__}: {error}")

    async def _fail(self, replica: Replica, note: str) -> None:
        await self.end_engine(replica)
        self._reserve(replica, Level.STOPPED)
        pause_s = replica.failures.pause_s(self._timings.first_restart_s)
        replica.again_at = math.inf if pause_s is None else time.monotonic() + pause_s
        self.change(replica, State.FAILED, note)

    async def _start_engine(self, replica: Replica) -> None:
        await self.end_engine(replica)  # one that did not wake
        replica.running = await self._backend.start(
            replica.model.spec,
            replica.placement,
            lambda state, note: self.change(replica, state, note),
        )
        self._record_ready(replica)
        await self._prepare_sleep(replica, replica.running)

    async def _prepare_sleep(self, replica: Replica, running: Running) -> None:
        """Under the transition lock, so that an eviction finds an engine whose sleep is short."""
        if running.sleeps and Level.HOST in replica.holds:
            try:
                await running.prepare_sleep()
            except LLMServeError as error:
                log.error("model=%s: %s", replica.name, error.message)  # noqa: TRY400

    async def _wake(self, replica: Replica) -> bool:
        """Return whether the replica woke; if not, its engine must start again."""
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
        """Lower a replica after its requests, to a level that it has or to the next one below.

        Nothing happens if `still` is false once no other transition runs.
        """
        level = max(each for each in (Level.STOPPED, *replica.holds) if each <= level)
        async with self._transition(replica):
            if replica.level > level and still():
                await self._lower(replica, level)

    async def _lower(self, replica: Replica, level: Level) -> None:
        if replica.state is State.READY:
            await self._drain(replica)
        if not await self._sleep(replica, level):
            await self._stop(replica)

    async def _sleep(self, replica: Replica, level: Level) -> bool:
        """Return False if there is no engine that can sleep."""
        running = replica.running
        if running is None or not running.sleeps or running.dead or not level:
            return False
        try:
            async with self._memory.moves(replica.placement):
                await self._sleep_or_stop(replica, running, level)
        except LLMServeError as error:
            log.error("model=%s did not sleep: %s", replica.name, error.message)  # noqa: TRY400
            return False
        except asyncio.CancelledError:
            if replica.state is State.DRAINING:  # it waited for its GPUs, and serves again
                self.change(replica, State.READY)
            raise
        self._settle(replica, level, State.SLEEPING)
        return True

    async def _sleep_or_stop(self, replica: Replica, running: Running, level: Level) -> None:
        """Stop an engine whose sleep was cancelled: its level is unknown. Raises EngineError."""
        try:
            await running.sleep(level)
        except asyncio.CancelledError:
            await self._stop(replica)
            raise

    async def _stop(self, replica: Replica, note: str = "") -> None:
        try:
            await self.end_engine(replica)
        finally:  # cancelled or not, it has ended
            self._settle(replica, Level.STOPPED, State.STOPPED, note)

    async def _drain(self, replica: Replica) -> None:
        """Wait for its requests; it gets no new ones. If cancelled, it serves again."""
        self.change(replica, State.DRAINING)
        try:
            while replica.load.requests:
                replica.unused.clear()
                await replica.unused.wait()
        except BaseException:
            self.change(replica, State.READY)
            raise

    async def stop(self, replica: Replica) -> None:
        """Stop a replica whose transition was cancelled at any step."""
        async with self._transition(replica):
            await self._stop(replica, "it was unloaded")

    def _settle(self, replica: Replica, level: Level, state: State, note: str = "") -> None:
        replica.level = level
        self._reserve(replica, level)
        self.change(replica, state, note)

    async def end_engine(self, replica: Replica) -> None:
        """End an engine, dead or alive, and forget it.

        The end is awaited also when the caller is cancelled: until then the engine holds memory.
        """
        running, replica.running = replica.running, None
        if running is None:
            replica.level = Level.STOPPED
            return
        ending = asyncio.create_task(_end(replica.name, running))
        cancelled: asyncio.CancelledError | None = None
        while not ending.done():
            try:
                await asyncio.wait({ending})
            except asyncio.CancelledError as error:
                cancelled = error
        replica.level = Level.STOPPED
        if cancelled is not None:
            raise cancelled

    # --- deaths

    async def restart(self, replica: Replica) -> None:
        """Replace a dead engine, with a longer pause each time; its memory stays reserved once."""
        again = True
        while again:
            async with self._transition(replica):
                await self.end_engine(replica)
            await asyncio.sleep(replica.started - time.monotonic())
            await self.make_ready(replica)
            again = replica.state is not State.READY and self.schedule_restart(
                replica, replica.note, 0.0
            )

    async def discard(self, replica: Replica) -> None:
        """End a dead engine that is not started again."""
        async with self._transition(replica):
            await self.end_engine(replica)
            self._reserve(replica, Level.STOPPED)

    def schedule_restart(self, replica: Replica, note: str, lived_s: float) -> bool:
        """Count a death; return whether the replica waits for a restart, or else has failed."""
        self.count_death(replica)
        timings = self._timings
        stable = lived_s >= timings.stable_s
        pause_s = replica.deaths.pause_s(timings.first_restart_s, stable=stable)
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

    # --- requests and reloads

    def record_idle(self, replica: Replica) -> None:
        """Record that the last request of a replica has ended."""
        replica.unused.set()
        self.check_memory()

    def forget_failures(self, replica: Replica) -> None:
        """Let a replica start again that failed too often."""
        replica.deaths.forget()
        replica.failures.forget()

    def leave(self, replica: Replica) -> None:
        """Allow the eviction of a replica whose model has left the pool."""
        replica.leaves = True
        self.check_memory()

    async def rebuild(self, replicas: Iterable[Replica], spec: ModelSpec) -> None:
        """Give running engines the handlers of a changed spec: all of them, or none.

        Raises what the first failure raises.
        """
        async with contextlib.AsyncExitStack() as locks:  # none starts or ends meanwhile
            for replica in replicas:
                await locks.enter_async_context(self._transition(replica))
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
            self.check_memory()
        replica.model.record_change(replica, before)

    # --- memory

    def check_memory(self) -> None:
        """Let waiting replicas look again whether they fit or may evict others."""
        self._memory_changed.set()

    def _reserve(self, replica: Replica, level: Level) -> None:
        if level:
            self._reserved[replica] = level
        else:
            self._reserved.pop(replica, None)
        self.check_memory()

    async def _reserve_ready(self, replica: Replica) -> bool:
        """Reserve the memory of READY, once others have freed it; False: the replica failed."""
        async with replica.transition_lock:  # no engine ends in the old placement any more
            if replica.level is Level.STOPPED:
                replica.placement = replica.next_placement
        needed = replica.bytes_at(Level.READY)
        places = needed.keys() - {HOST_MEMORY} or needed.keys()
        async with self._queue.hold(places, alone=True):
            async with replica.transition_lock:  # a transition downward has ended
                pass
            try:
                await self._evict_others(replica, needed)
            except StartupError as error:
                async with self._transition(replica):
                    await self._fail(replica, error.message)
                return False
            self._reserved[replica] = Level.READY
            return True

    async def _evict_others(self, replica: Replica, needed: Takes) -> None:
        """Evict others until `needed` fits. Raises StartupError if it cannot fit."""
        self._raise_if_too_large(replica, needed)
        while True:
            self._memory_changed.clear()  # before the look, so that no change is missed
            steps = self._eviction_steps(replica, needed)
            if steps is None:
                await self._wait_for_memory(replica)
            elif steps:
                await in_parallel(self._evict(*step, replica) for step in steps)
            else:
                return

    async def _evict(self, replica: Replica, level: Level, other: Replica) -> None:
        to = level.name.lower()
        log.info("model=%s is evicted for model=%s level=%s", replica.name, other.name, to)
        replica.evictions += 1
        self._metrics.evictions.labels(replica.model.name, replica.number, to).inc()
        idle = not replica.load.requests
        await self.lower(replica, level, lambda: not (idle and replica.load.requests))

    async def _wait_for_memory(self, replica: Replica) -> None:
        """Wait for a change of the reservations, states or loads, or the end of a residency."""
        if replica.state is not State.WAITING:
            self.change(replica, State.WAITING, "waiting for memory")
        stays_s = [self._evictable_in_s(each, busy=True) for each in self._reserved]
        soonest_s = min((each for each in stays_s if 0.0 < each < math.inf), default=None)
        timeout_s = None if soonest_s is None else max(soonest_s, _SHORTEST_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._memory_changed.wait()

    def _eviction_steps(self, replica: Replica, needed: Takes) -> Steps[Replica] | None:
        """The replicas to evict; busy ones only if the idle ones do not suffice."""
        for busy in (False, True):
            others = [
                Resident(
                    other,
                    level,
                    other.holds,
                    level is other.level
                    and other.model is not replica.model
                    and not self._evictable_in_s(other, busy=busy),
                    (other.model.spec.priority, self._recency(other)),
                )
                for other, level in self._reserved.items()
                if other is not replica
            ]
            steps = plan_eviction(needed, self._memory.capacity, others)
            if steps is not None:
                return steps
        return None

    def _recency(self, replica: Replica) -> float:
        """The less, the longer it has been idle, in load times."""
        return -replica.idle_s / max(self._load_time_s(replica), _SHORTEST_S)

    def fits(self, replicas: Iterable[Replica]) -> bool:
        """Whether they fit beside all others, of which at most sleepers are evicted."""
        needed: Counter[Place] = Counter()
        for replica in replicas:
            needed.update(replica.bytes_at(Level.READY))
        others = [
            Resident(
                each,
                level,
                each.holds,
                each.state is State.SLEEPING and not self._evictable_in_s(each, busy=False),
            )
            for each, level in self._reserved.items()
        ]
        return plan_eviction(needed, self._memory.capacity, others) is not None

    def _raise_if_too_large(self, replica: Replica, needed: Takes) -> None:
        staying = [
            each.bytes_at(level)
            for each, level in self._reserved.items()
            if each is not replica and (each.is_pinned or each.model is replica.model)
        ]
        for place, capacity in self._memory.capacity.items():
            free = capacity - sum(held.get(place, 0) for held in staying)
            if needed.get(place, 0) > free:
                raise StartupError(
                    f"it needs {gib(needed[place])}, and pinned models and its own other replicas "
                    f"leave {gib(free)} of {place}"
                )

    def _evictable_in_s(self, replica: Replica, *, busy: bool) -> float:
        """Seconds until a replica may be evicted; inf: not before its state or load changes.

        Replicas with requests may be evicted with `busy` only. The wait is the rest of the
        minimum residency time.
        """
        if replica.is_pinned or replica.transition_lock.locked():
            return math.inf
        if replica.state is not State.READY:
            return 0.0 if replica.state is State.SLEEPING else math.inf
        timings, stay_s = self._timings, self._load_time_s(replica)
        if replica.load.requests:
            if not busy:
                return math.inf
            stay_s = max(timings.min_busy_residency_s, timings.busy_residency * stay_s)
        stayed_s = time.monotonic() - replica.since
        return max(0.0, min(stay_s, timings.max_residency_s) - stayed_s)

    def _load_time_s(self, replica: Replica) -> float:
        """The expected seconds until it would be ready again after an eviction."""
        running = replica.running
        if running is None or not running.sleeps:
            return replica.cost_s.get(Level.STOPPED, 0.0)
        asleep = [seconds for level, seconds in replica.cost_s.items() if level]
        return max(asleep, default=self._timings.first_wake_s)


async def _end(name: str, running: Running) -> None:
    try:
        await running.stop()
    except Exception:
        log.exception("model=%s did not stop cleanly", name)
