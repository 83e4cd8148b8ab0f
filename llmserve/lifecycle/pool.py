"""The models of a running server, and those that enter and leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from llmserve.errors import StartupError
from llmserve.lifecycle.events import Events
from llmserve.lifecycle.gauges import PoolGauges
from llmserve.lifecycle.parallel import in_parallel
from llmserve.lifecycle.replica import STARTING, Replica, State
from llmserve.lifecycle.response_store import Archive
from llmserve.lifecycle.router import Router
from llmserve.lifecycle.served_model import ServedModel
from llmserve.lifecycle.supervisor import Supervisor, server_stopping
from llmserve.lifecycle.timings import TIMINGS, LifecycleTimings
from llmserve.lifecycle.transitions import ReplicaLifecycle
from llmserve.registry.names import ModelNames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from prometheus_client import CollectorRegistry

    from llmserve.lifecycle.admission import QueuedRequest
    from llmserve.lifecycle.lease import Lease, ModelRequest
    from llmserve.lifecycle.placement import Placement
    from llmserve.lifecycle.replica import Backend
    from llmserve.metrics import Metrics
    from llmserve.registry.spec import ModelSpec

log = logging.getLogger(__name__)


class Pool:
    """`on_change` is called with each replica whose state or note changes."""

    def __init__(
        self,
        specs: Iterable[ModelSpec],
        backend: Backend,
        metrics: Metrics,
        on_change: Callable[[Replica], None] = lambda _: None,
        timings: LifecycleTimings = TIMINGS,
    ) -> None:
        self.models: dict[str, ServedModel] = {}  # that requests can name
        self.events = Events()
        self.life = ReplicaLifecycle(backend, metrics, timings)
        self.supervisor = Supervisor(self.life)
        self._gauges = PoolGauges(metrics)
        self.router = Router(self.life, self.supervisor, self._gauges)
        self._archive = Archive()
        self._backend = backend
        self._on_change = on_change
        self._all: dict[ServedModel, None] = {}  # with models that have not entered or still leave
        self.registry = ModelNames(())  # the public names of the models
        for spec in specs:
            self.add(self.create(spec))

    # --- models

    def _index_names(self) -> None:
        self.registry = ModelNames(model.spec for model in self.models.values())

    def find(self, name: str) -> ServedModel:
        """The model of a public name. Raises ModelNotFound."""
        return self.models[self.registry.find(name).name]

    @property
    def replicas(self) -> list[Replica]:
        """The replicas of all models, in the order of the registry; those that leave are last."""
        pairs = [(model, replica) for model in self._all for replica in model.replicas]
        return [replica for model, replica in pairs if replica.model is model]

    def ready(self) -> list[ServedModel]:
        return [model for model in self.models.values() if model.ready]

    def collectors(self) -> Iterable[CollectorRegistry]:
        """The metrics of the running engines."""
        return [each.running.registry for each in self.replicas if each.running is not None]

    def create(self, spec: ModelSpec, kept: Iterable[Replica] = ()) -> ServedModel:
        """Create a model, with new replicas and `kept` ones; `add` lets it enter the pool."""
        serve_queue, placements = self.router.serve_queue, self._placements(spec)
        model = ServedModel(spec, placements, serve_queue, self._record_change, kept)
        model.responses = self._archive.new_store()
        self._all[model] = None
        return model

    def _placements(self, spec: ModelSpec) -> list[Placement]:
        return [self._backend.memory.place(spec, number) for number in range(spec.replicas)]

    def apply_spec(self, model: ServedModel, spec: ModelSpec) -> None:
        """Continue with a changed spec or plan, in which the model keeps its engines."""
        model.apply_spec(spec, self._placements(spec))
        self._index_names()
        self._gauges.show_dispatch(model)
        self.life.check_memory()

    def add(self, model: ServedModel) -> None:
        """Let a model enter the pool; it replaces the model of its name and takes its queue."""
        before = self.models.get(model.name)
        if before is not None:
            if set(before.replicas) & set(model.replicas):
                model.inherit(before)
            if model.spec.model == before.spec.model:  # another model starts without its responses
                model.responses = before.responses
            self.remove(before)
        self.models[model.name] = model
        self._index_names()
        self._gauges.add(model)
        for replica in model.replicas:
            if replica.running is not None:
                replica.running.share(model.responses)
        if before is not None:
            before.slots.move_to(model.slots)
        model.serve_queue()

    def sort(self, names: Iterable[str]) -> None:
        """Put the models into this order."""
        self.models = {name: self.models[name] for name in names}
        self._all = dict.fromkeys((*self.models.values(), *self._all))
        self._index_names()

    def remove(self, model: ServedModel) -> None:
        """Remove a model from the public names; its queued requests may still be admitted."""
        del self.models[model.name]
        self._index_names()
        self._gauges.remove(model)
        for replica in model.replicas:
            if replica.model is model:
                self.life.leave(replica)

    async def end(self, model: ServedModel, replicas: Iterable[Replica] | None = None) -> None:
        """Stop the replicas of a model that leaves, after its requests."""
        model.serve_queue()
        await model.slots.wait_empty()
        replicas = model.replicas if replicas is None else tuple(replicas)
        for replica in replicas:
            replica.retired = True
        await in_parallel(self.supervisor.end(each) for each in replicas)
        del self._all[model]
        for replica in replicas:
            self._gauges.forget(replica)

    def _record_change(self, model: ServedModel, replica: Replica, before: State) -> None:
        if replica.state is not before:
            if self.models.get(model.name) is model:  # not one that enters or leaves
                self._gauges.show(replica)
            self.events.publish(replica, before)
            log.info("model=%s state=%s", replica.name, replica.state)
            model.serve_queue()
        self._on_change(replica)

    # --- requests

    def lease(self, request: ModelRequest) -> Lease | QueuedRequest[ModelRequest, Lease]:
        """As `Router.lease`; also raises ModelNotFound."""
        return self.router.lease(self.find(request.name), request)

    # --- the server

    async def start(self) -> None:
        """Start every replica that is not lazy; return when all have started.

        Models that start asleep are first: later there may be no memory to start them.
        Raises StartupError if no model can be started, or a required one cannot.
        """
        first = [each for each in self.replicas if each.state is State.WAITING]
        first.sort(key=lambda replica: replica.model.spec.start != "sleeping")
        for replica in first:
            self.supervisor.begin(replica, self.life.start)
        starts = self.supervisor.tasks(first)
        try:
            while starts:
                _, starts = await asyncio.wait(starts, return_when=asyncio.FIRST_COMPLETED)
                for model in self.models.values():
                    _raise_if_required(model)
        except BaseException:
            for start in starts:
                start.cancel()
            raise
        if not any(model.is_usable for model in self.models.values()):
            raise StartupError("no model could be started")

    def close(self) -> None:
        """Admit no new requests; refuse those that wait for a model to start."""
        self.supervisor.is_closed = True
        for model in self._all:
            if not model.ready:
                model.slots.refuse(server_stopping)

    async def drain(self, timeout_s: float) -> None:
        """Close, and wait for admitted requests; those that take too long are cancelled."""
        self.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while busy := next((each for each in self._all if each.slots.is_busy), None):
                    await busy.slots.wait_idle()
        for model in self._all:
            model.slots.refuse(server_stopping)
        self.router.cut(self.replicas, server_stopping)

    async def stop(self) -> None:
        """Stop all engines in parallel."""
        self.close()
        if any(replica.state in STARTING for replica in self.replicas):
            self._backend.kill()
        await self.supervisor.cancel_all()
        running = [replica for replica in self.replicas if replica.running is not None]
        await in_parallel(self.life.end_engine(replica) for replica in running)
        for replica in running:
            self.life.change(replica, State.STOPPED)

    def kill(self) -> None:
        self._backend.kill()


def _raise_if_required(model: ServedModel) -> None:
    if model.state is State.FAILED and model.spec.required:
        raise StartupError(f"{model.name} is required and failed: {model.note}")
