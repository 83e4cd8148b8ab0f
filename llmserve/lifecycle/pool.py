"""Every model's replicas and line: who gets a request now, who waits, who comes and goes.

What a replica goes through is `life`'s; this decides when. Engines are started by a
`Backend`, so that all of this can be run without one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from llmserve.errors import EngineDead, LLMServeError, Overloaded, StartupError, quoted
from llmserve.lifecycle.dispatch import DispatchRequest
from llmserve.lifecycle.events import Events
from llmserve.lifecycle.lease import Lease, ModelRequest, Task
from llmserve.lifecycle.placement import Level
from llmserve.lifecycle.replica import AT_REST, STARTING, Replica, State
from llmserve.lifecycle.response_store import Archive
from llmserve.lifecycle.served_model import ServedModel
from llmserve.lifecycle.transitions import ReplicaLifecycle
from llmserve.registry.names import ModelNames

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from prometheus_client import CollectorRegistry, Counter

    from llmserve.lifecycle.admission import QueuedRequest
    from llmserve.lifecycle.placement import Placement
    from llmserve.lifecycle.replica import Backend
    from llmserve.metrics import Metrics
    from llmserve.registry.names import Model

log = logging.getLogger(__name__)
Way: TypeAlias = "Callable[[Replica], Coroutine[Any, Any, None]]"  # from one state to another
_STOPPING_RETRY_S = 5
_DRAIN_LOOK_S = 0.05


def cut_off() -> Overloaded:
    return Overloaded(
        "The server is stopping, and the time for running requests is over.",
        retry_after_s=_STOPPING_RETRY_S,
        code="shutting_down",
    )


class Pool:
    def __init__(
        self,
        registry: ModelNames,
        backend: Backend,
        metrics: Metrics,
        on_change: Callable[[Replica], None] = lambda _: None,
    ) -> None:
        self.registry = registry  # the names that `entries` answer to
        self.entries: dict[str, ServedModel] = {}
        self.leases: dict[Lease, None] = {}  # in the order in which they were given
        self.events = Events()
        self.life = ReplicaLifecycle(backend, metrics, self._changed)
        self._archive = Archive()
        self._backend = backend
        self._metrics = metrics
        self._on_change = on_change
        self._closed = False
        self._comings: dict[Replica, Task] = {}  # brought or revived
        self._ending: set[Replica] = set()  # of these: on the way down, which is short
        # Those whose coming is being broken off, until they are stopped.
        self._broken: dict[Replica, asyncio.Future[None]] = {}
        self._dispatched: dict[Replica, Counter] = {}  # where there is a choice
        self._owner: dict[Replica, ServedModel] = {}  # also of models that leave
        for model in registry.models:
            self.add(self.create(model))

    # --- who is here

    @property
    def replicas(self) -> list[Replica]:
        """Those of every model, in the order of the registry, and of those that leave."""
        return list(self._owner)

    def create(self, model: Model, kept: Iterable[Replica] = ()) -> ServedModel:
        """A model with engines of its own, or with some that run already; not here yet."""
        there = {replica.number: replica for replica in kept}
        placements = self._placements(model)
        replicas = [there.get(each.number) or Replica(model, each) for each in placements]
        entry = ServedModel(model, replicas, self._serve_queue)
        entry.responses = self._archive.of_model()
        entry.ready = tuple(each for each in replicas if each.state is State.READY)
        for replica in replicas:
            self._owner[replica] = entry
        entry.apply_spec(model, placements)
        return entry

    def _placements(self, model: Model) -> list[Placement]:
        return [self._backend.memory.place(model.spec, each) for each in range(model.spec.replicas)]

    def apply_spec(self, entry: ServedModel, model: Model) -> None:
        """Go on by a new registry, in which this model keeps its engines."""
        entry.apply_spec(model, self._placements(model))
        self._publish()

    def _publish(self) -> None:
        """Let requests find the models by the names that they answer to now."""
        self.registry = ModelNames(entry.model.spec for entry in self.entries.values())

    def add(self, entry: ServedModel) -> None:
        """From now on this is the model of its name; requests that wait for it wait on here."""
        before = self.entries.get(entry.name)
        if before not in (None, entry):
            if set(before.replicas) & set(entry.replicas):
                entry.inherit(before)
            entry.responses = before.responses
            self.remove(before)
        self.entries[entry.name] = entry
        self._publish()
        self._metrics.in_flight.labels(entry.name).set_function(entry.slots.count)
        self._metrics.queued.labels(entry.name).set_function(entry.slots.waiting)
        for replica in entry.replicas:
            if replica.running is not None:
                replica.running.share(entry.responses)
            self._show_gauges(replica)
            if entry.policy is not None:
                self._count(replica)
        if before not in (None, entry):
            before.slots.move_to(entry.slots)
        self._serve_queue(entry)

    def sort(self, names: Iterable[str]) -> None:
        """Show the models in this order."""
        self.entries = {name: self.entries[name] for name in names}
        shown = [each for entry in self.entries.values() for each in entry.replicas]
        rest = [each for each in self._owner if each not in shown]
        self._owner = {each: self._owner[each] for each in (*shown, *rest)}
        self._publish()

    def remove(self, entry: ServedModel) -> None:
        """Nobody finds it any more; those in its line may still."""
        del self.entries[entry.name]
        self._publish()
        self._forget(entry)
        for replica in entry.replicas:
            if self._owner[replica] is entry:
                self.life.leave(replica)

    async def end(self, entry: ServedModel, replicas: Iterable[Replica] | None = None) -> None:
        """End engines of a model that leaves, once its requests have ended."""
        while entry.slots.waiting() and self._serves_later(entry):  # noqa: ASYNC110  # once
            await asyncio.sleep(_DRAIN_LOOK_S)
        replicas = entry.replicas if replicas is None else tuple(replicas)
        for replica in replicas:
            self.life.retire(replica)
        await asyncio.gather(*(self._ended(each) for each in replicas))
        for replica in replicas:
            self._owner.pop(replica, None)
            self._dispatched.pop(replica, None)

    async def _ended(self, replica: Replica) -> None:
        """Also if it is on its way, which is waited for."""
        await self.life.lower(replica, Level.STOPPED)
        while (coming := self._comings.get(replica)) is not None:
            await asyncio.wait({coming})
            await self.life.lower(replica, Level.STOPPED)

    def _forget(self, entry: ServedModel) -> None:
        for shown in (self._metrics.in_flight, self._metrics.queued):
            shown.remove(entry.name)
        for replica in entry.replicas:
            self._remove_gauges(replica)

    def _remove_gauges(self, replica: Replica) -> None:
        """Gauges of what is no more; what was counted stays, as counters do."""
        here = {"model": replica.model.name, "replica": str(replica.number)}
        figures = self._metrics
        for gauge in (
            figures.state,
            figures.ready_seconds,
            figures.start_step_seconds,
            figures.tokens_in_flight,
        ):
            samples = [sample for family in gauge.collect() for sample in family.samples]
            for labels in (each.labels for each in samples if here.items() <= each.labels.items()):
                gauge.remove(*labels.values())

    # --- asking

    def entry(self, name: str) -> ServedModel:
        """That of a public name. Raises ModelNotFound."""
        return self.entries[self.registry.find(name).name]

    def lease(self, wish: ModelRequest) -> Lease | QueuedRequest[ModelRequest, Lease]:
        """Leave to send one request to its model, or a place in the queue for that.

        Deciding and queueing are one step, so that no change comes between. A place starts the
        model if it is at rest. Raises ModelNotFound, or Overloaded if it may not wait: the queue
        is full or too long, the model starts for another reason than requests (unless the engine
        died over this one), or the server stops; or EngineDead.
        """
        entry = self.entry(wish.name)
        if self._closed:
            raise cut_off()
        if entry.slots.free and (living := self._live_replicas(entry)):
            return self._try_lease(entry, living, wish)
        if not entry.ready and not entry.queues_requests and not (wish.before and entry.is_usable):
            raise self._not_ready(entry)
        ready_in_s = None if entry.ready else entry.furthest.ready_in_s
        if not wish.before:  # that one has been admitted
            entry.slots.raise_if_full(wish.deadline, ready_in_s or 0.0)
        return entry.slots.join(wish.deadline, wish)

    def _try_lease(
        self, entry: ServedModel, living: Sequence[Replica], wish: ModelRequest
    ) -> Lease:
        replica, tokens = living[0], 0
        if entry.policy is not None:
            ask = DispatchRequest.of(wish.name, wish.body, wish.endpoint.answer_tokens)
            replica, tokens = entry.policy.choose(living, ask), ask.tokens
            self._dispatched[replica].inc()
        if replica.running is None:
            raise self._not_ready(entry)
        slot = entry.slots.take()
        held = (slot, tokens, self.leases, wish.deadline, wish.task)
        return Lease(replica, replica.running, *held)

    def _live_replicas(self, entry: ServedModel) -> Sequence[Replica]:
        """The replicas that are ready, without those whose engine has died.

        These have the least to do, and would get every request.
        """
        if any(_is_dead(replica) for replica in entry.ready):
            for replica in entry.ready:
                self.handle_death(replica)
            return [replica for replica in entry.ready if not _is_dead(replica)]
        return entry.ready

    def _serve_queue(self, entry: ServedModel) -> None:
        """Let in those that wait, or start their model, or send them away.

        Called after each change of what they wait for: the queue, slots, limit or states.
        """
        if not entry.slots.waiting():
            return
        if living := self._live_replicas(entry):
            entry.slots.advance(partial(self._try_lease, entry, living))
        elif self._closed:
            entry.slots.refuse(cut_off)
        elif self._serves_later(entry):
            self._start_on_demand(entry)
        else:
            entry.slots.refuse(lambda: self._not_ready(entry))

    def _serves_later(self, entry: ServedModel) -> bool:
        """Whether those that wait for it may still be let in."""
        coming = any(each in self._comings and not each.retired for each in entry.replicas)
        return coming or entry.is_usable or entry.is_idle_on_demand

    def _not_ready(self, entry: ServedModel) -> LLMServeError:
        name = quoted(entry.name)
        if entry.is_usable:
            return Overloaded(
                f"The model {name} is {entry.state}; try again.",
                retry_after_s=entry.retry_after_s,
                code="model_not_ready",
            )
        if deaths := entry.furthest.deaths.in_a_row:
            return EngineDead(f"The engine of {name} died {deaths} times and is not started again.")
        return EngineDead(f"The model {name} could not be started.", code="model_failed")

    def ready(self) -> list[ServedModel]:
        return [entry for entry in self.entries.values() if entry.ready]

    def registries(self) -> Iterable[CollectorRegistry]:
        return [each.running.registry for each in self.replicas if each.running is not None]

    # --- coming

    async def ensure_started(self, entry: ServedModel) -> None:
        """Until each of its replicas is ready, or has failed."""
        if self._closed:
            raise cut_off()
        if not await self.wait_started(entry):  # also on the way to sleep
            return
        for replica in entry.replicas:
            if replica.state in AT_REST or replica.state is State.FAILED:
                self.life.queue_requests(replica)
                self._begin_transition(replica, self.life.to_ready)
        await self.wait_started(entry)

    async def start_late(self, entry: ServedModel) -> None:
        """Start the replicas of a model that has just come, and wait for them."""
        for replica in entry.replicas:
            if replica.level is Level.STOPPED:
                self._begin_transition(replica, self.life.start)
        await self.wait_started(entry)

    async def wait_started(self, entry: ServedModel) -> bool:
        """Until those of its replicas that are on their way are ready, or have failed.

        False if that was broken off meanwhile; they are stopped then.
        """
        coming = [self._comings[each] for each in entry.replicas if each in self._comings]
        if coming:
            await asyncio.wait(coming)
        if broken := {self._broken[each] for each in entry.replicas if each in self._broken}:
            await asyncio.wait(broken)
        return not (coming and broken)

    async def end_now(self, entry: ServedModel) -> None:
        """Stop a model without waiting for a start, wake or restart that is under way."""
        coming = self._comings.keys() - self._ending
        broken = [each for each in entry.replicas if each in coming]
        others = [each for each in entry.replicas if each not in coming]
        rests = [self.life.lower(each, Level.STOPPED) for each in others]
        await asyncio.gather(self._break_off(broken), *rests)
        self._serve_queue(entry)

    async def _break_off(self, replicas: Sequence[Replica]) -> None:
        comings = [self._comings[each] for each in replicas]
        stopped = asyncio.get_running_loop().create_future()
        self._broken |= dict.fromkeys(replicas, stopped)  # nothing brings them before that
        try:
            for coming in comings:
                coming.cancel()
            if comings:
                await asyncio.wait(comings)
            await asyncio.gather(*(self.life.stop(each) for each in replicas))
        finally:
            for replica in replicas:
                if self._broken.get(replica) is stopped:
                    del self._broken[replica]
            stopped.set_result(None)

    async def start(self) -> None:
        """Start every replica that is not lazy, all at once; returns when all have started.

        Those that are to sleep come first: later there may be no room to start them. Raises
        StartupError if none of several could be, or as soon as none of a required model can.
        """
        first = [each for each in self.replicas if each.state is State.WAITING]
        first.sort(key=lambda replica: replica.model.spec.start != "sleeping")
        for replica in first:
            self._begin_transition(replica, self.life.start)
        starts = {self._comings[replica] for replica in first if replica in self._comings}
        try:
            while starts:
                _, starts = await asyncio.wait(starts, return_when=asyncio.FIRST_COMPLETED)
                for entry in self.entries.values():
                    _raise_if_required(entry)
        except BaseException:
            for start in starts:
                start.cancel()
            raise
        if not any(entry.is_usable for entry in self.entries.values()):
            raise StartupError("no model could be started")

    def _start_on_demand(self, entry: ServedModel) -> None:
        for replica in entry.replicas:
            if replica.can_start:
                self.life.queue_requests(replica)
                self._begin_transition(replica, self.life.to_ready)

    def _begin_transition(self, replica: Replica, way: Way, *, ends: bool = False) -> None:
        """Go `way` unless the replica is on one; at its end `_came` looks what is to do then.

        `ends`: down, which nothing breaks off.
        """
        is_free = replica not in self._comings and replica not in self._broken
        if is_free and not (self._closed or replica.retired):
            if ends:
                self._ending.add(replica)
            coming = asyncio.create_task(way(replica))
            self._comings[replica] = coming
            coming.add_done_callback(partial(self._end_transition, replica))

    def _end_transition(self, replica: Replica, coming: Task) -> None:
        del self._comings[replica]
        self._ending.discard(replica)
        if not coming.cancelled() and (error := coming.exception()) is not None:
            log.error("model=%s unforeseen", replica.name, exc_info=error)
        if replica in self._owner:
            self.handle_death(replica)
            self._serve_queue(self._owner[replica])

    # --- states

    def _changed(self, replica: Replica, before: State) -> None:
        if replica not in self._owner:
            return  # it has left
        if replica.state is not before:
            self._moved(replica, before)
        self._on_change(replica)

    def _moved(self, replica: Replica, before: State) -> None:
        entry = self._owner[replica]
        entry.ready = tuple(each for each in entry.replicas if each.state is State.READY)
        if before is State.READY and entry.policy is not None:
            entry.policy.forget(replica.number)
        if self.entries.get(entry.name) is entry:  # else it comes or leaves under another's name
            self._show_gauges(replica)
        if replica.state is State.READY and replica.running is not None:
            replica.running.share(entry.responses)
        self.events.tell(replica, before)
        log.info("model=%s state=%s", replica.name, replica.state)
        self._serve_queue(entry)

    def _show_gauges(self, replica: Replica) -> None:
        model, number = replica.model.name, replica.number
        for state in State:
            shown = self._metrics.state.labels(model, number, state.value)
            shown.set(state is replica.state)
        for level, seconds in replica.cost_s.items():
            self._metrics.ready_seconds.labels(model, number, level.name.lower()).set(seconds)
        for step, seconds in replica.took.items():
            self._metrics.start_step_seconds.labels(model, number, step).set(seconds)

    def _count(self, replica: Replica) -> None:
        model, number = replica.model.name, replica.number
        tokens = self._metrics.tokens_in_flight.labels(model, number)
        tokens.set_function(lambda: replica.load.tokens)
        policy = replica.model.spec.dispatch
        self._dispatched[replica] = self._metrics.dispatched.labels(model, number, policy)

    def handle_death(self, replica: Replica) -> bool:
        """Whether the engine of a replica has died, which is then known everywhere."""
        if not _is_dead(replica) or replica.state not in (State.READY, State.SLEEPING):
            return False
        if replica.transition_lock.locked() or replica in self._comings:
            return False  # it is looked at again when that is over
        if self._closed or replica.retired:
            self.life.change(replica, State.FAILED, "its engine died")
        elif replica.state is State.SLEEPING:
            self._metrics.deaths.labels(replica.model.name, replica.number).inc()
            self._begin_transition(
                replica, partial(self.life.lower, level=Level.STOPPED), ends=True
            )
        elif self.life.restart_dead(replica, "its engine died", time.monotonic() - replica.since):
            self._begin_transition(replica, self.life.revive)
        else:
            self._begin_transition(replica, self.life.discard, ends=True)
        return True

    # --- the end

    def close(self) -> None:
        """Admit no more requests, and send away those that wait for their model."""
        self._closed = True
        for entry in self._all():
            if not entry.ready:
                entry.slots.refuse(cut_off)

    def _all(self) -> Iterable[ServedModel]:
        """Models that leave included."""
        return dict.fromkeys((*self.entries.values(), *self._owner.values()))

    async def drain(self, timeout_s: float) -> None:
        """Admit no more, wait for running requests, cut off those that take too long."""
        self.close()
        end = time.monotonic() + timeout_s
        while self._busy() and time.monotonic() < end:  # noqa: ASYNC110  # once in a life
            await asyncio.sleep(_DRAIN_LOOK_S)
        for entry in self._all():
            entry.slots.refuse(cut_off)
        for lease in list(self.leases):
            lease.cut(cut_off())

    def _busy(self) -> bool:
        return bool(self.leases) or any(entry.slots.waiting() for entry in self._all())

    async def stop(self) -> None:
        """End all engines, all at once."""
        self.close()
        if any(replica.state in STARTING for replica in self.replicas):
            self._backend.kill()
        if comings := list(self._comings.values()):
            for coming in comings:
                coming.cancel()
            await asyncio.wait(comings)
        running = [replica for replica in self.replicas if replica.running is not None]
        await asyncio.gather(*(self.life.end(replica) for replica in running))
        for replica in running:
            self.life.change(replica, State.STOPPED)

    def kill(self) -> None:
        self._backend.kill()


def _is_dead(replica: Replica) -> bool:
    return replica.running is not None and replica.running.dead


def _raise_if_required(entry: ServedModel) -> None:
    if entry.state is State.FAILED and entry.model.spec.required:
        raise StartupError(f"{entry.name} is required and failed: {entry.note}")
