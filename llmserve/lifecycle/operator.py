"""The commands of an operator: load, unload, sleep, wake, reload and a look at the state."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from llmserve.errors import LLMServeError, Overloaded, RequestError, quoted
from llmserve.lifecycle.parallel import in_parallel
from llmserve.lifecycle.placement import HOST_MEMORY, Level
from llmserve.lifecycle.replica import State
from llmserve.registry import diff
from llmserve.registry.spec import Effect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from pathlib import Path

    from llmserve.lifecycle.placement import Placement
    from llmserve.lifecycle.pool import Pool
    from llmserve.lifecycle.replica import Backend, Replica
    from llmserve.lifecycle.served_model import ServedModel
    from llmserve.registry.diff import Change, Changes
    from llmserve.registry.spec import Config, ServerSpec

log = logging.getLogger(__name__)


class ModelOperator:
    """The owner of the `server` section in force; each model of the pool owns its own spec.

    `read` reads the registry's file again.
    """

    def __init__(
        self, server: ServerSpec, pool: Pool, backend: Backend, read: Callable[[], Config]
    ) -> None:
        self.server = server
        self._pool = pool
        self._backend = backend
        self._read = read
        self._reloading = asyncio.Lock()

    # --- state

    def models(self) -> list[dict[str, Any]]:
        return [_document(model) for model in self._pool.models.values()]

    def model(self, name: str) -> dict[str, Any]:
        return _document(self._pool.find(name))

    def events(self) -> AsyncIterator[dict[str, Any]]:
        return self._pool.events.listen()

    def log_of(self, name: str, replica: int) -> Path:
        """The file that a replica's engine writes, or would write if it ran."""
        model = self._pool.find(name)
        running = next((each.running for each in model.replicas if each.number == replica), None)
        return self._backend.log_of(model.spec, replica) if running is None else running.log

    # --- commands

    async def load(self, name: str) -> None:
        model = self._pool.find(name)
        for replica in model.replicas:
            if replica.state is State.FAILED:
                self._pool.life.forget_failures(replica)
        await self._pool.supervisor.ensure_started(model)
        if not model.ready:
            raise Overloaded(
                f"The model {quoted(model.name)} is {model.state}: {model.note}",
                retry_after_s=model.retry_after_s,
                code="model_not_ready",
            )

    wake = load

    async def unload(self, name: str, *, drain: bool) -> None:
        model = self._pool.find(name)
        model.slots.refuse(lambda: _unloaded(model))
        if drain:
            await self._pool.supervisor.wait_started(model)  # else it would be ready later
            await self._lower(model, Level.STOPPED)
            return
        self._pool.router.cut(model.replicas, lambda: _unloaded(model))
        await self._pool.supervisor.unload(model)

    async def sleep(self, name: str) -> None:
        model = self._pool.find(name)
        if not any(replica.running and replica.running.sleeps for replica in model.replicas):
            raise RequestError(
                f"{quoted(model.name)} cannot sleep: it is not running, it was started without sleep "
                "mode (`start: sleeping`, `idle: {sleep_after: ...}` or a model that shares its GPU "
                "on demand set that), or it runs on a CPU; `unload` ends it."
            )
        await self._lower(model, Level.HOST)

    async def _lower(self, model: ServedModel, level: Level) -> None:
        await in_parallel(self._pool.life.lower(each, level) for each in model.replicas)

    # --- reload

    async def reload(self, *, dry_run: bool) -> dict[str, Any]:
        """Read the registry again and apply it; return a report after new engines have started.

        Raises ConfigError for a registry with mistakes or without room; then nothing changes.
        """
        async with self._reloading:
            read = await asyncio.to_thread(self._read)
            specs = tuple(model.spec for model in self._pool.models.values())
            before = read.model_copy(update={"server": self.server, "models": specs})
            changes = diff.changes(before, read)
            server = _with_fixed_keys(read.server, self.server, changes.needs_restart)
            config = read.model_copy(update={"server": server})
            apply_plan = await asyncio.to_thread(
                self._backend.memory.planned, config, self._kept(changes)
            )
            lines = diff.describe(changes)
            report = diff.document(changes) | {"changed": bool(lines)}
            if not dry_run:
                apply_plan()
                self._pool.life.check_memory()
                self.server = server
                lines += await self._apply(config, changes)
            return report | {"lines": lines}

    async def _apply(self, config: Config, changes: Changes) -> list[str]:
        """Apply the changes; return a line for each failure, which does not change its model."""
        pool = self._pool
        for name in changes.unchanged:
            pool.apply_spec(pool.models[name], pool.models[name].spec)
        for change in changes.live:
            pool.apply_spec(pool.models[change.new.name], change.new)
        leaving = [pool.models[spec.name] for spec in changes.removed]
        for model in leaving:
            pool.remove(model)
        added = [pool.create(spec) for spec in changes.added]
        for model in added:
            pool.add(model)
        failures = await in_parallel(
            [
                *(self._rebuild(change) for change in changes.rebuilt),
                *(self._start(model) for model in added),
                *(self._restart(change) for change in (*changes.restarted, *changes.resized)),
                *(self._end(model) for model in leaving),
            ]
        )
        pool.sort(spec.name for spec in config.models)
        return [line for lines in failures for line in lines]

    async def _end(self, model: ServedModel) -> list[str]:
        await self._pool.end(model)
        return []

    async def _rebuild(self, change: Change) -> list[str]:
        model = self._pool.models[change.old.name]
        failures = await self._rebuild_handlers(change, model.replicas)
        if not failures:
            self._pool.apply_spec(model, change.new)
        return failures

    async def _rebuild_handlers(self, change: Change, replicas: Iterable[Replica]) -> list[str]:
        """Build new handlers for running engines, for all of them or for none."""
        if not change.rebuilds:
            return []
        try:
            await self._pool.life.rebuild(replicas, change.new)
        except Exception as error:
            log.exception("model=%s could not be changed", change.old.name)
            return [f"{change.old.name}: {_cause(error)}; the model continues unchanged"]
        return []

    async def _start(self, model: ServedModel) -> list[str]:
        if model.spec.start != "lazy":
            await self._pool.supervisor.start_stopped(model)
        return _failures(model)

    async def _restart(self, change: Change) -> list[str]:
        """Start new engines beside the old ones if both fit, else after them."""
        old = self._pool.models[change.old.name]
        kept = [each for each in old.replicas if self._stays(change, each)]
        if failures := await self._rebuild_handlers(change, kept):
            return failures
        model = self._pool.create(change.new, kept)
        new = [each for each in model.replicas if each not in kept]
        if not kept and self._pool.life.fits(new):
            return await self._replace(old, model)
        for replica in new:
            replica.queues_requests = True
        self._pool.add(model)
        await self._pool.end(old, [each for each in old.replicas if each not in kept])
        return await self._start(model)

    async def _replace(self, old: ServedModel, new: ServedModel) -> list[str]:
        """Let the old engines serve until the new ones are ready, and longer if these fail."""
        if old.ready or new.spec.start != "lazy":
            await self._pool.supervisor.start_stopped(new)
        failures = _failures(new)
        if old.is_usable and not new.is_usable:
            await self._pool.end(new)
            return [f"{line}; the old engine continues" for line in failures]
        self._pool.add(new)
        await self._pool.end(old)
        return failures

    def _stays(self, change: Change, replica: Replica) -> bool:
        """Whether the engine of a replica continues after its model was resized."""
        return (
            change.effect is Effect.RESIZED
            and replica.number < change.new.replicas
            and self._backend.memory.place(change.new, replica.number).holds == replica.holds
        )

    def _kept(self, changes: Changes) -> dict[str, list[Placement]]:
        """The placements of the engines that continue, by the names of their models."""
        changed = [each.new.name for each in (*changes.live, *changes.rebuilt)]
        return {
            name: [replica.placement for replica in self._pool.models[name].replicas]
            for name in (*changes.unchanged, *changed)
        }


def _with_fixed_keys(new: ServerSpec, old: ServerSpec, names: Iterable[str]) -> ServerSpec:
    """The new section, with the old values of keys that need a restart of the server."""
    return new.model_copy(update={name: getattr(old, name) for name in names})


def _failures(model: ServedModel) -> list[str]:
    failed = (each for each in model.replicas if each.state is State.FAILED)
    return [f"{each.name}: {each.note}" for each in failed]


def _cause(error: Exception) -> str:
    if isinstance(error, LLMServeError):
        return error.message
    return f"{type(error).__name__}: {error}"


def _unloaded(model: ServedModel) -> LLMServeError:
    return Overloaded(
        f"The model {quoted(model.name)} is being unloaded.", retry_after_s=1, code="model_unloaded"
    )


def _document(model: ServedModel) -> dict[str, Any]:
    spec = model.spec
    return {
        "name": model.name,
        "aliases": list(spec.aliases),
        "start": spec.start,
        "pinned": spec.pinned,
        "priority": spec.priority,
        "state": model.state.value,
        "level": model.furthest.level.name.lower(),
        "in_flight": model.slots.in_flight,
        "queued": model.slots.waiting(),
        "idle_s": round(min(replica.idle_s for replica in model.replicas), 1),
        "swaps": sum(replica.evictions for replica in model.replicas),
        "deaths": sum(replica.deaths.total for replica in model.replicas),
        "note": model.note,
        "replicas": [_replica_document(replica) for replica in model.replicas],
    }


def _replica_document(replica: Replica) -> dict[str, Any]:
    held = replica.bytes_at(replica.level)
    gpus = [size for place, size in held.items() if place != HOST_MEMORY]
    places = set().union(*replica.holds.values())
    wakes_s = [seconds for level, seconds in replica.cost_s.items() if level]
    return {
        "number": replica.number,
        "state": replica.state.value,
        "level": replica.level.name.lower(),
        "note": replica.note,
        "devices": sorted(place.gpu for place in places if place.gpu is not None),
        "since_s": round(time.monotonic() - replica.since, 1),
        "start_s": replica.cost_s.get(Level.STOPPED),
        "wake_s": min(wakes_s, default=None),
        "gpu_bytes": sum(gpus) if gpus else None,
        "host_bytes": held.get(HOST_MEMORY),
        "pid": replica.running.pid if replica.running is not None else None,
    }
