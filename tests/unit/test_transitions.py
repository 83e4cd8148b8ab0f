"""Models that do not fit in memory together: start, eviction, queue."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from llmserve.errors import DeadlineExceeded, EngineDead, EngineError, Overloaded, StartupError
from llmserve.lifecycle import restart_backoff
from llmserve.lifecycle.admission import Deadline
from llmserve.lifecycle.placement import HOST_MEMORY, Level, Place
from llmserve.lifecycle.replica import State
from llmserve.lifecycle.timings import TIMINGS, LifecycleTimings
from tests.fakes import (
    FAST,
    FakeBackend,
    FakeRunning,
    Gate,
    Plan,
    PoolBox,
    broken,
    cancel,
    lease_of,
    released_in_order,
    request,
    some_ms,
    soon,
    spec,
    until,
    with_code,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from llmserve.lifecycle.placement import Takes
    from llmserve.lifecycle.replica import Replica
    from llmserve.registry.spec import ModelSpec


GPU = Place(0)
SLOW = LifecycleTimings(first_restart_s=3600.0)  # no pause ends within a test


def engine(size: int) -> Mapping[Level, Takes]:
    return {Level.READY: {GPU: size}}


def sleeping(size: int, kv_cache: int = 20, asleep: int = 2) -> Mapping[Level, Takes]:
    return {
        Level.READY: {GPU: size},
        Level.KV_RELEASED: {GPU: size - kv_cache},
        Level.HOST: {GPU: asleep, HOST_MEMORY: size - kv_cache - asleep},
    }


def lazy(name: str, **more: Any) -> ModelSpec:
    return spec(name, start="lazy", **more)


class Box(PoolBox):
    """A GPU of 100 bytes; `sizes` are those of the models."""

    def __init__(
        self,
        *specs: ModelSpec,
        sizes: Mapping[str, Mapping[Level, Takes] | int],
        capacity: Takes | None = None,
        timings: LifecycleTimings = FAST,
        **plans: Plan,
    ) -> None:
        self.backend = FakeBackend(**plans)
        self.backend.capacity = {GPU: 100} if capacity is None else capacity
        for name, size in sizes.items():
            self.backend.sizes[name] = engine(size) if isinstance(size, int) else size
        for each in specs:
            can_sleep = len(self.backend.sizes[each.name]) > 1
            plan = self.backend.plans.setdefault(each.name, Plan())
            plan.running.sleeps = can_sleep
        super().__init__(specs, self.backend, timings)

    def running(self, name: str) -> FakeRunning:
        return self.backend.running(name)

    def levels(self) -> dict[str, Level]:
        return {name: entry.replicas[0].level for name, entry in self.pool.models.items()}

    def trail(self, name: str) -> list[str]:
        """The states that a model went through."""
        return [state.value for each, state, _ in self.seen if each == name]


# --- on demand


async def test_lazy_model_starts_with_its_first_request() -> None:
    gate = Gate()
    box = await Box(
        lazy("a"), sizes={"a": 60}, a=Plan(reports=((State.LOADING, ""),), gate=gate)
    ).started()
    assert (box.states(), box.backend.started) == ({"a": "stopped"}, [])
    first, second = await gate.begin(box.ask("a")), await box.asking("a")
    assert box.states() == {"a": "loading"}
    assert box.metric("requests_queued", model="a") == 2
    assert box.metric("requests_in_flight", model="a") == 0
    leases = [await gate.open_for(first), await soon(second)]
    assert {lease.running for lease in leases} == {box.running("a")}
    assert box.backend.started == ["a"]
    assert box.metric("requests_queued", model="a") == 0
    assert box.metric("requests_in_flight", model="a") == 2


async def test_lazy_model_that_cannot_start_refuses_its_queue() -> None:
    gate = Gate()
    plan = broken("OSError: no space left")
    plan.gate = gate
    box = Box(lazy("a"), sizes={"a": 60}, timings=SLOW, a=plan)
    waiting = [await box.asking("a") for _ in range(2)]
    gate.opened.set()
    for each in waiting:
        with pytest.raises(EngineDead, match="`a` could not be started") as refused:
            await soon(each)
        assert refused.value.code == "model_failed"
    assert box.replica("a").note == "OSError: no space left"
    assert box.backend.started == ["a"]


async def test_failed_lazy_model_starts_again_after_a_pause() -> None:
    timings = replace(FAST, first_restart_s=0.5)
    box = Box(lazy("a"), sizes={"a": 60}, timings=timings, a=broken())
    replica = box.replica("a")
    with pytest.raises(EngineDead):
        await soon(box.ask("a"))
    assert replica.again_at < time.monotonic() + 1
    replica.again_at = time.monotonic() + 60
    with pytest.raises(EngineDead, match="`a` could not be started"):
        await soon(box.ask("a"))
    assert box.backend.started == ["a"]
    box.backend.plans["a"].error = None
    replica.again_at = time.monotonic()
    await box.use("a")
    assert box.backend.started == ["a", "a"]
    assert replica.failures.in_a_row == 0


async def test_lazy_model_is_not_started_after_many_failures() -> None:
    box = Box(lazy("a"), sizes={"a": 60}, timings=SLOW, a=broken())
    replica = box.replica("a")
    for _ in range(restart_backoff.GIVE_UP):
        replica.again_at = min(replica.again_at, time.monotonic())
        with pytest.raises(EngineDead):
            await soon(box.ask("a"))
    assert replica.again_at == math.inf
    with pytest.raises(EngineDead):
        await soon(box.ask("a"))
    assert box.backend.started == ["a"] * restart_backoff.GIVE_UP


async def test_failed_start_frees_its_memory() -> None:
    box = Box(lazy("a"), lazy("b"), sizes={"a": 60, "b": 60}, a=broken())
    with pytest.raises(EngineDead):
        await soon(box.ask("a"))
    await box.use("b")
    assert box.states() == {"a": "failed", "b": "ready"}


async def test_full_queue_refuses_while_the_model_starts() -> None:
    gate = Gate()
    box = Box(lazy("a", max_queue=1), sizes={"a": 60}, a=Plan(gate=gate))
    waiting = await box.asking("a")
    with pytest.raises(Overloaded, match="its max_in_flight and max_queue"):
        await soon(box.ask("a"))
    (await gate.open_for(waiting)).release()


async def test_deadline_before_a_known_load_time_is_refused() -> None:
    box = Box(lazy("a"), sizes={"a": 60})
    box.replica("a").cost_s[Level.STOPPED] = 30.0
    with pytest.raises(Overloaded) as refused:
        await soon(box.ask("a", Deadline(20.0)))
    assert refused.value.code == "deadline_unreachable"
    assert refused.value.retry_after_s == 30
    lease = await soon(box.ask("a", Deadline(40.0)))
    assert lease.replica is box.replica("a")


async def test_short_deadline_waits_for_an_unknown_load_time() -> None:
    """No other request would start the model, so its load time would stay unknown."""
    box = Box(lazy("a"), sizes={"a": 60})
    lease = await soon(box.ask("a", Deadline(2.0)))
    assert lease.replica.state is State.READY


async def test_deadline_during_a_start_ends_its_request_only() -> None:
    gate = Gate()
    box = Box(lazy("a"), sizes={"a": 60}, a=Plan(gate=gate))
    patient = await box.asking("a")
    with pytest.raises(DeadlineExceeded, match=r"longer than its 0\.01 s"):
        await soon(box.ask("a", Deadline(0.01)))
    assert box.metric("requests_queued", model="a") == 1
    (await gate.open_for(patient)).release()


# --- eviction


async def test_evicted_model_starts_with_its_next_request() -> None:
    box = Box(lazy("a"), lazy("b"), sizes={"a": 60, "b": 60})
    await box.use("a")
    assert box.states() == {"a": "ready", "b": "stopped"}
    await box.use("b")
    assert box.states() == {"a": "stopped", "b": "ready"}
    assert box.running("a").stopped == 1
    evicted = [
        box.metric("evictions_total", model=name, replica="0", level="stopped") for name in "ab"
    ]
    assert evicted == [1, None]
    await box.use("a")
    assert box.states() == {"a": "ready", "b": "stopped"}
    assert box.backend.started == ["a", "b", "a"]
    assert [box.replica(name).evictions for name in "ab"] == [1, 1]


@pytest.mark.parametrize(
    ("sizes", "states"),
    [
        pytest.param({"a": 60, "b": 40}, ["ready", "ready"], id="both fit"),
        pytest.param({"a": 60, "b": 60}, ["stopped", "ready"], id="one fits"),
        pytest.param({"a": 50, "b": 50, "c": 90}, ["stopped", "stopped", "ready"], id="all others"),
        pytest.param(
            {name: {Level.READY: {HOST_MEMORY: 60}} for name in "ab"},
            ["stopped", "ready"],
            id="host memory",
        ),
    ],
)
async def test_idle_models_are_evicted_as_far_as_necessary(
    sizes: dict[str, Any], states: list[str]
) -> None:
    capacity = {GPU: 100, HOST_MEMORY: 100}
    box = Box(*map(lazy, sizes), sizes=sizes, capacity=capacity)
    await box.use(*sizes)
    assert list(box.states().values()) == states
    assert [box.running(name).stopped for name in sizes] == [
        int(state == "stopped") for state in states
    ]


async def test_busy_model_is_drained_before_its_eviction() -> None:
    box = Box(lazy("a"), lazy("b"), sizes={"a": 60, "b": 60})
    held = await soon(box.ask("a"))
    waiting = await box.asking("b")
    await box.until(lambda: box.states()["a"] == "draining")
    await some_ms()
    assert box.backend.started == ["a"]
    assert box.running("a").stopped == 0
    held.release()
    (await soon(waiting)).release()
    assert box.states() == {"a": "stopped", "b": "ready"}


async def test_requests_for_an_evicted_model_keep_their_order() -> None:
    box = Box(lazy("a", max_in_flight=1), lazy("b"), sizes={"a": 60, "b": 60})
    held = await soon(box.ask("a"))
    early = Deadline()
    queued = [await box.asking("a") for _ in range(2)]
    other = await box.asking("b")
    await box.until(lambda: box.states()["a"] == "draining")
    queued += [await box.asking("a") for _ in range(2)]
    queued.insert(0, await box.asking("a", early))  # a retried request, which arrived before
    held.release()
    (await soon(other)).release()
    await released_in_order(queued)
    assert box.backend.started == ["a", "b", "a"]


async def test_idle_model_is_evicted_before_a_busy_one() -> None:
    box = Box(lazy("a"), lazy("b"), lazy("c"), sizes={"a": 50, "b": 50, "c": 50})
    busy = await soon(box.ask("a"))
    await box.use("b", "c")
    assert box.states() == {"a": "ready", "b": "stopped", "c": "ready"}
    busy.release()


async def test_model_that_does_not_fit_beside_a_pinned_one_fails() -> None:
    box = await Box(
        spec("p", pinned=True),
        lazy("a"),
        lazy("b"),
        lazy("large"),
        sizes={"p": 40, "a": 60, "b": 60, "large": 61},
    ).started()
    await box.use("a", "b")
    assert box.states() == {"p": "ready", "a": "stopped", "b": "ready", "large": "stopped"}
    with pytest.raises(EngineDead, match="`large` could not be started"):
        await soon(box.ask("large"))
    assert "pinned models and its own other replicas leave 0.0 GiB of GPU 0" in (
        box.replica("large").note
    )
    assert box.states() == {"p": "ready", "a": "stopped", "b": "ready", "large": "failed"}
    assert "large" not in box.backend.started


async def test_sleeper_without_room_to_wake_is_stopped() -> None:
    box = Box(
        lazy("a"),
        lazy("p", pinned=True),
        sizes={"a": sleeping(60), "p": 60},
    )
    await box.use("a", "p")
    assert box.levels() == {"a": Level.KV_RELEASED, "p": Level.READY}
    with pytest.raises(EngineDead, match="`a` could not be started"):
        await soon(box.ask("a"))
    assert box.states() == {"a": "failed", "p": "ready"}
    assert (box.running("a").stopped, box.levels()["a"]) == (1, Level.STOPPED)


async def test_models_on_different_gpus_start_together() -> None:
    gate = Gate()
    sizes = {"a": {Level.READY: {GPU: 60}}, "b": {Level.READY: {Place(1): 60}}}
    box = Box(
        lazy("a"), lazy("b"), sizes=sizes, capacity={GPU: 100, Place(1): 100}, a=Plan(gate=gate)
    )
    waiting = await gate.begin(box.ask("a"))
    await box.use("b")
    (await gate.open_for(waiting)).release()


async def test_starting_model_keeps_its_reservation() -> None:
    gate = Gate()
    box = Box(lazy("a"), lazy("b"), sizes={"a": 60, "b": 60}, a=Plan(gate=gate))
    first = await gate.begin(box.ask("a"))
    second = asyncio.create_task(box.ask("b"))
    await some_ms()
    assert box.backend.started == ["a"]
    assert (box.states()["b"], box.replica("b").note) == ("waiting", "waiting for memory")
    (await gate.open_for(first)).release()
    (await soon(second)).release()
    assert box.backend.started == ["a", "b"]


async def test_waking_model_keeps_its_reservation() -> None:
    gate = Gate()
    box = Box(lazy("a"), lazy("b"), sizes={"a": sleeping(60), "b": 80})
    await box.use("a", "b")
    running = box.running("a")
    running.wake = gate.wait  # type: ignore[method-assign]
    first = await gate.begin(box.ask("a"))
    assert box.states() == {"a": "waking", "b": "stopped"}
    second = asyncio.create_task(box.ask("b"))
    await some_ms()
    assert box.backend.started == ["a", "b"]
    (await gate.open_for(first)).release()
    (await soon(second)).release()
    assert box.backend.started == ["a", "b", "b"]


async def test_evicted_eager_model_queues_requests() -> None:
    box = await Box(spec("a"), lazy("b"), sizes={"a": 60, "b": 60}).started()
    await box.use("b", "a")
    assert box.backend.started == ["a", "b", "a"]


@pytest.mark.parametrize("first", ["a", "b"])
async def test_models_requested_together_all_become_ready(first: str) -> None:
    box = Box(*(lazy(name) for name in "abcd"), sizes=dict.fromkeys("abcd", 60))
    names = [first, *(name for name in "abcd" if name != first)]

    async def use(name: str) -> None:
        (await box.ask(name)).release()

    await soon(asyncio.gather(*(use(name) for name in names * 3)))
    assert sorted(set(box.backend.started)) == list("abcd")
    assert sum(state == "ready" for state in box.states().values()) == 1


async def test_replicas_of_one_model_do_not_evict_each_other() -> None:
    box = Box(lazy("a", replicas=2), sizes={"a": 60})
    (await soon(box.ask("a"))).release()
    await some_ms()
    assert [replica.evictions for replica in box.pool.replicas] == [0, 0]
    assert box.backend.started == ["a/0"]


async def test_replica_without_room_does_not_block_other_models() -> None:
    box = Box(lazy("a", replicas=2), lazy("b"), sizes={"a": 60, "b": 60})
    (await soon(box.ask("a"))).release()
    await some_ms()
    (await soon(box.ask("b"), 60)).release()
    assert box.states()["b"] == "ready"


def test_fits_counts_reserved_memory() -> None:
    box = Box(lazy("a"), lazy("b"), lazy("c"), sizes={"a": 60, "b": 40, "c": 41})
    fits = box.pool.life.fits
    a, b, c = box.pool.replicas
    assert fits([a, b])
    assert not fits([a, c])
    box.pool.life._reserved[a] = Level.READY
    assert (fits([b]), fits([c])) == (True, False)


# --- the order of evictions


async def test_lower_priority_is_evicted_before_longer_idle() -> None:
    box = Box(lazy("a", priority=1), lazy("b"), lazy("c"), sizes={"a": 50, "b": 50, "c": 50})
    await box.use("a", "b")
    box.replica("a").used -= 1000
    await box.use("c")
    assert box.states() == {"a": "ready", "b": "stopped", "c": "ready"}


@pytest.mark.parametrize(
    ("idle_s", "cost_s", "leaves"),
    [
        pytest.param((20, 10), (1.0, 1.0), "a", id="longest idle"),
        pytest.param((10, 20), (1.0, 1.0), "b", id="longest idle, the other"),
        pytest.param((20, 10), (4.0, 1.0), "b", id="soonest back"),
        pytest.param((20, 10), (1.9, 1.0), "a", id="idle for longer, by what it costs"),
    ],
)
async def test_idle_time_is_weighed_by_load_time(
    idle_s: tuple[int, int], cost_s: tuple[float, float], leaves: str
) -> None:
    box = Box(lazy("a"), lazy("b"), lazy("c"), sizes={"a": 50, "b": 50, "c": 50})
    await box.use("a", "b")
    for name, idle, cost in zip("ab", idle_s, cost_s, strict=True):
        replica = box.replica(name)
        replica.used, replica.cost_s = time.monotonic() - idle, {Level.STOPPED: cost}
    await box.use("c")
    assert {name for name, state in box.states().items() if state == "stopped"} == {leaves}


@pytest.mark.parametrize("busy", [False, True])
async def test_model_stays_for_its_minimum_residency_time(
    busy: bool,
) -> None:
    box = Box(lazy("a"), lazy("b"), sizes={"a": 60, "b": 60}, timings=TIMINGS)
    a = box.replica("a")
    held = await soon(box.ask("a"))
    if not busy:
        held.release()
    a.cost_s = {Level.STOPPED: 4.0}
    enough_s = 5 * 4.0 if busy else 4.0
    a.since = time.monotonic() - enough_s + 1
    waiting = await box.asking("b")
    await box.until(lambda: box.states()["b"] == "waiting")
    await some_ms()
    assert box.states() == {"a": "ready", "b": "waiting"}
    a.since -= 1
    box.pool.life.check_memory()
    await box.until(lambda: box.states()["a"] != "ready")
    held.release()
    (await soon(waiting)).release()


@pytest.mark.parametrize(
    ("busy", "cost_s", "stays_s"),
    [
        (True, 0.1, 2.0),  # the shortest turn
        (True, 1.0, 5.0),
        (True, 100.0, 60.0),  # the longest
        (False, 0.0, 0.0),
        (False, 1.0, 1.0),
        (False, 100.0, 60.0),
    ],
)
def test_minimum_residency_time(busy: bool, cost_s: float, stays_s: float) -> None:
    box = Box(lazy("a"), sizes={"a": 60}, timings=TIMINGS)
    replica, evictable_in_s = box.replica("a"), box.pool.life._evictable_in_s
    replica.state = State.READY
    replica.cost_s = {Level.STOPPED: cost_s}
    if busy:
        replica.load.add(0)
    replica.since = time.monotonic() - stays_s
    assert evictable_in_s(replica, busy=True) == 0.0
    assert evictable_in_s(replica, busy=False) == (math.inf if busy else 0.0)
    replica.since += 0.5
    assert evictable_in_s(replica, busy=True) == pytest.approx(0.5, abs=0.01)


# --- sleepers


@pytest.mark.parametrize(
    ("wanted", "level", "gives"),
    [
        (60, Level.KV_RELEASED, [Level.KV_RELEASED]),
        (61, Level.HOST, [Level.HOST]),
        (98, Level.HOST, [Level.HOST]),
        (99, Level.STOPPED, []),
    ],
)
async def test_sleeper_is_lowered_only_as_far_as_necessary(
    wanted: int, level: Level, gives: list[Level]
) -> None:
    box = Box(lazy("a"), lazy("b"), sizes={"a": sleeping(60), "b": wanted})
    await box.use("a", "b")
    assert box.levels() == {"a": level, "b": Level.READY}
    assert box.states() == {"a": "sleeping" if level else "stopped", "b": "ready"}
    assert box.running("a").slept == gives
    assert box.running("a").stopped == (0 if level else 1)


async def test_sleeper_is_lowered_further_for_the_next_model() -> None:
    sizes = {"a": sleeping(60), "b": engine(60), "c": engine(90), "d": engine(100)}
    box = Box(*(lazy(name) for name in sizes), sizes=sizes)
    await box.use("a")
    for name, level in (("b", Level.KV_RELEASED), ("c", Level.HOST), ("d", Level.STOPPED)):
        await box.use(name)
        assert box.levels()["a"] is level
    assert box.running("a").slept == [Level.KV_RELEASED, Level.HOST]


async def test_sleeper_wakes_with_the_next_request() -> None:
    box = Box(lazy("a"), lazy("b"), sizes={"a": sleeping(60), "b": sleeping(80)})
    await box.use("a", "b", "a")
    assert box.levels() == {"a": Level.READY, "b": Level.HOST}
    assert box.running("a").slept == [Level.HOST, Level.READY]
    assert box.backend.started == ["a", "b"]
    assert box.trail("a") == ["ready", "draining", "sleeping", "waking", "ready"]
    for level in ("stopped", "host"):
        assert box.metric("model_ready_seconds", model="a", replica="0", level=level) is not None


async def test_the_first_sleep_is_prepared_while_the_engine_serves() -> None:
    box = Box(lazy("a"), lazy("b"), lazy("c"), sizes={"a": sleeping(60), "b": 60, "c": 40})
    await box.use("a", "b", "a", "c")
    prepared = [box.running(name).prepared for name in "abc"]
    assert prepared == [1, 0, 0]


@pytest.mark.parametrize(
    "fault", [{"wake_error": EngineError("out of memory")}, {"dead": True}], ids=["error", "dead"]
)
async def test_sleeper_that_cannot_wake_is_started(fault: dict[str, Any]) -> None:
    box = Box(lazy("a"), lazy("b"), sizes={"a": sleeping(60), "b": 80})
    await box.use("a", "b")
    vars(box.running("a")).update(fault)
    await box.use("a")
    assert box.states()["a"] == "ready"
    assert box.backend.started == ["a", "b", "a"]
    assert (box.running("a").slept, box.running("a").stopped) == ([Level.HOST], 1)


async def test_sleeper_whose_memory_is_taken_fails() -> None:
    """It is stopped: it can neither wake nor start."""
    box = Box(lazy("a"), lazy("b"), sizes={"a": sleeping(60), "b": 80})
    await box.use("a", "b")
    box.backend.free_error = StartupError("GPU 0: pid 7 has it")
    box.backend.plans["a"].error = box.backend.free_error
    with pytest.raises(EngineDead, match="`a` could not be started"):
        await soon(box.ask("a"))
    assert box.running("a").stopped == 1
    assert (box.levels()["a"], box.replica("a").note) == (Level.STOPPED, "GPU 0: pid 7 has it")


async def test_engine_that_does_not_sleep_is_stopped() -> None:
    box = Box(lazy("a"), lazy("b"), sizes={"a": sleeping(60), "b": 80})
    await box.use("a")
    box.running("a").sleep_error = EngineError("no")
    await box.use("b")
    assert box.states() == {"a": "stopped", "b": "ready"}
    assert box.running("a").stopped == 1
    await box.use("a")
    assert box.backend.started == ["a", "b", "a"]


async def test_dead_sleeper_is_stopped_and_starts_on_demand() -> None:
    box = Box(lazy("a"), lazy("b"), sizes={"a": sleeping(60), "b": 80})
    await box.use("a", "b")
    async with box.watched():
        box.running("a").dead = True
        await box.until(lambda: box.states()["a"] == "stopped")
        await some_ms()
    assert box.levels()["a"] is Level.STOPPED
    assert box.running("a").stopped == 1
    assert box.metric("engine_deaths_total", model="a", replica="0") == 1
    await box.use("a")
    assert box.backend.started == ["a", "b", "a"]


@pytest.mark.parametrize("asked", [False, True])
async def test_queued_sleeper_can_be_evicted(asked: bool) -> None:
    """`large` was asked for first, and needs the weights of `asleep` to go too."""
    box = Box(
        lazy("asleep"),
        lazy("busy"),
        lazy("large"),
        sizes={"asleep": sleeping(60), "busy": 60, "large": 90},
    )
    await box.use("asleep")
    held = await soon(box.ask("busy"))
    assert box.levels()["asleep"] is Level.KV_RELEASED
    busy = box.replica("busy")
    busy.since = time.monotonic() + 60  # it has its turn still
    large = await box.asking("large")
    await box.until(lambda: box.states()["large"] == "waiting")
    waking = [await box.asking("asleep")] if asked else []
    await some_ms()
    busy.since = time.monotonic() - 60
    held.release()
    for each in (large, *waking):
        (await soon(each, 60)).release()


# --- the start


async def test_sleepers_start_first_and_are_lowered_for_others() -> None:
    box = Box(
        spec("a"),
        spec("b", start="sleeping"),
        spec("c", start="sleeping"),
        sizes={"a": 90, "b": sleeping(80), "c": sleeping(90)},
    )
    await soon(box.pool.start())
    assert box.backend.started == ["b", "c", "a"]
    assert box.levels() == {"a": Level.READY, "b": Level.HOST, "c": Level.HOST}
    assert box.running("b").slept == [Level.KV_RELEASED, Level.HOST]
    await box.use("b")
    assert box.backend.started == ["b", "c", "a"]


async def test_sleeper_keeps_its_weights_on_the_gpu_without_need() -> None:
    box = await Box(
        spec("a"), spec("b", start="sleeping"), sizes={"a": sleeping(60), "b": sleeping(60)}
    ).started()
    assert box.levels() == {"a": Level.READY, "b": Level.KV_RELEASED}
    assert box.backend.expected == []
    await box.use("b")
    assert box.levels() == {"a": Level.KV_RELEASED, "b": Level.READY}
    # Memory that the other frees passes directly to it.
    placement = box.replica("b").placement
    assert box.backend.expected == [(placement, "waits"), (placement, "ready")]


async def test_sleeping_start_without_sleep_mode_ends_stopped() -> None:
    """So that it is known to start."""
    box = await Box(spec("a", start="sleeping"), sizes={"a": 60}).started()
    assert (box.states(), box.backend.started) == ({"a": "stopped"}, ["a"])
    await box.use("a")
    assert box.backend.started == ["a", "a"]


async def test_sleeper_without_host_memory_sleeps_on_disk() -> None:
    far = {Level.READY: {GPU: 60}, Level.KV_RELEASED: {GPU: 40}, Level.DISK: {GPU: 2}}
    box = await Box(spec("a", start="sleeping"), spec("b"), sizes={"a": far, "b": 90}).started()
    assert box.levels() == {"a": Level.DISK, "b": Level.READY}
    assert box.running("a").slept == [Level.KV_RELEASED, Level.DISK]


async def test_fits_counts_memory_of_sleepers_as_free() -> None:
    sizes: dict[str, Any] = {"a": sleeping(60), "b": 30, "c": 40}
    box = await Box(spec("a", start="sleeping"), spec("b"), lazy("c"), sizes=sizes).started()
    assert box.levels()["a"] is Level.KV_RELEASED
    assert box.pool.life.fits([box.replica("c")])
    await box.use("a")
    assert not box.pool.life.fits([box.replica("c")])


# --- idle ones


async def test_an_idle_model_sleeps_and_then_stops() -> None:
    idle = {"sleep_after": 0.02, "stop_after": 0.06}
    box = await Box(spec("a", idle=idle), spec("b"), sizes={"a": sleeping(60), "b": 40}).started()
    async with box.watched():
        await box.until(lambda: box.states()["a"] == "sleeping")
        assert box.levels()["a"] is Level.HOST
        assert box.replica("a").idle_s >= 0.02
        await box.until(lambda: box.states()["a"] == "stopped")
        assert box.replica("a").idle_s >= 0.06
    assert box.states()["b"] == "ready"
    assert (box.running("a").slept, box.running("a").stopped) == ([Level.HOST], 1)


async def test_idle_time_begins_after_the_last_request() -> None:
    box = await Box(spec("a", idle={"stop_after": 0.02}), sizes={"a": 60}).started()
    async with box.watched():
        lease = await soon(box.ask("a"))
        await asyncio.sleep(0.04)
        assert box.states() == {"a": "ready"}
        ended = time.monotonic()
        lease.release()
        await box.until(lambda: box.states() == {"a": "stopped"})
        assert time.monotonic() - ended >= 0.02


@pytest.mark.parametrize(
    ("holds", "state", "slept"),
    [
        pytest.param({}, "stopped", [], id="no sleep mode"),
        pytest.param({Level.DISK: {GPU: 2}}, "sleeping", [Level.DISK], id="no host memory"),
    ],
)
async def test_idle_model_that_cannot_offload_is_lowered_further(
    holds: dict[Level, Takes], state: str, slept: list[Level]
) -> None:
    box = await Box(
        spec("a", idle={"sleep_after": 0.01}), sizes={"a": {Level.READY: {GPU: 60}} | holds}
    ).started()
    async with box.watched():
        await box.until(lambda: box.states() == {"a": state})
        assert box.running("a").slept == slept
        await box.use("a")
        await box.until(lambda: box.states() == {"a": state})
    assert box.backend.started == ["a"] * (1 if slept else 2)


# --- deaths


async def test_queue_waits_for_a_restarted_engine() -> None:
    box = await Box(spec("a", max_in_flight=1), sizes={"a": 60}).started()
    async with box.watched():
        held = await soon(box.ask("a"))
        queued = [await box.asking("a") for _ in range(2)]
        box.running("a").dead = True
        held.release()
        for each in queued:
            (await soon(each)).release()
    assert box.backend.started == ["a", "a"]
    assert box.metric("engine_deaths_total", model="a", replica="0") == 1


async def test_queue_of_an_engine_that_stays_dead_is_refused() -> None:
    box = await Box(spec("a", max_in_flight=1), sizes={"a": 60}).started()
    box.backend.plans["a"].error = StartupError("no memory left")
    async with box.watched():
        held = await soon(box.ask("a"))
        queued = [await box.asking("a") for _ in range(2)]
        box.running("a").dead = True
        held.release()
        for each in queued:
            with pytest.raises(EngineDead, match="died 5 times and is not started again"):
                await soon(each)


async def test_retried_request_waits_for_the_restart() -> None:
    gate = Gate()
    box = await Box(spec("a"), sizes={"a": 60}).started()
    box.backend.plans["a"].gate = gate
    box.running("a").dead = True
    lost = request("a")
    with pytest.raises(Overloaded, match="is waiting", check=with_code("model_not_ready")):
        box.pool.lease(lost)
    waiting = asyncio.create_task(lease_of(box.queued(lost.retried())))
    (await gate.open_for(waiting)).release()
    assert box.backend.started == ["a", "a"]


async def test_death_noticed_twice_is_counted_once() -> None:
    box = await Box(spec("a"), sizes={"a": 60}).started()
    box.running("a").dead = True
    replica = box.replica("a")
    for _ in range(3):  # a request and the monitor, in one iteration of the loop
        box.pool.supervisor.handle_death(replica)
    assert replica.deaths.in_a_row == 1
    assert box.metric("engine_deaths_total", model="a", replica="0") == 1


async def test_dead_engine_keeps_its_reservation() -> None:
    gate = Gate()
    box = await Box(spec("a"), lazy("b"), sizes={"a": 60, "b": 60}).started()
    box.backend.plans["a"].gate = gate
    async with box.watched():
        box.running("a").dead = True
        await soon(gate.reached.wait())
        waiting = asyncio.create_task(box.ask("b"))
        await some_ms()
        assert box.backend.started == ["a", "a"]
        (await gate.open_for(waiting)).release()
    assert box.backend.started == ["a", "a", "b"]


async def test_engine_that_dies_while_it_drains_is_stopped() -> None:
    box = Box(lazy("a"), lazy("b"), sizes={"a": sleeping(60), "b": 80})
    held = await soon(box.ask("a"))
    waiting = await box.asking("b")
    await box.until(lambda: box.states()["a"] == "draining")
    box.running("a").dead = True
    held.release()
    (await soon(waiting)).release()
    assert box.levels() == {"a": Level.STOPPED, "b": Level.READY}
    assert box.running("a").slept == []


# --- the end


async def test_closed_pool_refuses_the_queue_of_a_start() -> None:
    gate = Gate()
    box = Box(lazy("a"), sizes={"a": 60}, a=Plan(reports=((State.LOADING, ""),), gate=gate))
    waiting = await gate.begin(box.ask("a"))
    box.pool.close()
    with pytest.raises(Overloaded, check=with_code("shutting_down")):
        await soon(waiting)
    await soon(box.pool.stop())
    assert gate.cancelled
    assert box.backend.killed == 1


async def test_queue_for_slots_advances_until_the_drain_ends() -> None:
    box = await Box(spec("a", max_in_flight=1), sizes={"a": 60}).started()
    held = await soon(box.ask("a"))
    first, second = await box.asking("a"), await box.asking("a")
    draining = asyncio.ensure_future(box.pool.drain(0.2))
    await asyncio.sleep(0)
    held.release()
    lease = await soon(first)
    assert not draining.done()
    with pytest.raises(Overloaded, check=with_code("shutting_down")):
        await soon(second)
    await soon(draining)
    assert isinstance(lease.cut_by, Overloaded)


async def test_closed_pool_starts_nothing() -> None:
    box = Box(lazy("a"), lazy("b"), sizes={"a": 60, "b": 60})
    held = await soon(box.ask("a"))
    waiting = await box.asking("b")
    await box.until(lambda: box.states()["a"] == "draining")
    box.pool.close()
    with pytest.raises(Overloaded, match="The server is stopping"):
        await soon(waiting)
    held.release()
    await soon(box.pool.stop())
    await some_ms()
    assert box.backend.started == ["a"]
    assert box.running("a").stopped == 1


async def test_stopped_pool_stops_sleepers() -> None:
    box = await Box(spec("a", start="sleeping"), sizes={"a": sleeping(60)}).started()
    await soon(box.pool.stop())
    assert box.running("a").stopped == 1
    assert box.states() == {"a": "stopped"}


# --- events and cancellations


async def test_each_state_of_an_eviction_is_an_event() -> None:
    box = Box(lazy("a"), lazy("b"), sizes={"a": sleeping(60), "b": 80})
    await box.use("a")
    seen: list[str] = []

    async def listen() -> None:
        async for each in box.pool.events.listen():
            seen.append(" ".join((each["model"], each["from"], each["to"])))  # noqa: PERF401  # it never ends

    listening = asyncio.create_task(listen())
    await asyncio.sleep(0)
    await box.use("b")
    await until(lambda: len(seen) >= 3)
    listening.cancel()
    assert seen[:2] == ["a ready draining", "a draining sleeping"]
    assert seen[-1].endswith(" ready")
    assert all(line.startswith("b ") for line in seen[2:])


async def test_memory_of_a_cancelled_start_is_free_again() -> None:
    gate = Gate()
    box = Box(lazy("a"), lazy("b"), sizes={"a": 60, "b": 60}, a=Plan(gate=gate))
    starting = await gate.begin(box.pool.life.make_ready(box.replica("a")))
    assert not box.pool.life.fits([box.replica("b")])
    await cancel(starting)
    assert box.pool.life.fits([box.replica("b")])


async def test_memory_of_a_cancelled_wake_is_free_once_its_engine_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until then the engine may hold all that it had begun to take."""
    capacity = {GPU: 100, HOST_MEMORY: 100}
    box = Box(lazy("a"), lazy("b"), sizes={"a": sleeping(60), "b": 60}, capacity=capacity)
    replica, life = box.replica("a"), box.pool.life
    await soon(life.make_ready(replica))
    await soon(life.lower(replica, Level.HOST))
    assert life.fits([box.replica("b")])
    gate = Gate()
    monkeypatch.setattr(box.running("a"), "wake", gate.wait)
    waking = await gate.begin(life.make_ready(replica))
    await cancel(waking)
    assert not life.fits([box.replica("b")])
    await soon(life.stop(replica))
    assert life.fits([box.replica("b")])


async def ending(
    box: Box, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> tuple[Gate, asyncio.Task[None]]:
    """Stop a ready replica as far as the end of its engine, which waits for the gate."""
    await soon(box.pool.life.make_ready(replica))
    gate = Gate()
    monkeypatch.setattr(box.running(replica.name), "stop", gate.wait)
    lowering = await gate.begin(box.pool.life.lower(replica, Level.STOPPED))
    return gate, lowering


async def test_replica_whose_sleep_is_cancelled_before_it_begins_serves_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It waits until no engine starts on its GPUs; nothing of it sleeps yet."""
    box = Box(lazy("a"), sizes={"a": sleeping(60)})
    replica, life = box.replica("a"), box.pool.life
    await soon(life.make_ready(replica))
    running, gate = replica.running, Gate()

    @asynccontextmanager
    async def moves(*_: Any) -> AsyncIterator[None]:
        await gate.wait()
        yield

    monkeypatch.setattr(box.backend.memory, "moves", moves)
    lowering = await gate.begin(life.lower(replica, Level.HOST))
    await cancel(lowering)
    assert lowering.cancelled()
    assert (replica.state, replica.running) == (State.READY, running)


async def test_engine_whose_sleep_is_cancelled_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its level is unknown."""
    box = Box(lazy("a"), sizes={"a": sleeping(60)})
    replica, life = box.replica("a"), box.pool.life
    await soon(life.make_ready(replica))
    gate = Gate()
    monkeypatch.setattr(box.running("a"), "sleep", lambda _: gate.wait())
    lowering = await gate.begin(life.lower(replica, Level.HOST))
    await cancel(lowering)
    assert (replica.state, replica.running) == (State.STOPPED, None)


async def test_an_engine_ends_before_the_next_starts_when_its_eviction_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else both would hold memory that one has reserved."""
    box = Box(lazy("a"), sizes={"a": 60})
    replica, life = box.replica("a"), box.pool.life
    gate, lowering = await ending(box, replica, monkeypatch)
    lowering.cancel()
    starting = asyncio.create_task(life.make_ready(replica))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not gate.cancelled
    assert not lowering.done()
    assert replica.running is None
    await gate.open_for(starting)
    assert lowering.cancelled()
    assert replica.state is State.READY
    states = [state for _, state, _ in box.seen]
    assert states[-3:] == [State.DRAINING, State.STOPPED, State.READY]


async def test_memory_of_an_engine_that_ends_is_reserved_though_a_start_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    box = Box(lazy("a"), lazy("b"), sizes={"a": 60, "b": 60})
    replica, life = box.replica("a"), box.pool.life
    gate, lowering = await ending(box, replica, monkeypatch)
    starting = asyncio.create_task(life.make_ready(replica))
    await asyncio.sleep(0)
    await cancel(starting)
    assert not life.fits([box.replica("b")])
    await gate.open_for(lowering)
    assert life.fits([box.replica("b")])


async def test_replica_whose_reason_ends_in_the_queue_is_not_lowered() -> None:
    """A request arrived while another transition ran."""
    box = await Box(spec("a"), sizes={"a": 60}).started()
    replica, reasons = box.replica("a"), [True]
    async with replica.transition_lock:
        lowering = asyncio.create_task(
            box.pool.life.lower(replica, Level.STOPPED, lambda: reasons[0])
        )
        await asyncio.sleep(0)
        reasons[0] = False
    await soon(lowering)
    assert replica.state is State.READY
    assert box.running("a") is replica.running


async def test_death_in_a_transition_is_left_to_its_end() -> None:
    """Else it would be counted at every look, and started again over what is under way."""
    box = await Box(spec("a"), sizes={"a": 60}).started()
    replica = box.replica("a")
    box.running("a").dead = True
    async with replica.transition_lock:
        assert not box.pool.supervisor.handle_death(replica)
        assert replica.state is State.READY
    assert box.pool.supervisor.handle_death(replica)
    assert box.metric("engine_deaths_total", model="a", replica="0") == 1
