"""A replica of a model, and the protocols of engines and of their memory."""

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
    from llmserve.registry.spec import Config, ModelSpec


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


# The states of a start and of a wake.
STARTING = frozenset({State.WAITING, State.DOWNLOADING, State.LOADING, State.WARMING, State.WAKING})
# The states from which a request starts or wakes a replica.
AT_REST = frozenset({State.DRAINING, State.SLEEPING, State.STOPPED})


class Running(Protocol):
    """A started engine with its request handlers."""

    endpoints: frozenset[EndpointId]
    took: Mapping[str, float]  # seconds of its start, by step

    @property
    def sleeps(self) -> bool:
        """Whether it was started with sleep mode."""

    @property
    def pid(self) -> int | None:
        """The engine's process."""

    @property
    def log(self) -> Path:
        """The file that its engine writes."""

    @property
    def max_model_len(self) -> int: ...
    @property
    def dead(self) -> bool: ...
    @property
    def registry(self) -> CollectorRegistry: ...
    def preparing(self) -> AbstractContextManager[None]:
        """Entered while a request is prepared; the text of running answers may wait meanwhile."""

    def try_fast_path(
        self, endpoint: EndpointId, body: dict[str, Any], asked: str, scope: Scope
    ) -> ASGIApp | None:
        """The answer on the fast path; None if the request needs `call`."""

    async def call(
        self, endpoint: EndpointId, body: dict[str, Any], asked: str, request: Request
    ) -> ASGIApp: ...
    def share(self, stored: ResponseStore) -> None:
        """Use this store for answers of /v1/responses; called before the first request."""

    async def responds(self, within_s: float) -> bool:
        """Whether its engine answers within that time a question between two steps."""

    async def prepare_sleep(self) -> None:
        """Do the slow part of the first sleep ahead, while the engine serves."""

    async def sleep(self, level: Level) -> None:
        """Lower to a level between STOPPED and READY; no request runs. Raises EngineError."""

    async def wake(self) -> None:
        """Return to READY. Raises EngineError."""

    async def changed(self, spec: ModelSpec) -> Running:
        """The same engine, with handlers of the changed spec."""

    def kill(self) -> None:
        """End its engine's processes, even hung ones; `dead` becomes true later."""

    async def stop(self) -> None: ...


class MemoryBudget(Protocol):
    """The memory that engines share: their placements, and the order of their moves."""

    @property
    def capacity(self) -> Takes:
        """Bytes that all replicas together may hold, by place; places that it lacks are unbounded."""

    def place(self, spec: ModelSpec, number: int) -> Placement:
        """The placement of a replica, numbered from 0, in the plan in force."""

    def expecting(self, placement: Placement) -> AbstractContextManager[None]:
        """Entered while a replica waits to wake; memory freed for it passes directly to it."""

    def moves(
        self, placement: Placement, wakes_from: Level | None = None
    ) -> AbstractAsyncContextManager[None]:
        """Entered to sleep or wake; waits until no start on its GPUs is measured.

        A wake also waits for its memory. Raises StartupError if other processes hold it.
        """

    def planned(
        self, config: Config, kept: Mapping[str, Sequence[Placement]]
    ) -> Callable[[], None]:
        """Plan another registry; the result applies the plan. Blocks.

        The engines of `kept`, by model name, keep their placements. Raises ConfigError.
        """


class Backend(Protocol):
    """Starts engines."""

    @property
    def memory(self) -> MemoryBudget: ...
    async def start(
        self, spec: ModelSpec, placement: Placement, report: Callable[[State, str], None]
    ) -> Running:
        """Start a replica. Raises StartupError with the cause in one line."""

    def log_of(self, spec: ModelSpec, number: int) -> Path: ...
    def kill(self) -> None:
        """End all engine processes at once, including those that start."""


class ReplicaModel(Protocol):
    """The model of a replica, which owns its spec."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def name(self) -> str: ...
    def serve_queue(self) -> None: ...
    def record_change(self, replica: Replica, before: State) -> None: ...


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
