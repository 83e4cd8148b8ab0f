"""What operators do to a running server: load, unload, sleep, wake, reload, and look."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from llmserve.errors import LLMServeError, Overloaded, RequestError, quoted
from llmserve.lifecycle.placement import HOST_MEMORY, Level
from llmserve.lifecycle.replica import State
from llmserve.registry import diff
from llmserve.registry.names import Model
from llmserve.registry.spec import Effect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from pathlib import Path

    from llmserve.lifecycle.placement import Placement
    from llmserve.lifecycle.pool import Pool
    from llmserve.lifecycle.replica import Backend, Replica
    from llmserve.lifecycle.served_model import ServedModel
    from llmserve.registry.diff import Change, Changes
    from llmserve.registry.spec import Config, ModelSpec

log = logging.getLogger(__name__)


class ModelOperator:
    """`read` gives the registry as it is now on disk; `adopted` is told of one that counts."""

    def __init__(
        self,
        config: Config,
        pool: Pool,
        backend: Backend,
        read: Callable[[], Config],
        adopted: Callable[[Config], None],
    ) -> None:
        self._config = config
        self._pool = pool
        self._backend = backend
        self._read = read
        self._adopted = adopted
        self._reloading = asyncio.Lock()

    # --- looking

    def models(self) -> list[dict[str, Any]]:
        return [self._shown(entry) for entry in self._pool.entries.values()]

    def model(self, name: str) -> dict[str, Any]:
        return self._shown(self._pool.entry(name))

    def _shown(self, entry: ServedModel) -> dict[str, Any]:
        spec = entry.model.spec
        return {
            "name": entry.name,
            "aliases": list(spec.aliases),
            "start": spec.start,
            "pinned": spec.pinned,
            "priority": spec.priority,
            "state": entry.state.value,
            "level": entry.furthest.level.name.lower(),
            "in_flight": entry.slots.in_flight,
            "queued": entry.slots.waiting(),
            "idle_s": round(min(replica.idle_s for replica in entry.replicas), 1),
            "swaps": sum(replica.gave_way for replica in entry.replicas),
            "deaths": sum(replica.deaths.total for replica in entry.replicas),
            "note": entry.note,
            "replicas": [_replica(replica) for replica in entry.replicas],
        }

    def events(self) -> AsyncIterator[dict[str, Any]]:
        return self._pool.events.listen()

    def log_of(self, name: str, replica: int) -> Path:
        """The file that a replica's engine writes, or would write if it ran."""
        entry = self._pool.entry(name)
        running = next((each.running for each in entry.replicas if each.number == replica), None)
        return self._backend.log_of(entry.model.spec, replica) if running is None else running.log

    # --- steering

    async def load(self, name: str) -> None:
        entry = self._pool.entry(name)
        for replica in entry.replicas:
            if replica.state is State.FAILED:
                replica.deaths.forget()
                replica.failures.forget()
        await self._pool.ensure_started(entry)
        if not entry.ready:
            raise Overloaded(
                f"The model {quoted(entry.name)} is {entry.state}: {entry.note}",
                retry_after_s=entry.retry_after_s,
                code="model_not_ready",
            )

    wake = load

    async def unload(self, name: str, *, drain: bool) -> None:
        entry = self._pool.entry(name)
        entry.slots.refuse(lambda: _unloaded(entry))
        if drain:
            await self._pool.wait_started(entry)  # else it would be there later
            await self._rest(entry, Level.STOPPED)
            return
        for lease in [each for each in self._pool.leases if each.replica in entry.replicas]:
            lease.cut(_unloaded(entry))
        await self._pool.end_now(entry)

    async def sleep(self, name: str) -> None:
        entry = self._pool.entry(name)
        if not any(replica.running and replica.running.sleeps for replica in entry.replicas):
            raise RequestError(
                f"{quoted(entry.name)} cannot sleep: it is not running, it was started without sleep "
                "mode (`start: sleeping`, `idle: {sleep_after: ...}` or a model that shares its GPU "
                "on demand set that), or it runs on a CPU; `unload` ends it."
            )
        await self._rest(entry, Level.HOST)

    async def _rest(self, entry: ServedModel, level: Level) -> None:
        await asyncio.gather(*(self._pool.life.lower(each, level) for each in entry.replicas))

    # --- reload

    async def reload(self, *, dry_run: bool) -> dict[str, Any]:
        """Read the registry again and go by it; a bad one changes nothing.

        Engines that start anew for it are waited for. Raises ConfigError.
        """
        async with self._reloading:
            before = self._config.model_copy(update={"models": self._specs()})
            read = await asyncio.to_thread(self._read)
            changes = diff.changes(before, read)
            config = _with_server_of(before, read, changes.needs_restart)
            adopt = await asyncio.to_thread(
                self._backend.memory.planned, config, self._kept(changes)
            )
            lines = diff.describe(changes)
            if not dry_run:
                adopt()
                self._config = config
                self._adopted(config)
                lines += await self._go_by(config, changes)
            return diff.document(changes) | {
                "changed": bool(diff.describe(changes)),
                "lines": lines,
            }

    def _specs(self) -> tuple[ModelSpec, ...]:
        """What every model goes by, which the file may have failed to change."""
        return tuple(entry.model.spec for entry in self._pool.entries.values())

    async def _go_by(self, config: Config, changes: Changes) -> list[str]:
        """Apply; lines of what did not go well, which leaves its model as it was."""
        for name in changes.unchanged:
            entry = self._pool.entries[name]
            self._pool.apply_spec(entry, entry.model)
        for change in changes.live:
            self._pool.apply_spec(self._pool.entries[change.new.name], Model(change.new))
        leaving = [self._pool.entries[spec.name] for spec in changes.removed]
        for entry in leaving:
            self._pool.remove(entry)
        added = [self._pool.create(Model(spec)) for spec in changes.added]
        for entry in added:
            self._pool.add(entry)
        told, _ = await asyncio.gather(
            asyncio.gather(
                *(self._rebuild(change) for change in changes.rebuilt),
                *(self._started(entry) for entry in added),
                *(self._restart(change) for change in (*changes.restarted, *changes.resized)),
            ),
            asyncio.gather(*(self._pool.end(entry) for entry in leaving)),
        )
        self._pool.sort(spec.name for spec in config.models)
        return [line for lines in told for line in lines]

    async def _rebuild(self, change: Change) -> list[str]:
        entry = self._pool.entries[change.old.name]
        if failed := await self._rebuilt(change, entry.replicas):
            return failed
        self._pool.apply_spec(entry, Model(change.new))
        return []

    async def _rebuilt(self, change: Change, replicas: Iterable[Replica]) -> list[str]:
        """New serving objects for engines that go on, for all of them or for none; why not."""
        if not change.rebuilds:
            return []
        try:
            await self._pool.life.rebuild(replicas, change.new)
        except Exception as error:
            log.exception("model=%s could not be changed", change.old.name)
            return [f"{change.old.name}: {_cause(error)}; it goes on as before"]
        return []

    async def _started(self, entry: ServedModel) -> list[str]:
        if entry.model.spec.start != "lazy":
            await self._pool.start_late(entry)
        return _failures(entry)

    async def _restart(self, change: Change) -> list[str]:
        """New engines first and then the switch, if there is room for both; else one after the other."""
        old = self._pool.entries[change.old.name]
        kept = [each for each in old.replicas if self._stays(change, each)]
        if failed := await self._rebuilt(change, kept):
            return failed
        entry = self._pool.create(Model(change.new), kept)
        coming = [each for each in entry.replicas if each not in kept]
        if not kept and self._pool.life.fits(coming):
            return await self._replaced(old, entry)
        for replica in coming:
            self._pool.life.queue_requests(replica)
        self._pool.add(entry)
        await self._pool.end(old, [each for each in old.replicas if each not in kept])
        return await self._started(entry)

    async def _replaced(self, old: ServedModel, new: ServedModel) -> list[str]:
        """The old engines serve until the new ones can, and on if these fail."""
        if old.ready or new.model.spec.start != "lazy":
            await self._pool.start_late(new)
        failed = _failures(new)
        if old.is_usable and not new.is_usable:
            await self._pool.end(new)
            return [f"{line}; the engine before it goes on" for line in failed]
        self._pool.add(new)
        await self._pool.end(old)
        return failed

    def _stays(self, change: Change, replica: Replica) -> bool:
        """Whether an engine can go on as one of more or fewer."""
        return (
            change.effect is Effect.RESIZED
            and replica.number < change.new.replicas
            and self._backend.memory.place(change.new, replica.number).holds == replica.holds
        )

    def _kept(self, changes: Changes) -> dict[str, list[Placement]]:
        """Where the engines are that stay, by their models' names."""
        changed = [each.new.name for each in (*changes.live, *changes.rebuilt)]
        return {
            name: [replica.placement for replica in self._pool.entries[name].replicas]
            for name in (*changes.unchanged, *changed)
        }


def _with_server_of(before: Config, config: Config, names: Iterable[str]) -> Config:
    """Those fields of the server that only another process takes stay as they are."""
    stay = {name: getattr(before.server, name) for name in names}
    return config.model_copy(update={"server": config.server.model_copy(update=stay)})


def _failures(entry: ServedModel) -> list[str]:
    failed = (each for each in entry.replicas if each.state is State.FAILED)
    return [f"{each.name}: {each.note}" for each in failed]


def _cause(error: Exception) -> str:
    if isinstance(error, LLMServeError):
        return error.message
    return f"{type(error).__name__}: {error}"


def _unloaded(entry: ServedModel) -> LLMServeError:
    return Overloaded(
        f"The model {quoted(entry.name)} is being unloaded.", retry_after_s=1, code="model_unloaded"
    )


def _replica(replica: Replica) -> dict[str, Any]:
    takes = replica.holds.get(replica.level, {})
    gpus = [size for place, size in takes.items() if place != HOST_MEMORY]
    places = set().union(*replica.holds.values())
    coming = {level: seconds for level, seconds in replica.cost_s.items() if level}
    return {
        "number": replica.number,
        "state": replica.state.value,
        "level": replica.level.name.lower(),
        "note": replica.note,
        "devices": sorted(place.gpu for place in places if place.gpu is not None),
        "since_s": round(time.monotonic() - replica.since, 1),
        "start_s": replica.cost_s.get(Level.STOPPED),
        "wake_s": min(coming.values(), default=None),
        "gpu_bytes": sum(gpus) if gpus else None,
        "host_bytes": takes.get(HOST_MEMORY),
        "pid": replica.running.pid if replica.running is not None else None,
    }
