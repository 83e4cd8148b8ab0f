"""Every model's life: waiting, downloading, loading, warming, ready, failed, stopped.

The one owner of these states. Engines are started by a `Backend`, so that all of this
can be run without one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from llmserve.admission import Slot, Slots
from llmserve.errors import EngineDead, LLMServeError, Overloaded, StartupError, quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from prometheus_client import CollectorRegistry
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Scope

    from llmserve.config import ModelSpec
    from llmserve.metrics import Metrics
    from llmserve.registry import Model, Registry

log = logging.getLogger(__name__)
Task = asyncio.Task[None]

_WATCH_S = 0.5  # a dead engine is noticed this soon
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


class Running(Protocol):
    """A model that answers."""

    able: frozenset[str]

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
    async def fetch_response(self, response_id: str, query: dict[str, Any]) -> Response: ...
    async def cancel_response(self, response_id: str) -> Response: ...
    async def stop(self) -> None: ...


class Backend(Protocol):
    async def start(self, spec: ModelSpec, report: Callable[[State, str], None]) -> Running:
        """Raises StartupError with the cause in one line."""
        ...

    def kill(self) -> None:
        """End every engine process at once, those of starts under way too."""
        ...


class Entry:
    """A model and where it is in its life."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.state = State.WAITING
        self.note = ""  # progress, or why it failed
        self.running: Running | None = None
        self.slots = Slots(model.name, model.spec.max_in_flight)
        self.started = time.monotonic()
        self.seconds = 0.0  # what the start took

    @property
    def name(self) -> str:
        return self.model.name


class Lease:
    """A running model and a slot of it, until released."""

    def __init__(
        self, entry: Entry, running: Running, slot: Slot, leases: set[Lease], task: Task | None
    ) -> None:
        self.model = entry.name
        self.running = running
        self.was_cut = False  # its request was ended by the server's own end
        self._slot = slot
        self._task = task
        self._leases = leases
        leases.add(self)

    def release(self) -> None:
        self._slot.release()
        self._leases.discard(self)

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
        on_change: Callable[[Entry], None] = lambda _: None,
    ) -> None:
        self.registry = registry
        self.entries = {model.name: Entry(model) for model in registry.models}
        self._backend = backend
        self._metrics = metrics
        self._on_change = on_change
        self._closed = False
        self._leases: set[Lease] = set()
        for entry in self.entries.values():
            metrics.in_flight.labels(entry.name).set_function(entry.slots.count)
            self._show(entry)

    # --- asking

    def lease(self, name: str, task: Task | None = None) -> Lease:
        """Leave to send one request to the model of a public name; `task` handles it.

        Raises ModelNotFound, or Overloaded while it loads, is full, or the server
        stops, or EngineDead.
        """
        entry = self.entries[self.registry.find(name).name]
        if self._closed:
            raise cut_off()
        if entry.running is None or entry.state is not State.READY:
            raise self._not_ready(entry)
        return Lease(entry, entry.running, entry.slots.take(), self._leases, task)

    def _not_ready(self, entry: Entry) -> LLMServeError:
        name = quoted(entry.name)
        if entry.state in STARTING:
            return Overloaded(
                f"The model {name} is {entry.state}; try again.",
                retry_after_s=_LOADING_RETRY_S,
                code="model_not_ready",
            )
        if entry.running is not None:
            return EngineDead(f"The engine of {name} has died.")
        return EngineDead(f"The model {name} could not be started.", code="model_failed")

    def ready(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.state is State.READY]

    def registries(self) -> Iterable[CollectorRegistry]:
        return [e.running.registry for e in self.entries.values() if e.running is not None]

    # --- life

    async def start(self) -> None:
        """Start every model, all at once; returns when each is ready or has failed.

        Raises StartupError if none is ready, or as soon as a required one has failed.
        """
        starts = [asyncio.create_task(self._start(entry)) for entry in self.entries.values()]
        try:
            for finished in asyncio.as_completed(starts):
                _unless_required(await finished)
        except BaseException:
            for start in starts:
                start.cancel()
            raise
        if not self.ready():
            raise StartupError("no model could be started")

    async def _start(self, entry: Entry) -> Entry:
        entry.started = time.monotonic()
        try:
            entry.running = await self._backend.start(
                entry.model.spec, lambda state, note: self._change(entry, state, note)
            )
        except StartupError as error:
            self._change(entry, State.FAILED, error.message)
        except Exception as error:
            # Whatever it is, it is this model's: the others go on.
            log.exception("model=%s unforeseen", entry.name)
            self._change(entry, State.FAILED, f"{type(error).__name__}: {error}")
        else:
            self._change(entry, State.READY)
        return entry

    def _change(self, entry: Entry, state: State, note: str = "") -> None:
        moved = state is not entry.state
        if entry.state in STARTING and state not in STARTING:
            entry.seconds = time.monotonic() - entry.started
        entry.state, entry.note = state, note
        if moved:
            self._show(entry)
            if state is State.READY:
                self._metrics.start_seconds.labels(entry.name).set(entry.seconds)
            log.info("model=%s state=%s", entry.name, state)
        self._on_change(entry)

    def _show(self, entry: Entry) -> None:
        for state in State:
            self._metrics.state.labels(entry.name, state.value).set(state is entry.state)

    async def watch(self) -> None:
        """Notice engines that die, until cancelled."""
        while True:
            await asyncio.sleep(_WATCH_S)
            for entry in self.ready():
                if entry.running is not None and entry.running.dead:
                    self._change(entry, State.FAILED, "its engine died")

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
        running = [entry for entry in self.entries.values() if entry.running is not None]
        if any(entry.state in STARTING for entry in self.entries.values()):
            self._backend.kill()
        ends = [entry.running.stop() for entry in running if entry.running is not None]
        for error in await asyncio.gather(*ends, return_exceptions=True):
            if error is not None:
                log.error("an engine did not stop cleanly", exc_info=error)
        for entry in running:
            self._change(entry, State.STOPPED)

    def kill(self) -> None:
        self._backend.kill()


def _unless_required(entry: Entry) -> None:
    if entry.state is State.FAILED and entry.model.spec.required:
        raise StartupError(f"{entry.name} is required and failed: {entry.note}")
