"""Every replica's life: waiting, downloading, loading, warming, ready, failed, stopped.

One whose engine dies is started again. The one owner of these states. Engines are started by a `Backend`, so that all of this
can be run without one.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from llmserve.admission import Slot, Slots
from llmserve.deaths import Deaths
from llmserve.dispatch import Ask, Load, policy_of
from llmserve.errors import EngineDead, LLMServeError, Overloaded, StartupError, quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from prometheus_client import CollectorRegistry, Counter
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Scope

    from llmserve.config import ModelSpec
    from llmserve.dispatch import Policy
    from llmserve.metrics import Metrics
    from llmserve.protocol import Endpoint
    from llmserve.registry import Model, Registry

log = logging.getLogger(__name__)
Task = asyncio.Task[None]

_WATCH_S = 0.5  # a dead engine is noticed this soon
_ASK_EVERY_S = 10.0
HUNG_S = 45.0  # an engine that says nothing for so long is taken for dead; steps are shorter
_LOADING_RETRY_S = 5
_STOPPING_RETRY_S = 5
_DRAIN_LOOK_S = 0.05


class State(StrEnum):
    WAITING = "waiting"
    DOWNLOADING = "downloading"
    LOADING = "loading"
    WARMING = "warming"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


STARTING = frozenset({State.WAITING, State.DOWNLOADING, State.LOADING, State.WARMING})
# A model's state is that of its replica which comes first here.
_FURTHEST = (
    State.READY,
    State.WARMING,
    State.LOADING,
    State.DOWNLOADING,
    State.WAITING,
    State.STOPPED,
    State.FAILED,
)


class Running(Protocol):
    """A replica that answers."""

    able: frozenset[str]
    took: Mapping[str, float]  # seconds of its start, by step

    @property
    def max_model_len(self) -> int: ...
    @property
    def dead(self) -> bool: ...
    @property
    def registry(self) -> CollectorRegistry: ...
    def express(
        self, endpoint: str, body: dict[str, Any], asked: str, scope: Scope
    ) -> ASGIApp | None:
        """The answer to a request like an earlier one; None if it needs `call`."""
        ...

    async def call(
        self, endpoint: str, body: dict[str, Any], asked: str, request: Request
    ) -> ASGIApp: ...
    async def fetch_response(self, response_id: str, query: dict[str, Any]) -> Response:
        """Any replica of the model has it, whichever made it."""
        ...

    async def cancel_response(self, response_id: str) -> Response: ...
    async def responds(self, within_s: float) -> bool:
        """Whether its engine answers a question that it can answer between two steps."""
        ...

    def kill(self) -> None:
        """End its engine's processes now, hung or not; `dead` tells when it is noticed."""
        ...

    async def stop(self) -> None: ...


class Backend(Protocol):
    async def start(
        self, spec: ModelSpec, number: int, report: Callable[[State, str], None]
    ) -> Running:
        """Start one of the model's replicas, which are numbered from 0.

        Raises StartupError with the cause in one line.
        """
        ...

    def kill(self) -> None:
        """End every engine process at once, those of starts under way too."""
        ...


class Replica:
    """One engine of a model and where it is in its life."""

    def __init__(self, model: Model, number: int) -> None:
        self.model = model
        self.number = number  # of the model's replicas, from 0
        self.state = State.WAITING
        self.note = ""  # progress, or why it failed
        self.running: Running | None = None
        self.started = time.monotonic()  # or when it will be
        self.seconds = 0.0  # what the start took
        self.usual_s: float | None = None  # what the last one took that succeeded
        self.ready_since = math.inf
        self.deaths = Deaths()
        self.load = Load()

    @property
    def took(self) -> Mapping[str, float]:
        """Seconds of its start, by step."""
        return self.running.took if self.running is not None else {}

    @property
    def ready_in_s(self) -> int:
        """An estimate, in whole seconds, while it waits or starts."""
        if self.usual_s is None:
            return _LOADING_RETRY_S
        return max(1, math.ceil(self.started + self.usual_s - time.monotonic()))

    @property
    def name(self) -> str:
        several = self.model.spec.replicas > 1
        return f"{self.model.name}/{self.number}" if several else self.model.name


class Entry:
    """A model: its replicas, and what they share."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.replicas = tuple(Replica(model, number) for number in range(model.spec.replicas))
        self.ready: tuple[Replica, ...] = ()
        self.slots = Slots(model.name, model.spec.max_in_flight)
        self.policy: Policy | None = policy_of(model.spec)  # None: there is one replica

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def furthest(self) -> Replica:
        """The replica by which the model is judged."""
        if self.ready:
            return self.ready[0]
        return min(self.replicas, key=lambda replica: _FURTHEST.index(replica.state))

    @property
    def state(self) -> State:
        return self.furthest.state

    @property
    def note(self) -> str:
        return self.furthest.note

    @property
    def running(self) -> Running | None:
        return self.furthest.running


@dataclass(eq=False, slots=True)
class Lease:
    """A running replica and a slot of its model, until released."""

    replica: Replica
    running: Running
    _slot: Slot
    _tokens: int
    _leases: set[Lease]
    _task: Task | None
    was_cut: bool = False  # its request was ended by the server's own end

    def __post_init__(self) -> None:
        self.replica.load.add(self._tokens)
        self._leases.add(self)

    @property
    def model(self) -> str:
        return self.replica.model.name

    def release(self) -> None:
        """Give back what it holds; again is no mistake."""
        if self in self._leases:
            self._leases.discard(self)
            self._slot.release()
            self.replica.load.remove(self._tokens)

    def cut(self) -> None:
        """Cancel the request; whoever handles it answers for that (`cut_off`)."""
        self.was_cut = True
        if self._task is not None:
            self._task.cancel()


def cut_off() -> Overloaded:
    return Overloaded(
        "The server is stopping, and the time for running requests is over.",
        retry_after_s=_STOPPING_RETRY_S,
        code="shutting_down",
    )


class Pool:
    def __init__(
        self,
        registry: Registry,
        backend: Backend,
        metrics: Metrics,
        on_change: Callable[[Replica], None] = lambda _: None,
    ) -> None:
        self.registry = registry
        self.entries = {model.name: Entry(model) for model in registry.models}
        self._backend = backend
        self._metrics = metrics
        self._on_change = on_change
        self._closed = False
        self._leases: set[Lease] = set()
        self._revivals: set[Task] = set()
        self._asked: dict[Replica, Task] = {}  # whether it hangs
        self._dispatched: dict[Replica, Counter] = {}  # where there is a choice
        for entry in self.entries.values():
            metrics.in_flight.labels(entry.name).set_function(entry.slots.count)
        for replica in self.replicas:
            self._show(replica)
            if replica.model.spec.replicas > 1:
                self._count(replica)

    # --- asking

    @property
    def replicas(self) -> list[Replica]:
        """Those of every model, in the order of the registry."""
        return [replica for entry in self.entries.values() for replica in entry.replicas]

    def lease(
        self, name: str, endpoint: Endpoint, body: dict[str, Any], task: Task | None = None
    ) -> Lease:
        """Leave to send one request to the model of a public name; `task` handles it.

        Raises ModelNotFound, or Overloaded while it loads, is full, or the server
        stops, or EngineDead.
        """
        entry = self.entries[self.registry.find(name).name]
        if self._closed:
            raise cut_off()
        replica, tokens = entry.replicas[0], 0
        if entry.policy is not None:
            replica, tokens = self._chosen(entry, entry.policy, name, endpoint, body)
        if replica.running is None or replica.state is not State.READY:
            raise self._not_ready(entry)
        slot = entry.slots.take()
        if entry.policy is not None:
            self._dispatched[replica].inc()
        return Lease(replica, replica.running, slot, tokens, self._leases, task)

    def _chosen(
        self, entry: Entry, policy: Policy, name: str, endpoint: Endpoint, body: dict[str, Any]
    ) -> tuple[Replica, int]:
        """The replica for a request, and the request's tokens; one that is not ready if none is.

        An engine that died a moment ago has the least to do, and would get every request.
        """
        ask = Ask.of(name, body, endpoint.answer_tokens)
        while entry.ready:
            replica = policy.choose(entry.ready, ask)
            if not self._died(replica):
                return replica, ask.tokens
        return entry.furthest, ask.tokens

    def _not_ready(self, entry: Entry) -> LLMServeError:
        name = quoted(entry.name)
        if entry.state in STARTING:
            return Overloaded(
                f"The model {name} is {entry.state}; try again.",
                retry_after_s=entry.furthest.ready_in_s,
                code="model_not_ready",
            )
        if deaths := entry.furthest.deaths.in_a_row:
            return EngineDead(f"The engine of {name} died {deaths} times and is not started again.")
        return EngineDead(f"The model {name} could not be started.", code="model_failed")

    def ready(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.ready]

    def registries(self) -> Iterable[CollectorRegistry]:
        return [each.running.registry for each in self.replicas if each.running is not None]

    # --- life

    async def start(self) -> None:
        """Start every replica, all at once; returns when each is ready or has failed.

        Raises StartupError if none is ready, or as soon as none of a required model can be.
        """
        starts = [asyncio.create_task(self._start(replica)) for replica in self.replicas]
        try:
            for finished in asyncio.as_completed(starts):
                _unless_required(self.entries[await finished])
        except BaseException:
            for start in starts:
                start.cancel()
            raise
        if all(entry.state not in STARTING | {State.READY} for entry in self.entries.values()):
            raise StartupError("no model could be started")

    async def _start(self, replica: Replica) -> str:
        """The name of the replica's model, when it is ready or has failed."""
        replica.started = time.monotonic()
        try:
            replica.running = await self._backend.start(
                replica.model.spec,
                replica.number,
                lambda state, note: self._change(replica, state, note),
            )
        except StartupError as error:
            self._change(replica, State.FAILED, error.message)
        except Exception as error:
            # Whatever it is, it is this replica's: the others go on.
            log.exception("model=%s unforeseen", replica.name)
            self._change(replica, State.FAILED, f"{type(error).__name__}: {error}")
        else:
            self._change(replica, State.READY)
        return replica.model.name

    def _change(self, replica: Replica, state: State, note: str = "") -> None:
        before = replica.state
        if before in STARTING and state not in STARTING:
            replica.seconds = time.monotonic() - replica.started
        replica.state, replica.note = state, note
        if state is not before:
            self._moved(replica, before)
        self._on_change(replica)

    def _moved(self, replica: Replica, before: State) -> None:
        entry = self.entries[replica.model.name]
        entry.ready = tuple(each for each in entry.replicas if each.state is State.READY)
        if before is State.READY and entry.policy is not None:
            entry.policy.forget(replica.number)
        if replica.state is State.READY:
            replica.usual_s, replica.ready_since = replica.seconds, time.monotonic()
            self._show_start(replica)
        self._show(replica)
        log.info("model=%s state=%s", replica.name, replica.state)

    def _show_start(self, replica: Replica) -> None:
        model, number = replica.model.name, replica.number
        self._metrics.start_seconds.labels(model, number).set(replica.seconds)
        for step, seconds in replica.took.items():
            self._metrics.start_step_seconds.labels(model, number, step).set(seconds)

    def _show(self, replica: Replica) -> None:
        for state in State:
            shown = self._metrics.state.labels(replica.model.name, replica.number, state.value)
            shown.set(state is replica.state)

    def _count(self, replica: Replica) -> None:
        model, number = replica.model.name, replica.number
        tokens = self._metrics.tokens_in_flight.labels(model, number)
        tokens.set_function(lambda: replica.load.tokens)
        policy = replica.model.spec.dispatch
        self._dispatched[replica] = self._metrics.dispatched.labels(model, number, policy)

    async def watch(self) -> None:
        """Notice engines that die, until cancelled."""
        while True:
            await asyncio.sleep(_WATCH_S)
            for entry in self.ready():
                for replica in entry.ready:
                    self._died(replica)

    async def watch_hung(self) -> None:
        """End engines that hang, until cancelled; `watch` then finds them dead."""
        while True:
            await asyncio.sleep(_ASK_EVERY_S)
            for replica in (each for entry in self.ready() for each in entry.ready):
                if replica not in self._asked:
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
            log.error("model=%s has said nothing for %g s: killed", replica.name, HUNG_S)
            running.kill()

    def _died(self, replica: Replica) -> bool:
        """Whether the engine of a ready replica has died, which is then known everywhere."""
        if replica.running is None or not replica.running.dead:
            return False
        self._metrics.deaths.labels(replica.model.name, replica.number).inc()
        lived_s = time.monotonic() - replica.ready_since
        if self._closed:
            self._change(replica, State.FAILED, "its engine died")
        elif self._again(replica, "its engine died", lived_s):
            revival = asyncio.create_task(self._revive(replica))
            self._revivals.add(revival)
            revival.add_done_callback(self._revivals.discard)
        return True

    def _again(self, replica: Replica, note: str, lived_s: float) -> bool:
        """Whether a dead replica is started again, which it then waits for."""
        pause_s = replica.deaths.pause_s(lived_s)
        if pause_s is None:
            times = replica.deaths.in_a_row
            self._change(replica, State.FAILED, f"{note}; {times} times, not started again")
            return False
        replica.started = time.monotonic() + pause_s
        self._change(replica, State.WAITING, f"{note}; again in {pause_s:g} s")
        return True

    async def _revive(self, replica: Replica) -> None:
        """End what is left of a dead engine and start another, later each time."""
        again = True
        while again:
            await self._end(replica)
            await asyncio.sleep(replica.started - time.monotonic())
            await self._start(replica)
            again = replica.state is not State.READY and self._again(replica, replica.note, 0.0)

    async def _end(self, replica: Replica) -> None:
        """End an engine, dead or alive, and forget it."""
        running, replica.running = replica.running, None
        if running is None:
            return
        try:
            await running.stop()
        except Exception:
            log.exception("model=%s did not stop cleanly", replica.name)

    def close(self) -> None:
        """Admit no more requests."""
        self._closed = True

    async def drain(self, timeout_s: float) -> None:
        """Admit no more, wait for running requests, cut off those that take too long."""
        self.close()
        end = time.monotonic() + timeout_s
        while self._leases and time.monotonic() < end:  # noqa: ASYNC110  # once in a life
            await asyncio.sleep(_DRAIN_LOOK_S)
        for lease in list(self._leases):
            lease.cut()

    async def stop(self) -> None:
        """End all engines, all at once."""
        self.close()
        if any(replica.state in STARTING for replica in self.replicas):
            self._backend.kill()
        for task in (*self._revivals, *self._asked.values()):
            task.cancel()
        running = [replica for replica in self.replicas if replica.running is not None]
        await asyncio.gather(*(self._end(replica) for replica in running))
        for replica in running:
            self._change(replica, State.STOPPED)

    def kill(self) -> None:
        self._backend.kill()


def _unless_required(entry: Entry) -> None:
    if entry.state is State.FAILED and entry.model.spec.required:
        raise StartupError(f"{entry.name} is required and failed: {entry.note}")
