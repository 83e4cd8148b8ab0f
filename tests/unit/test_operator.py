"""Commands of an operator: registries from real files, fake engines."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import orjson
import pytest
import yaml
from prometheus_client import generate_latest

from llmserve.errors import (
    ConfigError,
    EngineDead,
    EngineError,
    LLMServeError,
    ModelNotFound,
    Overloaded,
    PlacementError,
    RequestError,
    StartupError,
)
from llmserve.lifecycle import restart_backoff
from llmserve.lifecycle.operator import ModelOperator
from llmserve.lifecycle.placement import HOST_MEMORY, Level, Place, Placement
from llmserve.lifecycle.replica import State
from llmserve.registry import loader
from tests.fakes import (
    FAST,
    FakeBackend,
    FakeRunning,
    Gate,
    Plan,
    PoolBox,
    broken,
    released_in_order,
    some_ms,
    soon,
    until,
    with_code,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from llmserve.lifecycle.lease import Lease
    from llmserve.lifecycle.replica import Running
    from llmserve.lifecycle.timings import LifecycleTimings
    from llmserve.registry.spec import Config, ModelSpec

GPU = Place(0)
Entries = dict[str, dict[str, Any]]


class Engine(FakeRunning):
    """Records the specs of its rebuilds; a rebuild may wait, or fail."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[ModelSpec] = []
        self.change_gate: Gate | None = None
        self.change_error: Exception | None = None

    async def changed(self, spec: ModelSpec) -> Engine:
        if self.change_gate is not None:
            await self.change_gate.wait()
        if self.change_error is not None:
            raise self.change_error
        self.changes.append(spec)
        return self


class Engines(FakeBackend):
    """Each start is another engine; `next` has the plan of a replica's next one.

    `memory` of a model is its part of a GPU of 100 bytes; `start: sleeping` has sleep mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.capacity = {GPU: 100}
        self.next: dict[str, Plan] = {}
        self.engines: defaultdict[str, list[Engine]] = defaultdict(list)
        self.adopted: list[Config] = []

    def gate(self, name: str, **plan: Any) -> Gate:
        """Where the next start of a replica waits."""
        plan["gate"] = gate = Gate()
        self.next[name] = Plan(**plan)
        return gate

    def place(self, spec: ModelSpec, number: int) -> Placement:
        size = int(spec.memory or 0)
        ready = {Level.READY: {GPU: size}}
        asleep = {Level.HOST: {GPU: 1, HOST_MEMORY: size}} if spec.start == "sleeping" else {}
        return Placement(number, self.sizes.get(spec.name, ready | asleep))

    def planned(
        self, config: Config, kept: Mapping[str, Sequence[Placement]]
    ) -> Callable[[], None]:
        super().planned(config, kept)
        return partial(self.adopted.append, config)

    async def start(
        self, spec: ModelSpec, placement: Placement, report: Callable[[State, str], None]
    ) -> Running:
        name = f"{spec.name}/{placement.number}" if spec.replicas > 1 else spec.name
        plan = self.plans[name] = self.next.pop(name, Plan())
        plan.running = engine = Engine()
        engine.sleeps = spec.start == "sleeping"
        running = await super().start(spec, placement, report)
        self.engines[name].append(engine)
        return running


class Box(PoolBox):
    """A server without engines and routes, and its registry's file."""

    def __init__(
        self, file: Path, models: Entries, server: dict[str, Any], timings: LifecycleTimings
    ) -> None:
        self.file = file
        self.write(models, server)
        self.backend = Engines()
        read = partial(loader.load, file)
        loaded = read()
        super().__init__(loaded.models, self.backend, timings)
        self.control = ModelOperator(loaded.server, self.pool, self.backend, read)

    def write(self, models: Entries, server: dict[str, Any] | None = None) -> None:
        entries = {name: {"model": "org/model"} | keys for name, keys in models.items()}
        self.file.write_text(
            yaml.safe_dump({"server": server or {}, "models": entries}, sort_keys=False)
        )

    async def reload(
        self, models: Entries | None = None, server: dict[str, Any] | None = None
    ) -> list[str]:
        """Reload the file, or one of other models; return the lines of the report."""
        if models is not None:
            self.write(models, server)
        lines: list[str] = (await soon(self.control.reload(dry_run=False)))["lines"]
        return lines

    async def reloading(self, models: Entries) -> asyncio.Task[list[str]]:
        """A reload that waits for something."""
        self.write(models)
        reloading = asyncio.create_task(self.reload())
        await until(lambda: self.backend.adopted != [] or reloading.done())
        await some_ms()
        assert not reloading.done()
        return reloading

    def places(self, *names: str) -> dict[str, list[Placement]]:
        """Where the engines of these models are."""
        entries = [self.pool.models[name] for name in names]
        return {each.name: [replica.placement for replica in each.replicas] for each in entries}

    def engine(self, name: str) -> Engine:
        """The one that was started last."""
        return self.backend.engines[name][-1]

    def shown(self, name: str) -> dict[str, Any]:
        return next(model for model in self.control.models() if model["name"] == name)

    def gauges(self, model: str) -> set[str]:
        """The gauges of a model."""
        page = generate_latest(self.metrics.registry).decode().splitlines()
        return {
            line.partition("{")[0]
            for line in page
            if f'model="{model}"' in line and "_total{" not in line and "_created{" not in line
        }

    def settled(self) -> None:
        """No lease, task, reservation or engine is left without its model."""
        here = {each for entry in self.pool.models.values() for each in entry.replicas}
        assert self.pool.router.leases == {}
        assert set(self.pool.replicas) == here
        assert self.pool.supervisor._tasks == {}
        assert set(self.pool._gauges._dispatched) <= here
        assert {each for each, level in self.pool.life._reserved.items() if level} == {
            each for each in here if each.level
        }
        alive = {each.running for each in here if each.running is not None}
        all_engines = {each for engines in self.backend.engines.values() for each in engines}
        assert {each for each in all_engines if not each.stopped} == alive
        assert all(entry.slots.in_flight == 0 for entry in self.pool.models.values())
        assert [model.name for model in self.pool.registry.models] == list(self.pool.models)


class Boxes(Protocol):
    def __call__(
        self,
        models: Entries,
        *,
        started: bool = True,
        timings: LifecycleTimings = FAST,
        **server: Any,
    ) -> Awaitable[Box]: ...


@pytest.fixture
async def up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Boxes]:
    """A started server with these models; its leases, tasks and engines are checked at the end."""
    boxes: list[Box] = []

    async def up(
        models: Entries,
        *,
        started: bool = True,
        timings: LifecycleTimings = FAST,
        **server: Any,
    ) -> Box:
        box = Box(tmp_path / "models.yaml", models, server, timings)
        boxes.append(box)
        if started:
            await soon(box.pool.start())
        return box

    yield up
    for box in boxes:
        box.settled()
    unforeseen = [
        each.message for each in caplog.get_records("call") if "unforeseen" in each.message
    ]
    assert unforeseen == []


# --- state


async def test_document_of_a_model(up: Boxes) -> None:
    box = await up({"a": {"memory": 40, "aliases": ["x"], "priority": 3, "max_in_flight": 1}})
    lease = await soon(box.ask("a"))
    waiting = await box.asking("x")
    [model] = box.control.models()
    [replica] = model.pop("replicas")
    assert model == {
        "name": "a",
        "aliases": ["x"],
        "start": "eager",
        "pinned": False,
        "priority": 3,
        "state": "ready",
        "level": "ready",
        "in_flight": 1,
        "queued": 1,
        "idle_s": 0.0,
        "swaps": 0,
        "deaths": 0,
        "note": "",
    }
    assert replica.pop("since_s") >= 0
    assert replica.pop("start_s") >= 0
    assert replica == {
        "number": 0,
        "state": "ready",
        "level": "ready",
        "note": "",
        "devices": [0],
        "wake_s": None,
        "gpu_bytes": 40,
        "host_bytes": None,
        "pid": 4242,
    }
    lease.release()
    (await soon(waiting)).release()


async def test_documents_are_json_in_every_state(up: Boxes) -> None:
    box = await up(
        {
            "ready": {"memory": 10, "replicas": 2},
            "asleep": {"memory": 10, "start": "sleeping"},
            "stopped": {"memory": 10, "start": "lazy"},
            "failed": {"memory": 10, "replicas": 2},
        },
        started=False,
    )
    box.backend.next |= {"failed/0": broken("no file"), "failed/1": broken("no file")}
    box.backend.next["ready/1"] = broken("no memory")
    await soon(box.pool.start())
    assert orjson.loads(orjson.dumps(box.control.models())) == box.control.models()
    assert box.states() == {
        "ready": "ready",
        "asleep": "sleeping",
        "stopped": "stopped",
        "failed": "failed",
    }
    shown = {model["name"]: model["replicas"] for model in box.control.models()}
    assert [each["state"] for each in shown["ready"]] == ["ready", "failed"]
    assert [each["note"] for each in shown["ready"]] == ["", "no memory"]
    assert [each["pid"] for each in shown["ready"]] == [4242, None]
    [asleep] = shown["asleep"]
    assert (asleep["level"], asleep["gpu_bytes"], asleep["host_bytes"]) == ("host", 1, 10)
    assert asleep["devices"] == [0]
    [stopped] = shown["stopped"]
    assert (stopped["level"], stopped["gpu_bytes"], stopped["start_s"]) == ("stopped", None, None)
    assert box.shown("failed")["note"] == "no file"
    await soon(box.control.wake("asleep"))
    assert box.shown("asleep")["replicas"][0]["wake_s"] >= 0


async def test_document_counts_evictions_and_deaths(up: Boxes) -> None:
    box = await up({"a": {"memory": 60, "start": "lazy"}, "b": {"memory": 60, "start": "lazy"}})
    await box.use("a", "b", "a")
    assert [box.shown(name)["swaps"] for name in "ab"] == [1, 1]
    async with box.watched():
        box.engine("a").dead = True
        await box.until(lambda: box.shown("a")["deaths"] == 1 and box.states()["a"] == "ready")


async def test_log_is_the_file_of_the_running_engine(up: Boxes) -> None:
    """Also if the model has another number of replicas by now, and its file another name."""
    box = await up({"a": {"replicas": 2, "aliases": ["x"]}})
    running: Any = box.pool.models["a"].replicas[1].running
    running.log = Path("/logs/as-it-was-started")
    assert box.control.log_of("x", 1) == running.log
    assert box.control.log_of("x", 2) == Path("/logs/a+2")
    await soon(box.control.unload("a", drain=True))
    assert box.control.log_of("x", 1) == Path("/logs/a+1")


@pytest.mark.parametrize("action", ["load", "wake", "sleep", "unload"])
async def test_command_for_an_unknown_model_is_refused(up: Boxes, action: str) -> None:
    box = await up({"a": {}})
    actions: dict[str, Callable[[str], Awaitable[None]]] = {
        "load": box.control.load,
        "wake": box.control.wake,
        "sleep": box.control.sleep,
        "unload": partial(box.control.unload, drain=True),
    }
    with pytest.raises(ModelNotFound):
        await actions[action]("b")
    with pytest.raises(ModelNotFound):
        box.control.log_of("b", 0)
    with pytest.raises(ModelNotFound):
        box.control.model("b")
    assert box.states() == {"a": "ready"}


async def test_changes_of_state_are_events(up: Boxes) -> None:
    box = await up({"a": {}})
    events = box.control.events()
    first = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    await soon(box.control.unload("a", drain=True))
    event = await soon(first)
    assert (event["model"], event["from"], event["to"]) == ("a", "ready", "draining")


# --- load, unload


async def test_load_starts_stopped_replicas_only(up: Boxes) -> None:
    box = await up({"a": {"start": "lazy", "replicas": 2, "aliases": ["x"]}})
    await soon(box.control.load("x"))
    assert [each["state"] for each in box.shown("a")["replicas"]] == ["ready", "ready"]
    await soon(box.control.load("a"))
    assert sorted(box.backend.started) == ["a/0", "a/1"]


async def test_load_waits_for_a_model_that_starts_with_the_server(up: Boxes) -> None:
    box = await up({"a": {}}, started=False)
    gate = box.backend.gate("a")
    starting = await box.starting(gate)
    loading = asyncio.create_task(box.control.load("a"))
    await some_ms()
    assert not loading.done()
    await gate.open_for(loading)
    await soon(starting)
    assert box.backend.started == ["a"]


async def test_failed_load_names_its_cause(up: Boxes) -> None:
    box = await up({"a": {"start": "lazy"}})
    box.backend.next["a"] = broken("OSError: no space left")
    with pytest.raises(Overloaded, match="`a` is failed: OSError: no space left"):
        await soon(box.control.load("a"))
    await soon(box.control.load("a"))
    assert box.states() == {"a": "ready"}
    assert box.shown("a")["note"] == ""


async def test_load_succeeds_with_one_ready_replica(up: Boxes) -> None:
    box = await up({"a": {"start": "lazy", "replicas": 2}})
    box.backend.next["a/1"] = broken()
    await soon(box.control.load("a"))
    assert [each["state"] for each in box.shown("a")["replicas"]] == ["ready", "failed"]


async def test_load_restarts_a_model_that_died_too_often(up: Boxes) -> None:
    box = await up({"a": {}})
    async with box.watched():
        for number in range(restart_backoff.GIVE_UP):
            box.engine("a").dead = True
            await until(lambda: box.shown("a")["deaths"] == number + 1)  # noqa: B023  # waited for here
            await box.until(lambda: box.states()["a"] in {"ready", "failed"})
        assert box.states() == {"a": "failed"}
        with pytest.raises(EngineDead):
            await soon(box.ask("a"))
        await soon(box.control.load("a"))
        await box.use("a")
        box.engine("a").dead = True  # the first in a row again
        await box.until(lambda: box.shown("a")["deaths"] == restart_backoff.GIVE_UP + 1)
        await box.until(lambda: box.states()["a"] == "ready")


async def test_unload_drains_and_refuses_the_queue(up: Boxes) -> None:
    box = await up({"a": {"max_in_flight": 1}})
    held = await soon(box.ask("a"))
    queued = [await box.asking("a") for _ in range(2)]
    unloading = asyncio.create_task(box.control.unload("a", drain=True))
    for each in queued:
        with pytest.raises(Overloaded, match="`a` is being unloaded") as refused:
            await soon(each)
        assert refused.value.code == "model_unloaded"
    await some_ms()
    assert (box.states(), unloading.done()) == ({"a": "draining"}, False)
    assert box.engine("a").stopped == 0
    held.release()
    await soon(unloading)
    assert box.states() == {"a": "stopped"}
    assert box.engine("a").stopped == 1
    assert held.cut_by is None


async def test_unload_without_drain_cuts_its_requests_only(up: Boxes) -> None:
    box = await up({"a": {}, "b": {}})
    held: dict[str, Lease] = {}

    async def request(name: str) -> None:
        held[name] = await box.ask(name, task=asyncio.current_task())
        try:
            await asyncio.Event().wait()
        finally:
            held[name].release()

    requests = {name: asyncio.create_task(request(name)) for name in "ab"}
    await until(lambda: len(held) == 2)
    await soon(box.control.unload("a", drain=False))
    assert requests["a"].cancelled()
    assert held["a"].cut_by is not None
    assert held["a"].cut_by.code == "model_unloaded"
    assert box.states() == {"a": "stopped", "b": "ready"}
    assert not requests["b"].done()
    requests["b"].cancel()
    with suppress(asyncio.CancelledError):
        await requests["b"]


async def test_request_loads_an_unloaded_model(up: Boxes) -> None:
    box = await up({"a": {}})
    await soon(box.control.unload("a", drain=True))
    await soon(box.control.unload("a", drain=True))
    assert box.engine("a").stopped == 1
    await box.use("a")
    assert box.backend.started == ["a", "a"]


async def test_unload_of_a_starting_model_waits_for_its_start(up: Boxes) -> None:
    box = await up({"a": {"start": "lazy"}})
    gate = box.backend.gate("a")
    waiting = await gate.begin(box.ask("a"))
    unloading = asyncio.create_task(box.control.unload("a", drain=True))
    with pytest.raises(Overloaded):
        await soon(waiting)
    await some_ms()
    assert not unloading.done()
    await gate.open_for(unloading)
    await some_ms()
    assert box.states() == {"a": "stopped"}


async def test_unload_now_of_a_starting_model_cancels_its_start(up: Boxes) -> None:
    box = await up({"a": {"start": "lazy"}})
    gate = box.backend.gate("a")
    waiting = await box.asking("a")
    loading = await gate.begin(box.control.load("a"))
    await soon(box.control.unload("a", drain=False))
    assert gate.cancelled
    assert box.states() == {"a": "stopped"}
    assert not box.pool.life._reserved
    with pytest.raises(Overloaded):
        await soon(waiting)
    with pytest.raises(Overloaded, match="`a` is stopped"):
        await soon(loading)
    await box.use("a")
    assert box.states() == {"a": "ready"}


async def test_unload_now_of_a_waking_model_ends_its_engine(up: Boxes) -> None:
    box = await up({"a": {"start": "sleeping", "memory": 20}})
    engine = box.engine("a")
    await soon(box.control.sleep("a"))
    gate = Gate()
    engine.wake = gate.wait  # type: ignore[method-assign]
    loading = await gate.begin(box.control.load("a"))
    await soon(box.control.unload("a", drain=False))
    assert (box.states(), engine.stopped) == ({"a": "stopped"}, 1)
    with pytest.raises(Overloaded):
        await soon(loading)


@pytest.mark.parametrize("drain", [False, True])
async def test_unload_before_a_restart_stops_the_model(up: Boxes, drain: bool) -> None:
    """At once, or after the restart."""
    pause_s = 0.02 if drain else 60.0
    box = await up({"a": {}}, timings=replace(FAST, first_restart_s=pause_s))
    box.engine("a").dead = True
    assert box.pool.supervisor.handle_death(box.replica("a"))
    assert box.states() == {"a": "waiting"}
    await soon(box.control.unload("a", drain=drain))
    assert box.states() == {"a": "stopped"}
    assert box.backend.started == ["a"] * (2 if drain else 1)


async def test_request_during_a_cancelled_start_starts_again(up: Boxes) -> None:
    box = await up({"a": {"start": "lazy"}})
    gate = box.backend.gate("a")
    first = await gate.begin(box.ask("a"))
    unloading = asyncio.create_task(box.control.unload("a", drain=False))
    with pytest.raises(Overloaded):
        await soon(first)
    box.backend.next["a"] = Plan()
    await box.use("a")
    await soon(unloading)
    assert box.states() == {"a": "ready"}


async def test_stopping_server_refuses_a_load(up: Boxes) -> None:
    box = await up({"a": {"start": "lazy"}})
    box.pool.close()
    with pytest.raises(Overloaded, check=with_code("shutting_down")):
        await soon(box.control.load("a"))
    assert box.backend.started == []


# --- sleep, wake


async def test_sleep_and_wake(up: Boxes) -> None:
    box = await up({"a": {"memory": 40, "start": "sleeping"}})
    await soon(box.control.wake("a"))
    held = await soon(box.ask("a"))
    sleeping = asyncio.create_task(box.control.sleep("a"))
    await some_ms()
    assert (box.states(), sleeping.done()) == ({"a": "draining"}, False)
    held.release()
    await soon(sleeping)
    assert (box.shown("a")["state"], box.shown("a")["level"]) == ("sleeping", "host")
    await soon(box.control.sleep("a"))
    assert box.engine("a").slept == [Level.HOST, Level.READY, Level.HOST]
    await soon(box.control.wake("a"))
    assert box.states() == {"a": "ready"}
    assert box.backend.started == ["a"]


@pytest.mark.parametrize("entry", [{}, {"start": "lazy"}])
async def test_sleep_without_sleep_mode_is_refused(up: Boxes, entry: dict[str, Any]) -> None:
    box = await up({"a": entry})
    before = box.states()
    with pytest.raises(RequestError, match=r"`a` cannot sleep: .* `unload` ends it"):
        await box.control.sleep("a")
    assert box.states() == before


async def test_unload_stops_a_sleeping_engine(up: Boxes) -> None:
    box = await up({"a": {"memory": 40, "start": "sleeping"}})
    await soon(box.control.unload("a", drain=True))
    assert (box.states(), box.engine("a").stopped) == ({"a": "stopped"}, 1)


# --- a reload that changes nothing


async def test_reload_of_a_wrong_file_changes_nothing(up: Boxes) -> None:
    box = await up({"a": {}, "b": {}})
    was = box.control.server
    box.write({"a": {"max_in_flight": 7, "aliases": ["x"]}, "c": {"replicas": "many"}})
    with pytest.raises(ConfigError, match="replicas"):
        await box.reload()
    with pytest.raises(ModelNotFound):
        box.pool.find("x")
    assert box.control.server is was
    assert box.pool.models["a"].slots.limit == 1024
    assert (list(box.pool.models), box.backend.adopted) == (["a", "b"], [])
    assert await box.reload({"a": {}, "b": {}}) == []


async def test_reload_of_a_missing_file_changes_nothing(up: Boxes) -> None:
    box = await up({"a": {}})
    box.file.unlink()
    with pytest.raises(ConfigError):
        await box.reload()
    assert box.states() == {"a": "ready"}


async def test_reload_without_room_changes_nothing(up: Boxes) -> None:
    box = await up({"a": {}, "b": {}})
    was = box.control.server
    box.backend.plan_error = PlacementError(["models.c: needs 80 GiB"])
    with pytest.raises(ConfigError, match="needs 80 GiB"):
        await box.reload({"a": {"max_in_flight": 7}, "c": {"memory": 1}})
    assert box.control.server is was
    assert box.pool.models["a"].slots.limit == 1024
    assert list(box.pool.models) == ["a", "b"]
    box.backend.plan_error = None
    assert await box.reload() == [
        "b: removed",
        "a: changed live (max_in_flight 1024 -> 7)",
        "c: added",
    ]


async def test_dry_run_changes_nothing(up: Boxes) -> None:
    box = await up({"a": {}, "b": {}, "c": {}})
    was, entries = box.control.server, dict(box.pool.models)
    box.write(
        {"a": {"memory": 10}, "b": {"priority": 2, "aliases": ["x"]}, "d": {"memory": 1}},
        {"drain_timeout": 5, "port": 9},
    )
    for _ in range(2):
        report = await soon(box.control.reload(dry_run=True))
        assert report["changed"] is True
        assert [line.partition(" (")[0] for line in report["lines"]] == [
            "c: removed",
            "a: restarts",
            "b: changed live",
            "d: added",
            "server.drain_timeout: changed live",
            "server.port: needs a restart of the server; not changed",
        ]
        orjson.dumps(report)
    assert box.control.server is was
    assert box.pool.models == entries
    assert box.backend.adopted == []
    assert box.backend.plans_made == [box.places("b")] * 2
    assert sorted(box.backend.started) == ["a", "b", "c"]


async def test_reload_of_the_same_file_changes_nothing(up: Boxes) -> None:
    box = await up({"a": {}, "b": {"replicas": 2}})
    entries = dict(box.pool.models)
    report = await soon(box.control.reload(dry_run=False))
    assert (report["changed"], report["lines"], report["unchanged"]) == (False, [], ["a", "b"])
    assert box.pool.models == entries
    assert box.backend.plans_made == [box.places("a", "b")]


# --- changes of running models


async def test_changed_limits_apply_at_once(up: Boxes) -> None:
    box = await up({"a": {"max_in_flight": 1}})
    held = await soon(box.ask("a"))
    await box.reload({"a": {"max_in_flight": 2, "max_queue": 1, "hidden": True, "priority": 4}})
    second = await soon(box.ask("a"))
    waiting = await box.asking("a")
    with pytest.raises(Overloaded, match="its max_in_flight and max_queue"):
        await box.ask("a")
    assert box.pool.registry.public_names() == []
    assert box.shown("a")["priority"] == 4
    await box.reload({"a": {"max_in_flight": 1, "max_queue": 1}})
    held.release()
    await some_ms()
    assert not waiting.done()
    second.release()
    (await soon(waiting)).release()
    assert box.engine("a").changes == []
    assert box.backend.started == ["a"]


async def test_changed_idle_times_apply_at_once(up: Boxes) -> None:
    box = await up({"a": {}})
    async with box.watched():
        await box.reload({"a": {"idle": {"stop_after": 0.001}}})
        await box.until(lambda: box.states() == {"a": "stopped"})


async def test_changed_alias_keeps_the_engine(up: Boxes) -> None:
    box = await up({"a": {"aliases": ["x"], "replicas": 2}})
    held = await soon(box.ask("x"))
    lines = await box.reload({"a": {"aliases": ["y"], "replicas": 2}})
    assert lines == ['a: changed live (aliases ["x"] -> ["y"])']
    assert [box.engine(f"a/{n}").changes[0].aliases for n in range(2)] == [("y",), ("y",)]
    with pytest.raises(ModelNotFound):
        await box.ask("x")
    await box.use("y")
    held.release()
    assert sorted(box.backend.started) == ["a/0", "a/1"]


async def test_changed_alias_is_found_after_the_rebuild(up: Boxes) -> None:
    box = await up({"a": {"aliases": ["x"]}})
    gate = box.engine("a").change_gate = Gate()
    reloading = await box.reloading({"a": {"aliases": ["y"]}})
    assert await box.use("a", "x") == [box.engine("a")] * 2
    with pytest.raises(ModelNotFound):
        await box.ask("y")
    await gate.open_for(reloading)
    await box.use("a", "y")
    with pytest.raises(ModelNotFound):
        await box.ask("x")


async def test_failed_rebuild_leaves_its_model_and_changes_the_others(
    up: Boxes,
) -> None:
    box = await up({"a": {}, "b": {}, "c": {}, "d": {}})
    box.engine("b").change_error = EngineError("the template is none")
    after: Entries = {
        "a": {"aliases": ["x"]},
        "b": {"aliases": ["y"], "priority": 1},
        "d": {"memory": 10},
        "e": {"memory": 10},
    }
    lines = await box.reload(after)
    assert lines[-1] == "b: the template is none; the model continues unchanged"
    await box.use("x", "b", "d", "e")
    with pytest.raises(ModelNotFound):
        await box.ask("y")
    assert box.shown("b")["priority"] == 0
    assert list(box.pool.models) == ["a", "b", "d", "e"]
    box.engine("b").change_error = ValueError("still")
    assert (await box.reload())[-1] == "b: ValueError: still; the model continues unchanged"
    box.engine("b").change_error = None
    assert await box.reload() == [
        'b: changed live (aliases [] -> ["y"], priority 0 -> 1)',
    ]
    await box.use("y")


async def test_replicas_are_all_rebuilt_or_none(up: Boxes) -> None:
    box = await up({"a": {"replicas": 2}})
    first = box.replica("a").running
    box.engine("a/1").change_error = EngineError("no")
    await box.reload({"a": {"replicas": 2, "aliases": ["x"]}})
    assert box.replica("a").running is first
    assert box.shown("a")["aliases"] == []


async def test_fixed_keys_of_the_server_are_reported_each_time(
    up: Boxes,
) -> None:
    box = await up({"a": {}}, drain_timeout=3)
    port = box.control.server.port
    for changed in (["server.drain_timeout: changed live (3.0 -> 5.0)"], []):
        lines = await box.reload({"a": {}}, {"drain_timeout": 5, "port": 9, "gpu_headroom": 0.5})
        assert lines == [
            *changed,
            "server.port: needs a restart of the server; not changed",
            "server.gpu_headroom: needs a restart of the server; not changed",
        ]
        assert box.control.server.drain_timeout == 5
        assert (box.control.server.port, box.control.server.gpu_headroom) == (port, 0.08)
        assert box.backend.adopted[-1].server == box.control.server


# --- removed and added models


async def test_renamed_model_gets_a_new_engine(up: Boxes) -> None:
    box = await up({"a": {"memory": 60}})
    held = await soon(box.ask("a"))
    reloading = await box.reloading({"new": {"memory": 60, "aliases": ["a"]}})
    with pytest.raises(Overloaded, match="new"):  # its start waits for the old engine's memory
        await box.ask("a")
    held.release()
    assert await soon(reloading) == ["a: removed", "new: added"]
    assert await box.use("new", "a") == [box.engine("new")] * 2
    assert box.backend.started == ["a", "new"]
    assert box.gauges("a") == set()


async def test_removed_model_completes_its_requests(up: Boxes) -> None:
    box = await up({"a": {"max_in_flight": 1, "replicas": 2}, "b": {}})
    held = await soon(box.ask("a"))
    queued = [await box.asking("a") for _ in range(2)]
    reloading = await box.reloading({"b": {}})
    with pytest.raises(ModelNotFound):
        await box.ask("a")
    assert (box.gauges("a"), box.states()) == (set(), {"b": "ready"})
    held.release()
    for each in queued:
        lease = await soon(each)
        await some_ms()
        assert not reloading.done()
        lease.release()
    assert await soon(reloading) == ["a: removed"]
    assert [box.engine(f"a/{n}").stopped for n in range(2)] == [1, 1]
    assert box.gauges("a") == set()
    assert [replica.name for replica in box.pool.replicas] == ["b"]


@pytest.mark.parametrize("error", [None, StartupError("no")])
async def test_removed_model_starts_for_its_queue(up: Boxes, error: StartupError | None) -> None:
    box = await up({"a": {"start": "lazy"}, "b": {}})
    gate = box.backend.gate("a", error=error)
    waiting = await box.asking("a")
    reloading = await box.reloading({"b": {}})
    gate.opened.set()
    if error is None:
        (await soon(waiting)).release()
    else:
        with pytest.raises(EngineDead):
            await soon(waiting)
    assert await soon(reloading) == ["a: removed"]
    assert box.gauges("a") == set()


async def test_removed_model_that_waits_for_memory_ends(up: Boxes) -> None:
    box = await up({"a": {"memory": 60}, "b": {"memory": 60, "start": "lazy"}})
    held = await soon(box.ask("a"))
    waiting = await box.asking("b")
    await box.until(lambda: box.states()["a"] == "draining")
    waiting.cancel()
    reloading = await box.reloading({"a": {"memory": 60}})
    held.release()
    await soon(reloading)
    await some_ms()
    assert list(box.pool.models) == ["a"]


async def test_removed_model_that_waits_for_its_restart_ends(
    up: Boxes,
) -> None:
    box = await up({"a": {}, "b": {"memory": 1}}, timings=replace(FAST, first_restart_s=0.05))
    box.engine("a").dead = True
    assert box.pool.supervisor.handle_death(box.replica("a"))
    await box.reload({"b": {"memory": 1}})
    await asyncio.sleep(0.06)
    assert box.states() == {"b": "ready"}


async def test_added_models_start_by_their_key_start(up: Boxes) -> None:
    box = await up({"a": {"memory": 10}})
    lines = await box.reload(
        {
            "lazy": {"memory": 10, "start": "lazy"},
            "eager": {"memory": 10},
            "asleep": {"memory": 10, "start": "sleeping"},
            "a": {"memory": 10},
        }
    )
    assert lines == ["lazy: added", "eager: added", "asleep: added"]
    assert list(box.states().items()) == [
        ("lazy", "stopped"),
        ("eager", "ready"),
        ("asleep", "sleeping"),
        ("a", "ready"),
    ]
    assert [each.name for each in box.pool.replicas] == ["lazy", "eager", "asleep", "a"]
    assert "llmserve_model_state" in box.gauges("lazy")
    await box.use("lazy", "eager", "asleep")


async def test_failed_added_model_is_reported(up: Boxes) -> None:
    box = await up({"a": {}})
    box.backend.next |= {"b": broken("no weights"), "c/1": broken("no memory")}
    lines = await box.reload({"a": {}, "b": {}, "c": {"replicas": 2}})
    assert lines == ["b: added", "c: added", "b: no weights", "c/1: no memory"]
    assert box.states() == {"a": "ready", "b": "failed", "c": "ready"}


async def test_added_model_gets_the_memory_of_a_removed_pinned_one(up: Boxes) -> None:
    box = await up({"a": {"memory": 60, "pinned": True}})
    held = await soon(box.ask("a"))
    reloading = await box.reloading({"b": {"memory": 70, "pinned": True}})
    assert box.states() == {"b": "waiting"}
    held.release()
    assert await soon(reloading) == ["a: removed", "b: added"]
    assert box.states() == {"b": "ready"}


async def test_reload_of_all_kinds_keeps_the_order_of_the_file(up: Boxes) -> None:
    box = await up({name: {"memory": 5} for name in "abcde"})
    lines = await box.reload(
        {
            "new": {"memory": 5, "priority": 1},
            "e": {"memory": 6},
            "d": {"memory": 5, "replicas": 2},
            "c": {"memory": 5, "aliases": ["x"]},
            "a": {"memory": 5},
        }
    )
    assert [line.partition(" (")[0] for line in lines] == [
        "b: removed",
        "e: restarts",
        "d: resized",
        "c: changed live",
        "new: added",
    ]
    assert list(box.pool.models) == ["new", "e", "d", "c", "a"]
    assert [model["name"] for model in box.control.models()] == ["new", "e", "d", "c", "a"]
    assert [each.name for each in box.pool.replicas] == ["new", "e", "d/0", "d/1", "c", "a"]
    assert box.pool.registry.public_names() == ["new", "e", "d", "c", "x", "a"]


# --- new engines


async def test_old_engine_serves_until_the_new_one_is_ready(up: Boxes) -> None:
    box = await up({"a": {"memory": 40, "aliases": ["x"]}})
    gate = Gate()
    old = box.engine("a")
    held = await soon(box.ask("a"))
    box.backend.next["a"] = Plan(gate=gate)
    reloading = await box.reloading({"a": {"memory": 50, "aliases": ["y"]}})
    await soon(gate.reached.wait())
    assert await box.use("a", "x") == [old, old]
    with pytest.raises(ModelNotFound):
        await box.ask("y")
    gate.opened.set()
    await box.until(lambda: box.replica("a").running is not old)
    new = box.engine("a")
    assert await box.use("a", "y") == [new, new]
    await some_ms()
    assert (old.stopped, reloading.done()) == (0, False)
    held.release()
    assert await soon(reloading) == [
        'a: restarts (aliases ["x"] -> ["y"], memory 40B -> 50B)',
    ]
    assert (old.stopped, new.stopped) == (1, 0)
    assert box.metric("model_state", model="a", replica="0", state="ready") == 1


async def test_restarted_lazy_model_serves_meanwhile(up: Boxes) -> None:
    box = await up({"a": {"memory": 40, "start": "lazy"}})
    [old] = await box.use("a")
    gate = box.backend.gate("a")
    reloading = await box.reloading({"a": {"memory": 50, "start": "lazy"}})
    assert await box.use("a") == [old]
    await gate.open_for(reloading)
    assert await box.use("a") == [box.engine("a")]
    assert box.backend.started == ["a", "a"]


async def test_restarted_lazy_model_stays_stopped(up: Boxes) -> None:
    box = await up({"a": {"memory": 40, "start": "lazy"}})
    await box.reload({"a": {"memory": 50, "start": "lazy"}})
    assert (box.states(), box.backend.started) == ({"a": "stopped"}, [])
    await box.use("a")
    assert box.shown("a")["replicas"][0]["gpu_bytes"] == 50


async def test_queue_moves_to_the_new_engine_in_order(up: Boxes) -> None:
    box = await up({"a": {"memory": 40, "max_in_flight": 1}})
    old = box.engine("a")
    held = await soon(box.ask("a"))
    queued = [await box.asking("a") for _ in range(3)]
    reloading = asyncio.create_task(box.reload({"a": {"memory": 50, "max_in_flight": 1}}))
    assert set(await released_in_order(queued)) == {box.engine("a")} != {old}
    assert not reloading.done()
    held.release()
    await soon(reloading)


async def test_failed_new_engine_leaves_the_old_one(up: Boxes) -> None:
    box = await up({"a": {"memory": 40, "aliases": ["x"]}, "b": {}})
    old = box.engine("a")
    box.backend.next["a"] = broken("no such weights")
    after: Entries = {"a": {"memory": 50, "aliases": ["y"], "priority": 1}, "b": {"priority": 2}}
    lines = await box.reload(after)
    assert lines[-1] == "a: no such weights; the old engine continues"
    assert await box.use("a", "x") == [old, old]
    with pytest.raises(ModelNotFound):
        await box.ask("y")
    assert (box.shown("a")["priority"], box.shown("b")["priority"]) == (0, 2)
    assert box.metric("model_state", model="a", replica="0", state="ready") == 1
    report = await soon(box.control.reload(dry_run=True))
    assert [change["model"] for change in report["restarted"]] == ["a"]
    await box.reload()  # the same file again
    await box.use("a", "y")
    assert (old.stopped, box.engine("a").stopped) == (1, 0)


async def test_file_set_back_after_a_failure_changes_nothing(up: Boxes) -> None:
    box = await up({"a": {"memory": 40}})
    box.backend.next["a"] = broken()
    await box.reload({"a": {"memory": 50}})
    assert await box.reload({"a": {"memory": 40}}) == []
    assert box.backend.started == ["a", "a"]


async def test_one_ready_new_replica_replaces_the_old_engine(up: Boxes) -> None:
    box = await up({"a": {"memory": 20}})
    old = box.engine("a")
    box.backend.next["a/1"] = broken("no memory")
    lines = await box.reload({"a": {"memory": 30, "replicas": 2}})
    assert lines[1:] == ["a/1: no memory"]
    assert await box.use("a") == [box.engine("a/0")]
    assert old.stopped == 1


async def test_failed_model_is_replaced_by_a_failing_one(up: Boxes) -> None:
    box = await up({"a": {"memory": 40}, "b": {}}, started=False)
    box.backend.next["a"] = broken("no weights")
    await soon(box.pool.start())
    box.backend.next["a"] = broken("no config")
    assert (await box.reload({"a": {"memory": 50}, "b": {}}))[1:] == ["a: no config"]
    assert box.shown("a")["note"] == "no config"
    assert await box.reload({"a": {"memory": 60}, "b": {}}) == ["a: restarts (memory 50B -> 60B)"]
    assert box.states() == {"a": "ready", "b": "ready"}


@pytest.mark.parametrize("start", ["eager", "lazy"])
@pytest.mark.parametrize("pinned", [False, True])
async def test_restart_without_room_keeps_the_order_of_the_queue(
    up: Boxes, start: str, pinned: bool
) -> None:
    keys = {"max_in_flight": 1, "start": start, "pinned": pinned}
    box = await up({"a": {"memory": 60} | keys})
    held = await soon(box.ask("a"))
    old = box.engine("a")
    queued = [await box.asking("a") for _ in range(2)]
    gate = box.backend.gate("a")
    reloading = await box.reloading({"a": {"memory": 70} | keys})
    queued += [await box.asking("a") for _ in range(2)]
    assert (old.stopped, gate.reached.is_set()) == (0, False)
    held.release()
    await soon(gate.reached.wait())
    assert old.stopped == 1
    queued += [await box.asking("a") for _ in range(2)]
    gate.opened.set()
    assert set(await released_in_order(queued)) == {box.engine("a")} != {old}
    assert await soon(reloading) == ["a: restarts (memory 60B -> 70B)"]


async def test_failed_restart_without_room_refuses_the_queue(
    up: Boxes,
) -> None:
    box = await up({"a": {"memory": 60}})
    held = await soon(box.ask("a"))
    box.backend.next["a"] = broken("no such weights")
    reloading = await box.reloading({"a": {"memory": 70}})
    waiting = await box.asking("a")
    held.release()
    with pytest.raises(EngineDead, match="`a` could not be started"):
        await soon(waiting)
    assert (await soon(reloading))[1:] == ["a: no such weights"]
    assert box.states() == {"a": "failed"}
    assert box.pool.life.fits([box.replica("a")])  # its place is free
    await box.reload({"a": {"memory": 60}})
    await box.use("a")


async def test_restart_without_room_evicts_others(up: Boxes) -> None:
    box = await up({"a": {"memory": 40}, "b": {"memory": 60}})
    await box.reload({"a": {"memory": 90}, "b": {"memory": 60}})
    assert box.states() == {"a": "ready", "b": "stopped"}
    await box.use("b")
    assert box.states() == {"a": "stopped", "b": "ready"}


# --- stored responses


@pytest.mark.parametrize(
    ("reloads", "kept"),
    [
        pytest.param([{"a": {}}], True, id="unchanged"),
        pytest.param([{"a": {"priority": 1}}], True, id="live"),
        pytest.param([{"a": {"aliases": ["x"]}}], True, id="rebuilt"),
        pytest.param([{"a": {"replicas": 2}}], True, id="resized"),
        pytest.param([{"a": {"memory": 10}}], True, id="restarted"),
        pytest.param([{"a": {"model": "org/other"}}], False, id="another model"),
        pytest.param([{"new": {"aliases": ["a"]}}], False, id="another name"),
        pytest.param([{}, {"a": {}}], False, id="removed and added"),
        pytest.param([{}, {"a": {"model": "org/other"}}], False, id="removed, another added"),
    ],
)
async def test_reload_keeps_responses_while_the_model_is_the_same(
    up: Boxes, reloads: list[Entries], kept: bool
) -> None:
    """Else a model would continue the conversations of another one."""
    box = await up({"a": {}, "b": {}})
    box.engine("a").handler.response_store["r"] = SimpleNamespace(status="completed")
    for models in reloads:
        await box.reload({"b": {}} | models)
    model = box.pool.find("a")
    assert model.responses.has("r", "") is kept
    running: list[Any] = [replica.running for replica in model.replicas]
    assert {"r" in each.handler.response_store for each in running} == {kept}


# --- more and fewer replicas


async def test_replicas_are_added_and_removed(up: Boxes) -> None:
    box = await up({"a": {"memory": 30}})
    first = box.engine("a")
    held = await soon(box.ask("a"))
    gate = box.backend.gate("a/1")
    reloading = await box.reloading({"a": {"memory": 30, "replicas": 2}})
    assert await box.use("a") == [first]
    assert await gate.open_for(reloading) == ["a: resized (replicas 1 -> 2)"]
    second = box.engine("a/1")
    leases = [await soon(box.ask("a")) for _ in range(3)]
    assert {lease.running for lease in leases} == {first, second}
    assert [each["number"] for each in box.shown("a")["replicas"]] == [0, 1]
    of_first = [lease for lease in leases if lease.running is first]
    for lease in of_first:
        lease.release()
    back = await box.reloading({"a": {"memory": 30}})
    assert await box.use("a") == [first]
    assert second.stopped == 0
    for lease in leases:
        lease.release()
    assert await soon(back) == ["a: resized (replicas 2 -> 1)"]
    assert (first.stopped, second.stopped) == (0, 1)
    assert box.metric("model_state", model="a", replica="1", state="ready") is None
    assert box.metric("replica_tokens_in_flight", model="a", replica="1") is None
    held.release()
    assert box.backend.started == ["a", "a/1"]


async def test_resized_engines_get_new_aliases(up: Boxes) -> None:
    box = await up({"a": {"memory": 30}})
    first = box.engine("a")
    await box.reload({"a": {"memory": 30, "replicas": 2, "aliases": ["x"]}})
    assert [spec.aliases for spec in first.changes] == [("x",)]
    assert set(await box.use("x", "x")) == {first, box.engine("a/1")}
    first.change_error = EngineError("no")
    lines = await box.reload({"a": {"memory": 30, "aliases": ["y"]}})
    assert lines[-1] == "a: no; the model continues unchanged"
    assert [each["state"] for each in box.shown("a")["replicas"]] == ["ready", "ready"]
    await box.use("x")


async def test_resized_replica_with_another_placement_restarts(up: Boxes) -> None:
    box = await up({"a": {"memory": 30}})
    first = box.engine("a")
    box.backend.sizes["a"] = {Level.READY: {GPU: 20}}
    await box.reload({"a": {"memory": 30, "replicas": 2}})
    assert first.stopped == 1
    assert sorted(box.backend.started) == ["a", "a/0", "a/1"]


async def test_failed_new_replica_leaves_the_first(up: Boxes) -> None:
    box = await up({"a": {"memory": 30}})
    box.backend.next["a/1"] = broken("no memory")
    lines = await box.reload({"a": {"memory": 30, "replicas": 2}})
    assert lines[1:] == ["a/1: no memory"]
    assert await box.use("a") == [box.engine("a")]


async def test_resize_keeps_the_queue(up: Boxes) -> None:
    box = await up({"a": {"memory": 60, "max_in_flight": 1}, "b": {"memory": 40}})
    held = await soon(box.ask("a"))
    queued = [await box.asking("a") for _ in range(3)]
    reloading = asyncio.create_task(
        box.reload({"a": {"memory": 60, "max_in_flight": 1, "replicas": 2}, "b": {"memory": 40}})
    )
    held.release()  # one request of the model at a time, whichever engine has it
    for each in queued:
        (await soon(each)).release()
    lines = await soon(reloading)
    assert "its own other replicas leave" in lines[-1]


# --- a reload while something else is under way


async def test_reloads_run_one_at_a_time(up: Boxes) -> None:
    box = await up({"a": {"memory": 10}})
    gate = box.backend.gate("b")
    first = await box.reloading({"a": {"memory": 10}, "b": {"memory": 10}})
    box.write({"a": {"memory": 10}, "c": {"memory": 20}})
    second = asyncio.create_task(box.reload())
    await some_ms()
    assert list(box.pool.models) == ["a", "b"]
    assert await gate.open_for(first) == ["b: added"]
    assert await soon(second) == ["b: removed", "c: added"]
    assert box.states() == {"a": "ready", "c": "ready"}


async def test_reload_after_a_failed_one_applies(up: Boxes) -> None:
    box = await up({"a": {}})
    box.file.write_text("models: [")
    for _ in range(2):
        with pytest.raises(ConfigError):
            await box.reload()
    assert await box.reload({"a": {"priority": 1}}) == ["a: changed live (priority 0 -> 1)"]


AFTER: Mapping[str, Entries] = {
    "removed": {"b": {"memory": 10}},
    "restarted": {"a": {"memory": 30}, "b": {"memory": 10}},
    "restarted without room": {"a": {"memory": 95}, "b": {"memory": 10}},
    "resized": {"a": {"memory": 20, "replicas": 2}, "b": {"memory": 10}},
    "renamed": {"new": {"memory": 20}, "b": {"memory": 10}},
    "changed": {"a": {"memory": 20, "aliases": ["x"]}, "b": {"memory": 10}},
}


@pytest.mark.parametrize("after", AFTER)
async def test_reload_while_a_model_starts(up: Boxes, after: str) -> None:
    box = await up({"a": {"memory": 20}, "b": {"memory": 10}}, started=False)
    gate = box.backend.gate("a", reports=((State.LOADING, ""),))
    starting = await box.starting(gate)
    reloading = await box.reloading(AFTER[after])
    await gate.open_for(reloading)
    await soon(starting)
    assert list(box.pool.models) == list(AFTER[after])
    names = [name for model in box.pool.registry.models for name in model.names]
    assert all(await box.use(*names))
    if after == "changed":
        assert [spec.aliases for spec in box.engine("a").changes] == [("x",)]


@asynccontextmanager
async def waking(box: Box) -> AsyncIterator[None]:
    gate = Gate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(box.engine("a"), "wake", gate.wait)
        waiting = await gate.begin(box.ask("a"))
        yield
        (await gate.open_for(waiting)).release()


@asynccontextmanager
async def draining(box: Box) -> AsyncIterator[None]:
    held = await soon(box.ask("a"))
    unloading = asyncio.create_task(box.control.unload("a", drain=True))
    await box.until(lambda: box.states()["a"] == "draining")
    yield
    held.release()
    await soon(unloading)


@asynccontextmanager
async def stopped(box: Box) -> AsyncIterator[None]:
    await soon(box.control.unload("a", drain=True))
    yield


@asynccontextmanager
async def failed(box: Box) -> AsyncIterator[None]:
    await soon(box.control.unload("a", drain=True))
    box.backend.next["a"] = broken()
    with pytest.raises(Overloaded):
        await soon(box.control.load("a"))
    yield


@asynccontextmanager
async def dead(box: Box) -> AsyncIterator[None]:
    """And soon started again."""
    box.engine("a").dead = True
    assert box.pool.supervisor.handle_death(box.replica("a"))
    yield


@asynccontextmanager
async def short_of_memory(box: Box) -> AsyncIterator[None]:
    await soon(box.control.unload("a", drain=True))
    box.backend.capacity = {GPU: 25}
    held = await soon(box.ask("b"))
    waiting = await box.asking("a")
    await box.until(lambda: box.states()["b"] == "draining")
    box.backend.capacity = {GPU: 100}
    yield
    held.release()
    (await soon(waiting)).release()


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("state", [waking, draining, stopped, failed, dead, short_of_memory])
async def test_reload_in_any_state(
    up: Boxes, state: Callable[[Box], AbstractAsyncContextManager[None]], after: str
) -> None:
    sleeps = {"start": "sleeping"} if state is waking else {}
    box = await up({"a": {"memory": 20} | sleeps, "b": {"memory": 10}})
    models = {name: keys if name == "b" else keys | sleeps for name, keys in AFTER[after].items()}
    async with state(box):
        reloading = asyncio.create_task(box.reload(models))
        await some_ms()
    await soon(reloading)
    assert list(box.pool.models) == list(models)
    for name in models:
        await soon(box.control.load(name))
        await box.use(name)
    await some_ms()


async def test_rebuild_does_not_revive_a_stopped_engine(up: Boxes) -> None:
    box = await up({"a": {}})
    engine = box.engine("a")
    gate = engine.change_gate = Gate()
    reloading = await box.reloading({"a": {"aliases": ["x"]}})
    await soon(gate.reached.wait())
    unloading = asyncio.create_task(box.control.unload("a", drain=True))
    await some_ms()
    await gate.open_for(reloading)
    await soon(unloading)
    assert (engine.stopped, box.replica("a").running, box.states()) == (1, None, {"a": "stopped"})
    await box.use("x")


async def test_dead_engine_is_not_rebuilt(up: Boxes) -> None:
    box = await up({"a": {}})
    box.engine("a").dead = True
    box.engine("a").change_error = EngineError("dead")
    assert await box.reload({"a": {"aliases": ["x"]}}) == ['a: changed live (aliases [] -> ["x"])']
    assert box.pool.supervisor.handle_death(box.replica("a"))
    await box.until(lambda: box.states() == {"a": "ready"})
    await box.use("x")


async def test_removed_required_model_does_not_end_the_start(
    up: Boxes,
) -> None:
    box = await up({"a": {"required": True}, "b": {}}, started=False)
    gate = box.backend.gate("a", error=StartupError("no"))
    starting = await box.starting(gate)
    reloading = await box.reloading({"b": {}})
    await gate.open_for(reloading)
    await soon(starting)
    assert box.states() == {"b": "ready"}


async def test_stopping_server_starts_nothing_for_a_reload(up: Boxes) -> None:
    box = await up({"a": {"memory": 60}})
    held = await soon(box.ask("a"))
    reloading = await box.reloading({"a": {"memory": 70}, "b": {"memory": 10, "start": "lazy"}})
    box.pool.close()
    held.release()
    await soon(reloading)
    assert box.backend.started == ["a"]


# --- random sequences


class Clients:
    """Clients that request random models until they are stopped."""

    def __init__(self, box: Box, chance: random.Random) -> None:
        self._box = box
        self._chance = chance
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.answered: set[str] = set()
        self.refused: list[tuple[str, LLMServeError]] = []

    def add(self, number: int, *names: str) -> None:
        self._tasks += [asyncio.create_task(self._ask_for(names)) for _ in range(number)]

    async def stop(self) -> None:
        self._stop.set()
        await soon(asyncio.gather(*self._tasks), 60)

    async def _ask_for(self, names: tuple[str, ...]) -> None:
        while not self._stop.is_set():
            name = self._chance.choice(names)
            try:
                lease = await self._box.ask(name)
            except LLMServeError as error:
                self.refused.append((name, error))
            else:
                self.answered.add(name)
                await asyncio.sleep(self._chance.random() * 0.003)
                lease.release()
            await asyncio.sleep(self._chance.random() * 0.002)


def shuffled(entries: Entries, chance: random.Random) -> Entries:
    """Some models removed, added, changed or renamed, in any order."""
    after = {name: entry for name, entry in entries.items() if chance.random() < 0.7}
    after |= {name: some_entry(chance) for name in "abcd" if chance.random() < 0.4}
    if after and chance.random() < 0.4:
        gone = chance.choice(list(after))
        after[chance.choice("abcd")] = after.pop(gone)
    return dict(chance.sample(list(after.items()), len(after)))


def some_entry(chance: random.Random) -> dict[str, Any]:
    return {
        "model": f"org/{chance.choice('xy')}",
        "memory": chance.choice([10, 30, 40]),
        "replicas": chance.choice([1, 1, 2]),
        "start": chance.choice(["eager", "lazy", "sleeping"]),
        "max_in_flight": chance.choice([1, 5]),
        "sampling": {"temperature": chance.choice([0.0, 1.0])},
    }


@pytest.mark.parametrize("seed", range(12))
async def test_reloads_in_any_order_lose_no_request(up: Boxes, seed: int) -> None:
    """Requests of a model that stays are never refused; those of others only while they start."""
    chance = random.Random(seed)
    steady = {"steady": {"memory": 10, "aliases": ["always"], "max_in_flight": 2}}
    box = await up(steady)
    clients = Clients(box, chance)
    clients.add(3, "steady", "always")
    clients.add(6, *"abcd")
    entries: Entries = {}
    for _ in range(8):
        entries = shuffled(entries, chance)
        lines = await soon(box.reload(entries | steady), 60)
        assert not any("continues" in line for line in lines)
        assert list(box.pool.models) == [*entries, "steady"]
        await asyncio.sleep(chance.random() * 0.01)
    await clients.stop()
    await box.until(lambda: not box.pool.supervisor._tasks)
    assert {"steady", "always"} < clients.answered
    for name, error in clients.refused:
        assert name in "abcd"
        assert isinstance(error, ModelNotFound) or error.code == "model_not_ready", error
