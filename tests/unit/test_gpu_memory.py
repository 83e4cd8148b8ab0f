"""A plan carried out on GPUs whose driver is a fake."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from llmserve.checkpoint import shape
from llmserve.checkpoint.shape import UnknownShape
from llmserve.errors import PlacementError, StartupError
from llmserve.gpus import nvml, page_exchange
from llmserve.gpus.device import GIB, described
from llmserve.gpus.nvml import Holder
from llmserve.gpus.page_exchange import PAGE_BYTES, PageBroker
from llmserve.lifecycle.gpu_memory import GpuMemory, overhead_bytes
from llmserve.lifecycle.operator import ModelOperator
from llmserve.lifecycle.placement import Level, Place
from llmserve.lifecycle.pool import Pool
from llmserve.lifecycle.replica import State
from llmserve.lifecycle.timings import LifecycleTimings
from llmserve.metrics import Metrics
from llmserve.planning.measurements import Measured
from llmserve.planning.planner import Planner
from llmserve.registry.spec import Config, ModelSpec
from tests.fakes import FakeBackend, FakeRunning, Gate, soon
from tests.fakes import Plan as Start
from tests.unit.shapes import LLAMA_8B

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from llmserve.checkpoint.shape import Shape
    from llmserve.lifecycle.gpu_memory import Keep
    from llmserve.lifecycle.placement import Placement
    from llmserve.lifecycle.replica import Replica, Running
    from llmserve.planning.plan import Plan


SHORT = LifecycleTimings(release_s=0.01)


@dataclass
class Gpus:
    """How full each GPU is, and by whom."""

    used: dict[int, int] = field(default_factory=dict)
    holders: dict[int, list[Holder]] = field(default_factory=dict)


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    fake = Gpus()
    monkeypatch.setattr(nvml, "used_bytes", lambda gpu: fake.used.get(gpu.index, 0))
    monkeypatch.setattr(nvml, "holders", lambda gpu: fake.holders.get(gpu.index, []))
    return fake


@pytest.fixture
def kept(tmp_path: Path) -> Measured:
    return Measured(tmp_path)


def entry(name: str = "m", **more: Any) -> ModelSpec:
    return ModelSpec(name=name, **({"model": "8b"} | more))


def planned(kept: Measured, *specs: ModelSpec, box: str = "H100") -> Plan:
    """Models are Llamas of 8B, or, if called `odd`, of unknown shape."""
    shapes: dict[str, Shape | UnknownShape] = {
        spec.name: UnknownShape("no config.json") if spec.model == "odd" else LLAMA_8B
        for spec in specs
    }
    plan = Planner(described(box), 0.08, shapes, kept.overhead).plan(specs)
    assert not plan.problems
    return plan


def planned_memory(kept: Measured, *specs: ModelSpec, box: str = "H100", **more: Any) -> GpuMemory:
    return GpuMemory(planned(kept, *specs, box=box), kept, **more)


class Starts:
    """Starts of replicas that continue until they are ended."""

    def __init__(self, memory: GpuMemory) -> None:
        self.memory = memory
        self.running: list[str] = []
        self.keeps: dict[str, Keep] = {}
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self, *specs: ModelSpec, numbers: Sequence[int] = (0,)) -> None:
        """One after the other."""
        for spec, number in itertools.product(specs, numbers):
            name = self.memory.plan.replica(spec.name, number).name
            self._ends[name] = asyncio.Event()
            self._tasks.append(asyncio.create_task(self._start(name, spec, number)))
            await self._settle()

    async def _start(self, name: str, spec: ModelSpec, number: int) -> None:
        async with self.memory.start(spec, self.memory.place(spec, number)) as (_, keep):
            self.keeps[name] = keep
            self.running.append(name)
            try:
                await self._ends[name].wait()
            finally:
                self.running.remove(name)

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await self._settle()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @staticmethod
    async def _settle() -> None:
        for _ in range(20):
            await asyncio.sleep(0.005)  # the driver is asked in a thread


@asynccontextmanager
async def starts(kept: Measured, *specs: ModelSpec, box: str = "H100") -> AsyncIterator[Starts]:
    made = Starts(planned_memory(kept, *specs, box=box))
    try:
        yield made
    finally:
        await made.stop()


def report(reserved: float, allocated: float = 0, activations: float = 0) -> dict[str, Any]:
    """The report of a worker, in GiB."""
    more = {"weights": 0, "reserved": reserved, "allocated": allocated, "activations": activations}
    return {"seconds": {}, "bytes": {name: int(size * GIB) for name, size in more.items()}}


def files(kept: Measured) -> set[Path]:
    return set(kept.folder.iterdir())


# --- whether the GPUs are free


def test_gpus_with_room_for_the_plan_are_not_taken(gpus: Gpus, kept: Measured) -> None:
    plan = planned(kept, entry(memory="40GiB"), box="2xH100")
    (used,) = plan.replicas[0].devices
    gpus.used = {used: plan.box[used].memory - 40 * GIB, 1 - used: plan.box[used].memory}
    GpuMemory(plan, kept).raise_if_taken()


def test_holders_of_memory_are_named(gpus: Gpus, kept: Measured) -> None:
    plan = planned(kept, entry(memory="40GiB", devices=[1]), box="2xH100")
    gpus.used = {0: 70 * GIB, 1: 50 * GIB}
    gpus.holders = {
        1: [
            Holder(7, "python", 48 * GIB + GIB // 2),
            Holder(9, "of another container", None),
        ]
    }
    with pytest.raises(StartupError) as taken:
        GpuMemory(plan, kept).raise_if_taken()
    assert taken.value.exit_code == 3
    assert taken.value.message == (
        "GPU 1 (H100 80GB HBM3): the plan needs 40.0 GiB, 29.6 GiB of 79.6 GiB are free; "
        "held by pid 7 python 48.5 GiB, pid 9 of another container; "
        "end them, or reduce the memory of the models"
    )


def test_each_taken_gpu_is_named_without_known_holders(gpus: Gpus, kept: Measured) -> None:
    plan = planned(kept, entry(tensor_parallel_size=2), box="2xH100")
    gpus.used = {0: 20 * GIB, 1: 30 * GIB}
    with pytest.raises(StartupError) as taken:
        GpuMemory(plan, kept).raise_if_taken()
    first, second = taken.value.message.splitlines()
    assert first.startswith("GPU 0 ")
    assert "59.6 GiB of 79.6 GiB are free; held by processes unknown to the driver; " in first
    assert second.startswith("GPU 1 ")


def test_one_byte_too_many_is_too_many(gpus: Gpus, kept: Measured) -> None:
    plan = planned(kept, entry(memory="40GiB"))
    memory = GpuMemory(plan, kept)
    gpus.used = {0: plan.box[0].memory - 40 * GIB}
    memory.raise_if_taken()
    gpus.used[0] += 1
    with pytest.raises(StartupError):
        memory.raise_if_taken()


# --- the order of starts


async def test_start_that_is_measured_is_alone(kept: Measured) -> None:
    a, b = entry("a"), entry("b", engine={"max_num_seqs": 8})
    async with starts(kept, a, b) as each:
        await each.begin(a, b)
        assert each.running == ["a"]
        await each.end("a")
        assert each.running == ["b"]


async def test_measured_models_start_together(gpus: Gpus, kept: Measured) -> None:
    a, b = entry("a"), entry("b", engine={"max_num_seqs": 8})
    for replica in planned(kept, a, b).replicas:
        kept.keep(replica.fingerprint, 2 * GIB, {})
    async with starts(kept, a, b) as each:
        await each.begin(a, b)
        assert each.running == ["a", "b"]
        gpus.used[0] = 70 * GIB
        each.keeps["a"]([report(60)])  # its own growth is not known: others start beside it
        assert kept.overhead(each.memory.plan.replica("a", 0).fingerprint) == 2 * GIB


async def test_same_fingerprints_wait_for_the_measured_start(gpus: Gpus, kept: Measured) -> None:
    many = entry(replicas=3)
    async with starts(kept, many, box="3xH100") as each:
        await each.begin(many, numbers=range(3))
        assert each.running == ["m/0"]
        gpus.used[0] = 70 * GIB
        each.keeps["m/0"]([report(60)])
        await each.end("m/0")
        assert each.running == ["m/1", "m/2"]


async def test_fingerprint_is_measured_again_after_a_failed_start(kept: Measured) -> None:
    many = entry(replicas=3)
    async with starts(kept, many, box="3xH100") as each:
        await each.begin(many, numbers=range(3))
        await each.end("m/0")  # nothing was reported
        assert each.running == ["m/1"]


async def test_fingerprints_on_different_gpus_start_together(kept: Measured) -> None:
    a, b = entry("a", devices=[0]), entry("b", devices=[1], engine={"max_num_seqs": 8})
    async with starts(kept, a, b, box="2xH100") as each:
        await each.begin(a, b)
        assert each.running == ["a", "b"]


async def test_failed_start_releases_its_gpus(kept: Measured) -> None:
    a, b = entry("a"), entry("b", engine={"max_num_seqs": 8})
    memory = planned_memory(kept, a, b)

    async def failing() -> None:
        async with memory.start(a, memory.place(a, 0)):
            raise StartupError("no")

    with pytest.raises(StartupError):
        await failing()
    async with asyncio.timeout(60), memory.start(b, memory.place(b, 0)) as (spec, _):
        assert spec.name == "b"


async def test_start_yields_explicit_gpus_and_cache(kept: Measured) -> None:
    many = entry(replicas=2)
    memory = planned_memory(kept, many, box="2xH100")
    async with memory.start(many, memory.place(many, 1)) as (spec, _):
        replica = memory.plan.replica("m", 1)
        assert (spec.devices, spec.kv_cache) == (replica.devices, replica.kv)


async def test_unknown_shape_is_never_measured_and_starts_alone(gpus: Gpus, kept: Measured) -> None:
    odd = entry("odd", model="odd", devices=[0, 1], memory="20GiB", replicas=2)
    m = entry("m", devices=[1], memory="30GiB")
    for replica in planned(kept, odd, m, box="2xH100").replicas[-1:]:
        kept.keep(replica.fingerprint, 2 * GIB, {})
    before = files(kept)
    async with starts(kept, odd, m, box="2xH100") as each:
        await each.begin(odd, numbers=[1])
        await each.begin(m)
        assert each.running == ["odd/1"]
        gpus.used[1] = 19 * GIB
        each.keeps["odd/1"]([report(15)])
        await each.end("odd/1")
        assert each.running == ["m"]
        await each.begin(odd, numbers=[1])  # as if for the first time
        assert each.running == ["m"]
        await each.end("m")
        assert each.running == ["odd/1"]
    assert files(kept) == before


# --- what is kept


async def test_measured_overhead_is_used_by_later_plans(gpus: Gpus, kept: Measured) -> None:
    m = entry(tensor_parallel_size=2, kv_cache="20GiB")
    plan = planned(kept, m, box="2xH100")
    (replica,) = plan.replicas
    planned_gib = (replica.weights + replica.kv) / GIB
    gpus.used = {0: 2 * GIB, 1: 0}  # earlier memory is not its overhead
    memory = GpuMemory(plan, kept)
    async with memory.start(m, memory.place(m, 0)) as (_, keep):
        gpus.used = {0: int((planned_gib + 5) * GIB), 1: int((planned_gib + 4) * GIB)}
        keep([report(planned_gib + 1), report(planned_gib + 1)])
    (again,) = planned(kept, m, box="2xH100").replicas
    assert again.fingerprint == replica.fingerprint
    assert (replica.measured, again.measured) == (False, True)
    assert again.overhead == pytest.approx(4 * GIB, abs=2)  # of the fuller one of both
    assert again.kv == replica.kv


async def test_of_data_parallel_ranks_the_first_reports_alone(gpus: Gpus, kept: Measured) -> None:
    m = entry(engine={"data_parallel_size": 2}, kv_cache="20GiB")
    plan = planned(kept, m, box="2xH100")
    (replica,) = plan.replicas
    assert len(replica.devices) == 2
    size = replica.weights + replica.kv
    memory = GpuMemory(plan, kept)
    async with memory.start(m, memory.place(m, 0)) as (_, keep):
        gpus.used = {0: size + 2 * GIB, 1: size + 9 * GIB}
        keep([report(size / GIB)])
    assert kept.overhead(replica.fingerprint) == pytest.approx(2 * GIB, abs=2)


async def test_failed_start_stores_no_measurement(kept: Measured) -> None:
    m = entry()
    memory = planned_memory(kept, m)
    with contextlib.suppress(StartupError):
        async with memory.start(m, memory.place(m, 0)):
            raise StartupError("no")
    assert files(kept) == set()


@pytest.mark.parametrize(
    ("grown", "reserved", "allocated", "activations", "planned", "overhead"),
    [
        (50, 49, 40, 3, 47, 3),  # a context beside torch, and bytes reserved beyond the plan
        (50, 49, 40, 12, 47, 6),  # a full step needs more than is reserved at the end: 40 + 12
        (50, 49, 40, 9, 47, 3),  # exactly as much as is reserved
        (40, 39, 39, 0, 47, 0),  # less than was planned: the weights are smaller
        (47, 47, 47, 0, 47, 0),
    ],
)
def test_overhead_is_that_of_a_full_step_beyond_the_plan(
    grown: int, reserved: int, allocated: int, activations: int, planned: int, overhead: int
) -> None:
    worker = {"reserved": reserved, "allocated": allocated, "activations": activations}
    assert overhead_bytes(grown, worker, planned) == overhead


async def test_a_start_waits_for_the_memory_of_a_dead_engine(gpus: Gpus, kept: Measured) -> None:
    spec = entry(memory="40GiB")
    starts = Starts(planned_memory(kept, spec))
    gpus.used[0] = 60 * GIB
    await starts.begin(spec)
    assert starts.running == []
    gpus.used[0] = GIB
    async with asyncio.timeout(60):
        while not starts.running:  # the driver has no event for it
            await asyncio.sleep(0.01)


async def test_start_without_memory_names_its_holders(gpus: Gpus, kept: Measured) -> None:
    gpus.used[0] = 60 * GIB
    gpus.holders[0] = [Holder(7, "python", 59 * GIB)]
    spec = entry(memory="40GiB")
    memory = planned_memory(kept, spec, timings=SHORT)
    with pytest.raises(StartupError, match=r"m needs 40.0 GiB, 19.6 GiB .* pid 7 python 59.0 GiB"):
        async with memory.start(spec, memory.place(spec, 0)):
            pass


async def test_start_with_memory_freed_by_others_is_not_measured(
    gpus: Gpus, kept: Measured
) -> None:
    m = entry(kv_cache="20GiB")
    plan = planned(kept, m)
    gpus.used[0] = 30 * GIB
    memory = GpuMemory(plan, kept)
    async with memory.start(m, memory.place(m, 0)) as (_, keep):
        gpus.used[0] = 40 * GIB  # 40 are new, 30 of another process are free
        keep([report(40)])
    assert files(kept) == set()


# --- what may be held, and sleepers


def sleeping(*names: str, **more: Any) -> tuple[ModelSpec, ...]:
    """Of 25 GiB each, 5 of them KV cache, and on the first GPU."""
    size = {"kv_cache": "5GiB", "devices": [0]}
    return tuple(entry(name, start="sleeping", **(size | more)) for name in names)


def test_a_gpu_may_be_filled_up_to_its_headroom(kept: Measured) -> None:
    plan = planned(kept, entry(memory="40GiB"), box="2xH100")
    held = GpuMemory(plan, kept).capacity
    assert set(held) == {Place(0), Place(1)}
    assert held[Place(0)] == held[Place(1)] <= plan.box[0].memory * 0.92
    assert held[Place(0)] > plan.box[0].memory * 0.9


def test_engine_without_sleep_mode_has_one_level(kept: Measured) -> None:
    m = entry(memory="40GiB", tensor_parallel_size=2)
    memory = planned_memory(kept, m, box="2xH100")
    place = memory.place(m, 0)
    assert not place.sleeps
    assert place.holds == {Level.READY: {Place(0): 40 * GIB, Place(1): 40 * GIB}}


def test_a_sleeper_holds_less_at_each_level(kept: Measured) -> None:
    (m,) = sleeping("m")
    memory = planned_memory(kept, m, host_memory=100 * GIB)
    (replica,) = memory.plan.replicas
    place = memory.place(m, 0)
    assert place.sleeps
    assert replica.kv == 5 * GIB
    holds = place.holds
    assert [holds[level][Place(0)] for level in (Level.READY, Level.KV_RELEASED, Level.HOST)] == [
        replica.weights + replica.overhead + replica.kv,
        replica.weights + replica.overhead,
        replica.overhead,
    ]
    assert set(holds) == {Level.READY, Level.KV_RELEASED, Level.HOST}


def test_host_memory_is_assigned_in_the_order_of_the_plan(
    kept: Measured,
) -> None:
    specs = sleeping("a", "b", "c")
    plan = planned(kept, *specs)
    host = plan.replica("a", 0).host
    assert host >= plan.replica("a", 0).weights > 0

    def asleep(host_memory: int) -> list[Level]:
        memory = GpuMemory(plan, kept, host_memory=host_memory)
        return [min(memory.place(each, 0).holds) for each in specs]

    assert asleep(3 * host) == [Level.HOST] * 3
    assert asleep(2 * host) == [Level.HOST, Level.HOST, Level.DISK]
    assert asleep(host - 1) == [Level.DISK] * 3
    assert asleep(0) == [Level.DISK] * 3


async def test_sleeper_wakes_when_its_further_memory_is_free(gpus: Gpus, kept: Measured) -> None:
    (m,) = sleeping("m")
    memory = planned_memory(kept, m, host_memory=100 * GIB, timings=SHORT)
    place = memory.place(m, 0)
    (replica,) = memory.plan.replicas
    more = replica.weights + replica.kv
    gpus.used[0] = memory.plan.box[0].memory - more
    async with memory.moves(place, Level.HOST):
        pass
    gpus.used[0] += 1
    with pytest.raises(StartupError, match="m needs"):
        async with memory.moves(place, Level.HOST):
            pass
    async with memory.moves(place, Level.KV_RELEASED):  # its weights are there
        pass
    async with memory.moves(place, None):  # falling asleep takes nothing
        pass


async def test_pages_that_pass_to_a_sleeper_count_as_free(
    gpus: Gpus, kept: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(page_exchange.ADDRESS, "restored afterwards")
    between = PageBroker()
    (m,) = sleeping("m")
    plan = planned(kept, m)
    seen = replace(plan, box=(replace(plan.box[0], uuid="GPU-1"),))
    memory = GpuMemory(seen, kept, 100 * GIB, between, SHORT)
    place = memory.place(m, 0)
    (replica,) = plan.replicas
    gpus.used[0] = plan.box[0].memory - replica.weights - replica.kv + 2 * PAGE_BYTES
    with memory.expecting(place):
        page_exchange.give("GPU-1", [os.memfd_create("page")])
        with pytest.raises(StartupError, match="m needs"):
            async with memory.moves(place, Level.HOST):
                pass
        page_exchange.give("GPU-1", [os.memfd_create("page")])
        async with memory.moves(place, Level.HOST):
            pass
        gpus.used[0] = 0
        async with memory.start(m, place):
            assert between.bytes("GPU-1") == 0  # a start needs it free
    page_exchange.give("GPU-1", [os.memfd_create("page")])
    assert between.bytes("GPU-1") == 0


@pytest.mark.parametrize("measured_first", [True, False])
async def test_measured_start_excludes_sleep_and_wake(kept: Measured, measured_first: bool) -> None:
    (m,) = sleeping("m")
    other = entry("other", memory="30GiB", devices=[0])
    made = Starts(planned_memory(kept, m, other))
    moved = asyncio.Event()
    done = asyncio.Event()

    async def move() -> None:
        async with made.memory.moves(made.memory.place(m, 0), None):
            moved.set()
            await done.wait()

    if measured_first:
        await made.begin(other)
        moving = asyncio.create_task(move())
        await made._settle()
        assert (made.running, moved.is_set()) == (["other"], False)
        await made.end("other")
        assert moved.is_set()
        done.set()
    else:
        moving = asyncio.create_task(move())
        await made.begin(other)
        assert (made.running, moved.is_set()) == ([], True)
        done.set()
        await made._settle()
        assert made.running == ["other"]
    await moving
    await made.stop()


# --- another registry


def config(*specs: ModelSpec) -> Config:
    return Config(file=Path("models.yaml"), models=specs)


@pytest.fixture
def llamas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape, "read", lambda spec, hub: LLAMA_8B)


@pytest.mark.usefixtures("llamas")
def test_kept_engines_keep_gpus_and_sizes_in_a_new_plan(kept: Measured) -> None:
    a, b = entry("a", memory="30GiB"), entry("b", memory="30GiB")
    memory = planned_memory(kept, a, b, box="2xH100")
    before = memory.plan
    where = before.replica("b", 0).devices
    adopt = memory.planned(config(entry("new", kv_cache="20GiB"), b), {"b": [memory.place(b, 0)]})
    assert memory.plan is before
    adopt()
    assert memory.plan.replica("b", 0).devices == where
    assert memory.plan.replica("b", 0).kv == before.replica("b", 0).kv
    assert memory.plan.replica("new", 0).kv == 20 * GIB


@pytest.mark.usefixtures("llamas")
def test_registry_that_does_not_fit_changes_nothing(kept: Measured) -> None:
    a = entry("a", memory="30GiB")
    memory = planned_memory(kept, a)
    before = memory.plan
    with pytest.raises(PlacementError, match="large"):
        memory.planned(config(a, entry("large", memory="60GiB")), {"a": [memory.place(a, 0)]})
    assert memory.plan is before


# --- a reload that moves a model to another GPU


class FakeEngines(FakeBackend):
    """Fake engines, in the memory of GPUs that are planned."""

    def __init__(self, memory: GpuMemory) -> None:
        super().__init__()
        self.memory = self.gpus = memory
        self.devices: list[tuple[int | str, ...] | None] = []  # of each start

    async def start(
        self, spec: ModelSpec, placement: Placement, report: Callable[[State, str], None]
    ) -> Running:
        async with self.gpus.start(spec, placement) as (placed, _):
            self.devices.append(placed.devices)
            return await super().start(spec, placement, report)


class Moving:
    """A sleeper `m` that runs on GPU 0 of two, and a registry that puts it on another."""

    def __init__(self, kept: Measured) -> None:
        (spec,) = sleeping("m", kv_cache="20GiB")
        self.read = self._on(0)
        models = self.read.models
        self.memory = planned_memory(kept, *models, box="2xH100", host_memory=100 * GIB)
        self.backend = FakeEngines(self.memory)
        self.pool = Pool((spec,), self.backend, Metrics())
        self.operator = ModelOperator(self.read.server, self.pool, self.backend, lambda: self.read)

    def _on(self, gpu: int) -> Config:
        return config(*sleeping("m", kv_cache="20GiB", devices=[gpu]))

    def next_start(self, **more: Any) -> FakeRunning:
        """The next engine, which can sleep."""
        plan = self.backend.plans["m"] = Start(**more)
        plan.running.sleeps = True
        return plan.running

    async def ready(self) -> Replica:
        self.next_start()
        (replica,) = self.pool.replicas
        await soon(self.pool.life.make_ready(replica))
        return replica

    async def reload(self, gpu: int) -> dict[str, Any]:
        self.read = self._on(gpu)
        return await soon(self.operator.reload(dry_run=False))


@pytest.fixture
def moving(llamas: None, kept: Measured) -> Moving:
    return Moving(kept)


@contextlib.asynccontextmanager
async def starting_on_gpu_1(moving: Moving) -> AsyncIterator[None]:
    """While the new engine starts there, and is measured."""
    gate = Gate()
    moving.next_start(gate=gate)
    reloading = await gate.begin(moving.reload(1))
    try:
        yield
    finally:
        await gate.open_for(reloading)


async def test_moved_model_s_old_engine_sleeps_and_wakes_in_place(
    moving: Moving, gpus: Gpus
) -> None:
    old = await moving.ready()
    engine = moving.backend.running("m")
    async with starting_on_gpu_1(moving):
        assert old.holds[Level.READY].keys() == {Place(0)}
        await soon(moving.pool.life.lower(old, Level.HOST), within_s=5)
        gpus.used[1] = moving.memory.plan.box[1].memory  # by the engine that starts
        await soon(moving.pool.life.make_ready(old), within_s=5)
    assert engine.slept == [Level.HOST, Level.READY]
    assert moving.backend.devices == [(0,), (1,)]


async def test_moved_model_s_old_engine_restarts_in_place(moving: Moving) -> None:
    old = await moving.ready()
    moving.next_start(error=StartupError("no memory left"))
    report = await moving.reload(1)
    assert "the old engine continues" in report["lines"][-1]
    await soon(moving.pool.life.lower(old, Level.STOPPED))
    moving.next_start()
    await soon(moving.pool.life.make_ready(old))
    assert old.state is State.READY
    assert moving.backend.devices == [(0,), (1,), (0,)]


async def test_registry_set_back_plans_around_the_old_engine(moving: Moving) -> None:
    await moving.ready()
    moving.next_start(error=StartupError("no memory left"))
    await moving.reload(1)
    await moving.reload(0)
    assert moving.memory.plan.replica("m", 0).devices == (0,)
