from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from llmserve.errors import EngineDead, ModelNotFound, Overloaded, StartupError
from llmserve.lifecycle import restart_backoff
from llmserve.lifecycle.lease import Lease
from llmserve.lifecycle.placement import Level
from llmserve.lifecycle.replica import Replica, State
from llmserve.lifecycle.timings import TIMINGS, LifecycleTimings
from tests.fakes import (
    EMBED,
    FAST,
    FakeBackend,
    Gate,
    Plan,
    PoolBox,
    broken,
    lease_of,
    request,
    soon,
    spec,
    until,
    with_code,
)

if TYPE_CHECKING:
    from llmserve.registry.spec import ModelSpec


class Box(PoolBox):
    """A pool of `chat`, `embed` and `draft` with a scripted backend."""

    def __init__(
        self,
        *specs: ModelSpec,
        required: bool = False,
        max_in_flight: int = 2,
        max_queue: int = 0,
        timings: LifecycleTimings = TIMINGS,
        **plans: Plan,
    ) -> None:
        limits = {"max_in_flight": max_in_flight, "max_queue": max_queue}
        specs = specs or (
            spec("chat", aliases=["gpt-4o"], required=required, **limits),
            spec("embed"),
            spec("draft", hidden=True),
        )
        self.backend = FakeBackend(**plans)
        super().__init__(specs, self.backend, timings)

    def lease(self, name: str, task: asyncio.Future[None] | None = None, **body: Any) -> Lease:
        lease = self.pool.lease(request(name, task=task, **body))
        assert isinstance(lease, Lease)
        return lease

    def shown_states(self) -> dict[str, str]:
        """The states that the metrics show; of one of several replicas by `MODEL/NUMBER`."""
        samples = [s for family in self.metrics.state.collect() for s in family.samples]
        shown = [s.labels for s in samples if s.value == 1]
        several = {each["model"] for each in shown if each["replica"] != "0"}
        return {
            each["model"] + f"/{each['replica']}" * (each["model"] in several): each["state"]
            for each in shown
        }

    def in_flight(self, model: str) -> float | None:
        return self.metric("requests_in_flight", model=model)


# --- starting


async def test_all_models_start_at_the_same_time() -> None:
    gates = {name: Gate() for name in ("chat", "embed", "draft")}
    waiting: dict[str, Any] = {name: Plan(gate=gate) for name, gate in gates.items()}
    box = Box(**waiting)
    starting = await box.starting(*gates.values())
    assert not starting.done()
    for gate in gates.values():
        gate.opened.set()
    await soon(starting)
    assert box.states() == {"chat": "ready", "embed": "ready", "draft": "ready"}


async def test_a_model_serves_while_another_still_starts() -> None:
    gate = Gate()
    box = Box(embed=Plan(gate=gate))
    starting = asyncio.ensure_future(box.pool.start())
    await box.until(lambda: box.states()["chat"] == "ready")
    assert box.lease("chat").running is box.backend.running("chat")
    await gate.open_for(starting)


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (StartupError("OSError: no space left"), "OSError: no space left"),
        (RuntimeError("boom"), "RuntimeError: boom"),  # unforeseen
    ],
)
async def test_a_failed_start_does_not_stop_the_others(error: Exception, note: str) -> None:
    box = await Box(embed=Plan(error=error)).started()
    assert box.states() == {"chat": "ready", "embed": "failed", "draft": "ready"}
    assert ("embed", State.FAILED, note) in box.seen
    assert [model.name for model in box.pool.ready()] == ["chat", "draft"]


async def test_required_model_that_fails_ends_the_start() -> None:
    gate = Gate()
    box = Box(required=True, chat=broken("ValueError: no KV cache"), embed=Plan(gate=gate))
    with pytest.raises(StartupError) as ended:
        await soon(box.pool.start())
    assert ended.value.message == "chat is required and failed: ValueError: no KV cache"
    assert ended.value.exit_code == 3
    await soon(gate.left.wait())
    assert gate.cancelled


async def test_start_without_a_ready_model_fails() -> None:
    box = Box(chat=broken(), embed=broken(), draft=broken())
    with pytest.raises(StartupError, match="no model could be started"):
        await box.pool.start()


async def test_cancelled_start_cancels_every_model() -> None:
    gates = [Gate(), Gate()]
    box = Box(chat=Plan(gate=gates[0]), embed=Plan(gate=gates[1]))
    starting = await box.starting(*gates)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    for gate in gates:
        await soon(gate.left.wait())
        assert gate.cancelled


async def test_progress_of_a_start_is_reported() -> None:
    reports = (
        (State.DOWNLOADING, ""),
        (State.DOWNLOADING, "0.10 of 0.27 GiB"),
        (State.LOADING, ""),
        (State.WARMING, ""),
    )
    box = await Box(chat=Plan(reports=reports)).started()
    seen = [(state, note) for name, state, note in box.seen if name == "chat"]
    assert seen == [*reports, (State.READY, "")]
    assert box.pool.replicas[0].seconds > 0


# --- leases


@pytest.mark.parametrize("state", [State.DOWNLOADING, State.LOADING, State.WARMING])
async def test_starting_model_refuses_with_retry_after(state: State) -> None:
    gate = Gate()
    box = Box(chat=Plan(reports=((state, ""),), gate=gate))
    starting = await box.starting(gate)
    with pytest.raises(Overloaded) as refused:
        box.lease("chat")
    assert refused.value.message == f"The model `chat` is {state}; try again."
    assert refused.value.code == "model_not_ready"
    assert refused.value.headers() == {"retry-after": "5"}
    assert box.pool.models["chat"].slots.in_flight == 0
    await gate.open_for(starting)
    box.lease("chat").release()


def test_a_model_that_was_never_started_is_not_ready() -> None:
    with pytest.raises(Overloaded, match="`chat` is waiting", check=with_code("model_not_ready")):
        Box().lease("chat")


async def test_failed_model_refuses_without_retry_after() -> None:
    box = await Box(embed=broken()).started()
    with pytest.raises(EngineDead, match="`embed` could not be started") as refused:
        box.lease("embed")
    assert refused.value.code == "model_failed"
    assert refused.value.headers() == {}


async def test_unknown_name_gets_the_known_and_the_nearest() -> None:
    box = await Box().started()
    with pytest.raises(ModelNotFound) as refused:
        box.lease("gpt-4")
    assert refused.value.message == (
        "The model `gpt-4` does not exist; did you mean `gpt-4o`? models here: chat, embed, gpt-4o."
    )


async def test_aliases_share_the_slots_of_their_model() -> None:
    box = await Box(max_in_flight=2).started()
    leases = [box.lease("chat"), box.lease("gpt-4o")]
    assert {lease.model for lease in leases} == {"chat"}
    assert box.in_flight("chat") == 2
    with pytest.raises(Overloaded, match="its max_in_flight", check=with_code("overloaded")):
        box.lease("chat")
    box.lease("embed").release()


async def test_second_release_of_a_lease_has_no_effect() -> None:
    box = await Box(max_in_flight=2).started()
    leases = [box.lease("chat") for _ in range(2)]
    for lease, left in zip((leases[0], *leases), (1, 1, 0), strict=True):
        lease.release()
        assert box.in_flight("chat") == left


# --- deaths and ends


async def test_dead_engine_restarts_and_others_serve() -> None:
    box = await Box().started()
    async with box.watched():
        box.backend.running("chat").dead = True
        await box.until(lambda: box.states()["chat"] == "waiting")
        assert box.pool.models["chat"].note == "its engine died; again in 1 s"
        with pytest.raises(Overloaded, match="The model `chat` is waiting") as refused:
            box.lease("chat")
        assert refused.value.code == "model_not_ready"
        assert refused.value.retry_after_s == 1  # the pause, and a start that took no time
        box.lease("embed").release()
        await box.until(lambda: box.states()["chat"] == "ready")
    box.lease("chat").release()
    assert box.backend.started.count("chat") == 2
    assert box.backend.running("chat").stopped
    assert box.metric("engine_deaths_total", model="chat", replica="0") == 1


async def test_engine_is_not_restarted_after_many_deaths() -> None:
    box = await Box(timings=FAST).started()
    async with box.watched():
        for _ in range(1, restart_backoff.GIVE_UP):
            box.backend.running("chat").dead = True
            await box.until(lambda: box.states()["chat"] == "waiting")
            await box.until(lambda: box.states()["chat"] == "ready")
        box.backend.running("chat").dead = True
        await box.until(lambda: box.states()["chat"] == "failed")
    assert box.pool.models["chat"].note == "its engine died; 5 times, not started again"
    with pytest.raises(EngineDead, match="The engine of `chat` died 5 times") as refused:
        box.lease("chat")
    assert refused.value.code == "engine_dead"
    assert box.backend.started.count("chat") == restart_backoff.GIVE_UP
    box.lease("embed").release()


async def test_a_start_that_fails_after_a_death_counts_as_one() -> None:
    box = await Box(timings=FAST).started()
    box.backend.plans["chat"].error = StartupError("no memory left")
    async with box.watched():
        box.backend.running("chat").dead = True
        await box.until(lambda: "5 times" in box.pool.models["chat"].note)
    assert box.pool.models["chat"].note == "no memory left; 5 times, not started again"
    assert box.backend.started.count("chat") == restart_backoff.GIVE_UP


async def test_hung_engine_is_killed_and_restarted() -> None:
    box = await Box(timings=replace(FAST, hang_check_s=0.01, hang_s=0.02)).started()
    async with box.watched():
        await asyncio.sleep(0.1)
        assert box.backend.started.count("chat") == 1  # those that answer are left alone
        box.backend.running("chat").hangs = True
        await box.until(lambda: box.backend.started.count("chat") == 2)
        await box.until(lambda: set(box.states().values()) == {"ready"})


async def test_stopped_pool_cancels_a_restart() -> None:
    box = await Box(timings=replace(FAST, first_restart_s=0.02)).started()
    async with box.watched():
        box.backend.running("chat").dead = True
        await box.until(lambda: box.states()["chat"] == "waiting")
    await soon(box.pool.stop())
    await asyncio.sleep(0.04)
    assert box.backend.started.count("chat") == 1


async def test_closed_pool_refuses_requests_and_completes_others() -> None:
    box = await Box().started()
    lease = box.lease("chat")
    box.pool.close()
    with pytest.raises(Overloaded) as refused:
        box.lease("embed")
    assert refused.value.code == "shutting_down"
    assert "retry-after" in refused.value.headers()
    assert box.in_flight("chat") == 1
    lease.release()
    assert box.in_flight("chat") == 0


async def test_drain_waits_for_requests() -> None:
    box = await Box().started()
    lease = box.lease("chat")
    draining = asyncio.ensure_future(box.pool.drain(10))
    await asyncio.sleep(0.1)
    assert not draining.done()
    lease.release()
    await soon(draining)


async def test_drain_cuts_requests_at_its_timeout() -> None:
    box = await Box().started()
    work = asyncio.ensure_future(asyncio.sleep(60))
    lease = box.lease("chat", work)
    await soon(box.pool.drain(0.05))
    with pytest.raises(asyncio.CancelledError):
        await work
    assert isinstance(lease.cut_by, Overloaded)


async def test_all_engines_stop_at_the_same_time() -> None:
    gates = {name: Gate() for name in ("chat", "embed", "draft")}
    box = await Box().started()
    for name, gate in gates.items():
        box.backend.running(name).stop_gate = gate
    stopping = asyncio.ensure_future(box.pool.stop())
    for gate in gates.values():
        await soon(gate.reached.wait())
    with pytest.raises(Overloaded):
        box.lease("chat")
    for gate in gates.values():
        gate.opened.set()
    await soon(stopping)
    assert set(box.states().values()) == {"stopped"}
    assert [box.backend.running(name).stopped for name in gates] == [1, 1, 1]
    assert box.backend.killed == 0


async def test_failed_stop_of_an_engine_does_not_keep_the_others() -> None:
    box = await Box(chat=Plan(), embed=Plan(), draft=Plan()).started()
    gate = Gate()
    box.backend.running("chat").stop_error = RuntimeError("boom")
    box.backend.running("embed").stop_gate = gate
    stopping = await gate.begin(box.pool.stop())
    await asyncio.sleep(0.02)
    assert not stopping.done()
    await gate.open_for(stopping)
    assert set(box.states().values()) == {"stopped"}


async def test_stop_during_the_start_kills_starting_engines() -> None:
    gate = Gate()
    box = Box(embed=Plan(gate=gate))
    starting = await box.starting(gate)
    starting.cancel()
    await soon(box.pool.stop())
    assert box.backend.killed == 1
    assert box.backend.running("chat").stopped == 1
    assert box.states()["chat"] == "stopped"


async def test_stopped_pool_refuses_requests() -> None:
    box = await Box().started()
    await box.pool.stop()
    with pytest.raises(Overloaded, match="The server is stopping"):
        box.lease("chat")


# --- metrics


async def test_states_are_in_the_metrics() -> None:
    gate = Gate()
    box = Box(chat=Plan(reports=((State.LOADING, ""),), gate=gate), embed=broken())
    assert box.shown_states() == {"chat": "waiting", "embed": "waiting", "draft": "waiting"}
    starting = await box.starting(gate)
    await box.until(lambda: box.states()["draft"] == "ready")
    assert box.shown_states() == {"chat": "loading", "embed": "failed", "draft": "ready"}
    await gate.open_for(starting)
    assert box.shown_states()["chat"] == "ready"
    assert box.metric("model_ready_seconds", model="chat", replica="0", level="stopped")
    await box.pool.stop()
    assert box.shown_states() == {"chat": "stopped", "embed": "failed", "draft": "stopped"}


async def test_metrics_of_running_engines_are_collected() -> None:
    box = Box(embed=broken())
    assert list(box.pool.collectors()) == []
    await box.pool.start()
    running = [box.backend.running(name).registry for name in ("chat", "draft")]
    assert list(box.pool.collectors()) == running


# --- replicas


def twins(**more: Any) -> ModelSpec:
    return spec("chat", replicas=2, **more)


def plans(*each: Plan) -> dict[str, Any]:
    """Of the replicas of `chat`, in order."""
    return {f"chat/{number}": plan for number, plan in enumerate(each)}


async def test_replicas_start_together_and_share_slots() -> None:
    gates = [Gate(), Gate()]
    box = Box(twins(max_in_flight=3, max_queue=0), **plans(*(Plan(gate=gate) for gate in gates)))
    starting = await box.starting(*gates)
    for gate in gates:
        gate.opened.set()
    await soon(starting)
    assert box.shown_states() == {"chat/0": "ready", "chat/1": "ready"}
    leases = [box.lease("chat") for _ in range(3)]
    assert {lease.replica.name for lease in leases} == {"chat/0", "chat/1"}
    with pytest.raises(Overloaded, match="its max_in_flight"):
        box.lease("chat")


async def test_model_serves_with_its_first_ready_replica() -> None:
    gate = Gate()
    slow = Plan(reports=((State.LOADING, ""),), gate=gate)
    box = Box(twins(), **plans(slow))
    starting = asyncio.ensure_future(box.pool.start())
    await box.until(lambda: box.states() == {"chat": "ready"})
    assert box.shown_states() == {"chat/0": "loading", "chat/1": "ready"}
    for _ in range(2):
        assert box.lease("chat").replica.name == "chat/1"
    await gate.open_for(starting)
    assert [each.state for each in box.pool.replicas] == [State.READY, State.READY]


@pytest.mark.parametrize(
    ("states", "model"),
    [
        ((State.WAITING, State.DOWNLOADING), State.DOWNLOADING),
        ((State.WARMING, State.LOADING), State.WARMING),
        ((State.FAILED, State.WAITING), State.WAITING),
        ((State.READY, State.FAILED), State.READY),
        ((State.LOADING, State.READY), State.READY),
        ((State.FAILED, State.STOPPED), State.STOPPED),
        ((State.FAILED, State.FAILED), State.FAILED),
    ],
)
def test_state_of_a_model_is_that_of_its_furthest_replica(
    states: tuple[State, State], model: State
) -> None:
    box = Box(twins())
    for replica, state in zip(box.pool.replicas, states, strict=True):
        box.pool.life.change(replica, state)
    entry = box.pool.models["chat"]
    assert entry.state is model
    assert box.pool.ready() == ([entry] if model is State.READY else [])


async def test_a_required_model_needs_one_replica() -> None:
    box = await Box(twins(required=True), **plans(broken("OSError: no space left"))).started()
    assert box.states() == {"chat": "ready"}
    assert ("chat/0", State.FAILED, "OSError: no space left") in box.seen

    none = Box(twins(required=True), **plans(broken("first"), broken("second")))
    with pytest.raises(StartupError, match="chat is required and failed: first"):
        await soon(none.pool.start())


async def test_a_replica_that_dies_fails_alone() -> None:
    box = await Box(twins()).started()
    async with box.watched():
        box.backend.running("chat/0").dead = True
        await box.until(lambda: box.shown_states() == {"chat/0": "waiting", "chat/1": "ready"})
        assert box.states() == {"chat": "ready"}
        assert box.lease("chat").replica.name == "chat/1"
        box.backend.running("chat/1").dead = True
        await box.until(lambda: box.states() == {"chat": "waiting"})
        with pytest.raises(Overloaded, match="The model `chat` is waiting"):
            box.lease("chat")
        await box.until(lambda: box.shown_states() == {"chat/0": "ready", "chat/1": "ready"})
    await box.pool.stop()
    assert box.shown_states() == {"chat/0": "stopped", "chat/1": "stopped"}


async def test_dead_replica_gets_no_requests() -> None:
    box = await Box(twins(max_in_flight=9)).started()
    box.lease("chat", prompt="busy " * 99)
    busy = [replica.name for replica in box.pool.replicas if replica.load.requests]
    (idle,) = {"chat/0", "chat/1"} - set(busy)
    box.backend.running(idle).dead = True
    assert [box.lease("chat").replica.name for _ in range(3)] == busy * 3
    assert box.shown_states()[idle] == "waiting"
    box.backend.running(busy[0]).dead = True
    with pytest.raises(Overloaded, match="The model `chat` is waiting"):
        box.lease("chat")
    assert box.in_flight("chat") == 4


async def test_tokens_in_flight_are_those_of_held_leases() -> None:
    box = await Box(twins(max_in_flight=9)).started()

    def shown() -> list[float | None]:
        return [box.metric("replica_tokens_in_flight", model="chat", replica=n) for n in "01"]

    first = box.lease("chat", prompt="x" * 400, max_tokens=50)
    second = box.lease("chat", prompt=[1] * 30, max_tokens=9000)
    third = box.pool.lease(request("chat", endpoint=EMBED, input="x" * 40, max_tokens=50))
    assert isinstance(third, Lease)
    assert shown() == [100 + 512, 30 + 512 + 10]
    for lease in (first, third, second, second, first):
        lease.release()
    assert shown() == [0.0, 0.0]
    assert box.in_flight("chat") == 0


async def test_a_refused_request_counts_for_no_replica() -> None:
    box = await Box(twins(max_in_flight=1, max_queue=0)).started()
    held = box.lease("chat", prompt="x" * 40)
    with pytest.raises(Overloaded):
        box.lease("chat", prompt="x" * 40)
    assert [each.load.requests for each in box.pool.replicas] == [1, 0]
    dispatched = {
        (s.labels["replica"], s.labels["policy"]): s.value
        for family in box.metrics.dispatched.collect()
        for s in family.samples
        if s.name.endswith("_total")
    }
    assert dispatched == {("0", "shortest_queue"): 1.0, ("1", "shortest_queue"): 0.0}
    held.release()
    assert [each.load.requests for each in box.pool.replicas] == [0, 0]


async def test_changed_policy_is_the_label_of_later_requests() -> None:
    box = await Box(twins(max_in_flight=9)).started()
    box.lease("chat", prompt="x").release()
    box.pool.apply_spec(box.pool.models["chat"], twins(max_in_flight=9, dispatch="prefix_affinity"))
    box.lease("chat", prompt="x").release()
    counted = {
        policy: sum(
            box.metric("requests_dispatched_total", model="chat", replica=number, policy=policy)
            or 0
            for number in "01"
        )
        for policy in ("shortest_queue", "prefix_affinity")
    }
    assert counted == {"shortest_queue": 1.0, "prefix_affinity": 1.0}


async def test_requests_of_a_single_replica_have_no_load() -> None:
    box = await Box().started()
    lease = box.lease("chat", prompt="x" * 400)
    assert lease.replica.name == "chat"
    assert lease.replica.load.tokens == 0
    page = box.metrics.page([]).decode()
    assert "llmserve_replica_tokens_in_flight{" not in page
    assert "llmserve_requests_dispatched_total{" not in page


async def test_a_prefix_is_forgotten_with_its_replica() -> None:
    box = await Box(twins(dispatch="prefix_affinity", max_in_flight=99)).started()
    prompt = "same " * 400

    def asked() -> Replica:
        lease = box.lease("chat", prompt=prompt)
        lease.release()
        return lease.replica

    holder = asked()
    assert {asked() for _ in range(5)} == {holder}
    box.backend.running(holder.name).dead = True
    other = asked()
    assert other is not holder
    box.backend.running(holder.name).dead = False
    box.pool.life.change(holder, State.READY)  # a new engine, with nothing in its cache
    assert {asked() for _ in range(5)} == {other}


async def test_replicas_stop_and_have_metrics() -> None:
    box = await Box(twins()).started()
    running = [box.backend.running(f"chat/{number}") for number in (0, 1)]
    assert list(box.pool.collectors()) == [each.registry for each in running]
    await box.pool.stop()
    assert [each.stopped for each in running] == [1, 1]


async def test_engine_whose_check_raises_is_not_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    box = await Box(timings=replace(FAST, hang_check_s=0.01)).started()
    asked: list[float] = []

    async def broken(within_s: float) -> bool:
        asked.append(within_s)
        raise RuntimeError("cores disagree")

    monkeypatch.setattr(box.backend.running("chat"), "responds", broken)
    async with box.watched():
        await until(lambda: len(asked) > 2)  # the monitor continues
    assert not box.backend.running("chat").dead


async def test_watch_that_is_cancelled_leaves_no_task() -> None:
    """It may be asking an engine that hangs, and draining one that is idle."""
    timings = replace(FAST, hang_check_s=0.001, health_check_s=0.001, hang_s=3600.0)
    box = await Box(spec("chat", idle={"stop_after": 0.002}), timings=timings).started()
    running = box.backend.running("chat")
    running.hangs = True
    running.stop_gate = Gate()
    before = asyncio.all_tasks()
    async with asyncio.timeout(30), box.watched():
        await soon(running.stop_gate.reached.wait())
        # An end that has begun is completed.
        asyncio.get_running_loop().call_later(0.01, running.stop_gate.opened.set)
    await until(lambda: asyncio.all_tasks() <= before)


async def test_watch_with_a_replica_that_raises_checks_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    box = await Box(spec("broken"), spec("chat", start="lazy")).started()
    handle_death = box.pool.supervisor.handle_death
    checked: set[str] = set()

    def handle(replica: Replica) -> bool:
        checked.add(replica.name)
        if replica.name == "broken":
            raise RuntimeError("unforeseen")
        return handle_death(replica)

    monkeypatch.setattr(box.pool.supervisor, "handle_death", handle)
    async with box.watched():
        await until(lambda: checked == {"broken", "chat"})


async def test_replica_that_hangs_while_it_drains_is_killed() -> None:
    box = await Box(timings=replace(FAST, hang_check_s=0.001, hang_s=0.001)).started()
    running = box.backend.running("chat")
    lease = await soon(box.ask("chat"))
    lowering = asyncio.create_task(box.pool.life.lower(box.replica("chat"), Level.STOPPED))
    await until(lambda: box.replica("chat").state is State.DRAINING)
    running.hangs = True
    async with box.watched():
        await until(lambda: running.dead)
    lease.release()
    await soon(lowering)


async def test_unload_serves_the_queue_of_a_model_that_was_resized_meanwhile() -> None:
    """The new model has taken over the queue and the replica that is being unloaded."""
    box = await Box(spec("chat", start="lazy")).started()
    before = box.pool.models["chat"]
    (replica,) = before.replicas
    async with replica.transition_lock:
        asking = await box.asking("chat")
        unloading = asyncio.create_task(box.pool.supervisor.unload(before))
        await asyncio.sleep(0)
        resized = box.pool.create(spec("chat", start="lazy", replicas=2), [replica])
        resized.replicas[1].retired = True  # it does not start in place of the other
        box.pool.add(resized)
    await soon(unloading)
    lease = await soon(asking, 10)
    assert lease.replica is replica
    lease.release()


async def test_removed_failed_model_serves_its_queue() -> None:
    box = await Box(spec("chat", start="lazy", max_in_flight=1, max_queue=8)).started()
    entry = box.pool.models["chat"]
    (replica,) = entry.replicas
    box.pool.life.change(replica, State.FAILED)
    replica.again_at = 0.0
    async with replica.transition_lock:  # another transition is not over
        first, second = (box.queued(request("chat")) for _ in range(2))
        box.pool.remove(entry)
        ending = asyncio.ensure_future(box.pool.end(entry))
        await asyncio.sleep(0)
    lease = await soon(lease_of(first))
    for _ in range(20):  # what ends it begins, if it does not wait for the second
        await asyncio.sleep(0)
    lease.release()
    (await soon(lease_of(second))).release()
    await soon(ending)
    assert replica.state is State.STOPPED


async def test_removed_model_that_cannot_start_refuses_its_queue() -> None:
    box = await Box(
        spec("chat", start="lazy", max_in_flight=1, max_queue=8), chat=broken("no weights")
    ).started()
    entry = box.pool.models["chat"]
    place = box.queued(request("chat"))
    box.pool.remove(entry)
    await soon(box.pool.end(entry))
    with pytest.raises(EngineDead):
        await lease_of(place)
