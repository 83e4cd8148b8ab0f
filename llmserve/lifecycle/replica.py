"""One engine of a model: its state, what it holds, and what it can be asked."""

from __future__ import annotations

import asyncio
import math
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from llmserve.lifecycle.dispatch import Load
from llmserve.lifecycle.placement import Level
from llmserve.lifecycle.restart_backoff import RestartBackoff

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager, AbstractContextManager
    from pathlib import Path

    from prometheus_client import CollectorRegistry
    from starlette.requests import Request
    from starlette.types import ASGIApp, Scope

    from llmserve.api.endpoint_id import EndpointId
    from llmserve.lifecycle.placement import Placement, Takes
    from llmserve.lifecycle.response_store import ResponseStore
    from llmserve.registry.config import Config, ModelSpec


class State(StrEnum):
    WAITING = "waiting"
    DOWNLOADING = "downloading"
    LOADING = "loading"
    WARMING = "warming"
    WAKING = "waking"
    READY = "ready"
    DRAINING = "draining"
    SLEEPING = "sleeping"
    STOPPED = "stopped"
    FAILED = "failed"


# What a start consists of, and a way up from sleep.
STARTING = frozenset({State.WAITING, State.DOWNLOADING, State.LOADING, State.WARMING, State.WAKING})
# Those that become ready when they are asked.
AT_REST = frozenset({State.DRAINING, State.SLEEPING, State.STOPPED})


class Running(Protocol):
    """A replica that answers."""

    able: frozenset[EndpointId]
    took: Mapping[str, float]  # seconds of its start, by step

    @property
    def sleeps(self) -> bool:
        """Whether it can do without its GPU memory for a while."""
        ...

    @property
    def pid(self) -> int | None:
        """Of its engine's process."""
        ...

    @property
    def log(self) -> Path:
        """Where its engine writes, whatever its model is called now."""
        ...

    @property
    def max_model_len(self) -> int: ...
    @property
    def dead(self) -> bool: ...
    @property
    def registry(self) -> CollectorRegistry: ...
    def coming(self) -> AbstractContextManager[None]:
        """While a request is being prepared; text of running answers may wait for that."""
        ...

    def express(
        self, endpoint: EndpointId, body: dict[str, Any], asked: str, scope: Scope
    ) -> ASGIApp | None:
        """The answer to a request like an earlier one; None if it needs `call`."""
        ...

    async def call(
        self, endpoint: EndpointId, body: dict[str, Any], asked: str, request: Request
    ) -> ASGIApp: ...
    def share(self, stored: ResponseStore) -> None:
        """Store answers of /v1/responses there; before its first request."""
        ...

    async def responds(self, within_s: float) -> bool:
        """Whether its engine answers a question that it can answer between two steps."""
        ...

    async def prepare_sleep(self) -> None:
        """What a first sleep would take long for, done ahead while it serves."""
        ...

    async def sleep(self, level: Level) -> None:
        """Down to a level between STOPPED and READY; nothing is running. Raises EngineError."""
        ...

    async def wake(self) -> None:
        """Up to READY. Raises EngineError."""
        ...

    async def changed(self, spec: ModelSpec) -> Running:
        """The same engine, answering as its changed entry says."""
        ...

    def kill(self) -> None:
        """End its engine's processes now, hung or not; `dead` tells when it is noticed."""
        ...

    async def stop(self) -> None: ...


class MemoryBudget(Protocol):
    """Memory that engines share: where each has its place, and when it may move there."""

    @property
    def capacity(self) -> Takes:
        """Bytes that all replicas may hold together, by place; nothing: no bound."""
        ...

    def place(self, spec: ModelSpec, number: int) -> Placement:
        """The place of one of the model's replicas, numbered from 0, by the plan in force."""
        ...

    def expecting(self, placement: Placement) -> AbstractContextManager[None]:
        """While a sleeper is about to wake: it may have at once what others give up for it."""
        ...

    def moves(
        self, placement: Placement, wakes_from: Level | None = None
    ) -> AbstractAsyncContextManager[None]:
        """While it falls asleep or wakes: waits until that disturbs no start on its GPUs.

        Then for what it needs to wake. Raises StartupError if others hold that.
        """
        ...

    def planned(
        self, config: Config, kept: Mapping[str, Sequence[Placement]]
    ) -> Callable[[], None]:
        """Plan another registry, and go by it once the result is called. Blocks.

        Engines of `kept`, by their model's name there, stay where they are. Raises ConfigError.
        """
        ...


class Backend(Protocol):
    """Starts engines."""

    @property
    def memory(self) -> MemoryBudget: ...
    async def start(
        self, spec: ModelSpec, placement: Placement, report: Callable[[State, str], None]
    ) -> Running:
        """Start one of the model's replicas there.

        Raises StartupError with the cause in one line.
        """
        ...

    def log_of(self, spec: ModelSpec, number: int) -> Path: ...
    def kill(self) -> None:
        """End every engine process at once, those of starts under way too."""
        ...


class ReplicaModel(Protocol):
    """The model of a replica, which owns its spec."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def name(self) -> str: ...
    def serve_queue(self) -> None:
        """Admit or refuse queued requests, as the replicas allow now."""
        ...

    def record_change(self, replica: Replica, before: State) -> None:
        """Record that a replica changed its state, from `before`, or its note."""
        ...


class Replica:
    """One engine of a model: its state, level, placement and load.

    Only `transitions` changes its state and level.
    """

    def __init__(self, model: ReplicaModel, placement: Placement) -> None:
        lazy = model.spec.start == "lazy"
        self.model = model
        self.placement = placement  # of its engine, from the start of that engine on
        self.next_placement = placement  # of an engine that starts later
        self.state = State.STOPPED if lazy else State.WAITING
        self.level = Level.STOPPED
        self.note = ""  # progress, or the cause of a failure
        self.running: Running | None = None
        self.started = time.monotonic()  # beginning of the start, with the wait for memory
        self.began = self.started  # beginning of the start, without that wait
        self.seconds = 0.0  # duration of the last start
        self.cost_s: dict[Level, float] = {}  # last load time, by the level before it
        self.since = time.monotonic()  # beginning of its state
        self.used = time.monotonic()  # end of its last request
        self.leaves = False  # its model has left the pool, so its memory is free soon
        self.retired = False  # it stops after its requests, and does not start again
        self.queues_requests = lazy  # requests may wait while it starts
        self.deaths = RestartBackoff()
        self.failures = RestartBackoff()  # failed starts
        self.again_at = math.inf  # earliest time at which a request may start it after a failure
        self.evictions = 0
        self.load = Load()
        self.unused = asyncio.Event()  # set when its last request has ended
        self.transition_lock = asyncio.Lock()  # one transition at a time

    @property
    def number(self) -> int:
        """The number of the replica in its model, from 0."""
        return self.placement.number

    @property
    def name(self) -> str:
        several = self.model.spec.replicas > 1
        return f"{self.model.name}/{self.number}" if several else self.model.name

    @property
    def holds(self) -> Mapping[Level, Takes]:
        """Bytes at each level of its placement besides STOPPED."""
        return self.placement.holds

    def bytes_at(self, level: Level) -> Takes:
        return self.holds.get(level, {})

    @property
    def took(self) -> Mapping[str, float]:
        """Seconds of its start, by step."""
        return self.running.took if self.running is not None else {}

    @property
    def ready_in_s(self) -> float | None:
        """The expected seconds until it is ready; None if it has never been ready."""
        cost_s = self.cost_s.get(self.level, self.cost_s.get(Level.STOPPED))
        if cost_s is None:
            return None
        began = self.started if self.state in STARTING else time.monotonic()
        return max(0.0, began + cost_s - time.monotonic())

    @property
    def can_start(self) -> bool:
        """Whether a request may start or wake it now."""
        if self.retired:
            return False
        if self.state is State.FAILED:
            return self.model.spec.start != "eager" and time.monotonic() >= self.again_at
        return self.state in AT_REST

    @property
    def is_pinned(self) -> bool:
        return self.model.spec.pinned and not self.leaves

    @property
    def is_dead(self) -> bool:
        """Whether it has an engine, which has died."""
        return self.running is not None and self.running.dead

    @property
    def idle_s(self) -> float:
        return 0.0 if self.load.requests else time.monotonic() - self.used
