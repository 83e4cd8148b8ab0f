"""What operators do to a running server: load, unload, sleep, wake, reload, and look."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from llmserve import diff
from llmserve.errors import LLMServeError, Overloaded, RequestError, quoted
from llmserve.registry import Model, Registry
from llmserve.replica import State
from llmserve.residency import HOST, Level

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from llmserve.config import Config
    from llmserve.diff import Change, Changes
    from llmserve.pool import Entry, Pool
    from llmserve.replica import Backend, Replica


class Control:
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

    def _shown(self, entry: Entry) -> dict[str, Any]:
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
        entry = self._pool.entry(name)
        if replica >= len(entry.replicas):
            raise RequestError(
                f"{quoted(name)} has {len(entry.replicas)} replicas, numbered from 0; "
                f"{replica} is none."
            )
        return self._backend.log_of(entry.model.spec, replica)

    # --- steering

    async def load(self, name: str) -> None:
        entry = self._pool.entry(name)
        for replica in entry.replicas:
            if replica.state is State.FAILED:
                replica.deaths.forget()
                replica.failures.forget()
        await self._pool.bring(entry)
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
        if not drain:
            for lease in [each for each in self._pool.leases if each.entry is entry]:
                lease.cut(_unloaded(entry))
        await self._rest(entry, Level.STOPPED)

    async def sleep(self, name: str) -> None:
        entry = self._pool.entry(name)
        if not any(replica.running and replica.running.sleeps for replica in entry.replicas):
            raise RequestError(
                f"{quoted(entry.name)} cannot sleep: it is not running, it was started without sleep "
                "mode (`start: sleeping`, `idle: {sleep_after: ...}` or a model that shares its GPU "
                "on demand set that), or it runs on a CPU; `unload` ends it."
            )
        await self._rest(entry, Level.HOST)

    async def _rest(self, entry: Entry, level: Level) -> None:
        await asyncio.gather(*(self._pool.life.rest(each, level) for each in entry.replicas))

    # --- reload

    async def reload(self, *, dry_run: bool) -> dict[str, Any]:
        """Read the registry again and go by it; a bad one changes nothing.

        Engines that start anew for it are waited for. Raises ConfigError.
        """
        async with self._reloading:
            config = await asyncio.to_thread(self._read)
            changes = diff.changes(self._config, config)
            kept = _kept(changes)
            adopt = await asyncio.to_thread(self._backend.planned, config, kept)
            lines = diff.told(changes)
            if not dry_run:
                adopt()
                lines += await self._go_by(config, changes)
            return diff.document(changes) | {"changed": bool(diff.told(changes)), "lines": lines}

    async def _go_by(self, config: Config, changes: Changes) -> list[str]:
        """Apply; lines of what did not go well."""
        before = self._config
        self._config = config
        self._adopted(config)
        for change in (*changes.live, *changes.rebuilt):
            await self._adopt(change)
        for change in changes.renamed:
            self._pool.rename(self._pool.entries[change.old.name], Model(change.new))
            await self._adopt(change)
        # Those that start anew answer under their old names until they have.
        anew = {change.new.name: change for change in (*changes.restarted, *changes.resized)}
        known = {spec.name: spec for spec in before.models}
        self._pool.registry = Registry(
            known[spec.name] if spec.name in anew else spec for spec in config.models
        )
        leaving = [self._pool.entries[spec.name] for spec in changes.removed]
        for entry in leaving:
            self._pool.leave(entry)
        ends = [asyncio.create_task(self._pool.end(entry)) for entry in leaving]
        told = await asyncio.gather(
            *(self._add(Model(spec)) for spec in changes.added),
            *(self._restart(change) for change in anew.values()),
        )
        self._pool.registry = Registry(config.models)
        self._pool.sort(spec.name for spec in config.models)
        await asyncio.gather(*ends)
        return [line for line in told if line]

    async def _adopt(self, change: Change) -> None:
        entry = self._pool.entries[change.new.name]
        entry.adopt(Model(change.new))
        if change.rebuilds:
            for replica in entry.replicas:
                if replica.running is not None:
                    replica.running = await replica.running.changed(change.new)

    async def _add(self, model: Model) -> str:
        entry = self._pool.made(model)
        self._pool.enter(entry)
        return await self._started(entry)

    async def _started(self, entry: Entry) -> str:
        if entry.model.spec.start != "lazy":
            await self._pool.start_late(entry)
        return f"{entry.name}: {entry.note}" if entry.state is State.FAILED else ""

    async def _restart(self, change: Change) -> str:
        """New engines first and then the switch, if there is room for both; else one after the other."""
        model, old = Model(change.new), self._pool.entries[change.old.name]
        kept = [each for each in old.replicas if self._stays(change, each)]
        entry = self._pool.made(model, kept)
        coming = [each for each in entry.replicas if each not in kept]
        going = [each for each in old.replicas if each not in kept]
        failed = ""
        if not kept and self._pool.life.fits(coming):
            failed = await self._started(entry)
            if failed:  # the old one goes on, under its old entry
                await self._pool.end(entry)
                return f"{failed}; the engine before it goes on"
            self._pool.enter(entry)
        else:
            for replica in coming:
                replica.patient = True  # whoever asks meanwhile waits
            self._pool.enter(entry)
            await self._pool.end(old, going)
            failed = await self._started(entry)
            going = []
        await self._pool.end(old, going)
        return failed

    def _stays(self, change: Change, replica: Replica) -> bool:
        """Whether an engine can go on as one of more or fewer."""
        return (
            change.effect is diff.Effect.RESIZED
            and replica.number < change.new.replicas
            and self._backend.holds(change.new, replica.number) == replica.holds
        )


def _kept(changes: Changes) -> dict[str, str]:
    """The models whose engines stay where they are, by their new names: their old ones."""
    changed = (*changes.live, *changes.rebuilt, *changes.renamed)
    same = {name: name for name in changes.unchanged}
    return same | {each.new.name: each.old.name for each in changed}


def _unloaded(entry: Entry) -> LLMServeError:
    return Overloaded(
        f"The model {quoted(entry.name)} is being unloaded.", retry_after_s=1, code="model_unloaded"
    )


def _replica(replica: Replica) -> dict[str, Any]:
    takes = replica.holds.get(replica.level, {})
    gpus = {place: size for place, size in takes.items() if place != HOST}
    coming = {level: seconds for level, seconds in replica.cost_s.items() if level}
    return {
        "number": replica.number,
        "state": replica.state.value,
        "level": replica.level.name.lower(),
        "note": replica.note,
        "devices": sorted(set().union(*replica.holds.values()) - {HOST}),
        "since_s": round(time.monotonic() - replica.since, 1),
        "start_s": replica.cost_s.get(Level.STOPPED),
        "wake_s": min(coming.values(), default=None),
        "gpu_bytes": sum(gpus.values()) if gpus else None,
        "host_bytes": takes.get(HOST),
        "pid": replica.running.pid if replica.running is not None else None,
    }
