from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from llmserve.errors import EngineDead, ModelNotFound, Overloaded, StartupError
from llmserve.metrics import Metrics
from llmserve.pool import Entry, Pool, State
from llmserve.registry import Registry
from tests.fakes import FakeBackend, Gate, Plan, broken, soon, spec, until


class Box:
    """A pool of `chat`, `embed` and `draft` with a scripted backend."""

    def __init__(self, *, required: bool = False, max_in_flight: int = 2, **plans: Plan) -> None:
        specs = [
            spec("chat", aliases=["gpt-4o"], required=required, max_in_flight=max_in_flight),
            spec("embed"),
            spec("draft", hidden=True),
        ]
        self.backend = FakeBackend(**plans)
        self.metrics = Metrics()
        self.seen: list[tuple[str, State, str]] = []
        self.pool = Pool(Registry(specs), self.backend, self.metrics, self._changed)

    def _changed(self, entry: Entry) -> None:
        self.seen.append((entry.name, entry.state, entry.note))

    def states(self) -> dict[str, str]:
        return {name: entry.state.value for name, entry in self.pool.entries.items()}

    def shown_states(self) -> dict[str, str]:
        """The states that the metrics show."""
        samples = [s for family in self.metrics.state.collect() for s in family.samples]
        return {s.labels["model"]: s.labels["state"] for s in samples if s.value == 1}

    def in_flight(self, model: str) -> float | None:
        labels = {"model": model}
        return self.metrics.registry.get_sample_value("llmserve_requests_in_flight", labels)


# --- starting


async def test_all_models_start_at_the_same_time() -> None:
    gates = {name: Gate() for name in ("chat", "embed", "draft")}
    box = Box(
        chat=Plan(gate=gates["chat"]),
        embed=Plan(gate=gates["embed"]),
        draft=Plan(gate=gates["draft"]),
    )
    starting = asyncio.ensure_future(box.pool.start())
    for gate in gates.values():
        await soon(gate.reached.wait())
    assert not starting.done()
    for gate in gates.values():
        gate.opened.set()
    await soon(starting)
    assert box.states() == {"chat": "ready", "embed": "ready", "draft": "ready"}


async def test_a_model_serves_while_another_still_starts() -> None:
    gate = Gate()
    box = Box(embed=Plan(gate=gate))
    starting = asyncio.ensure_future(box.pool.start())
    await until(lambda: box.states()["chat"] == "ready")
    assert box.pool.lease("chat").running is box.backend.running("chat")
    gate.opened.set()
    await soon(starting)


async def test_one_that_fails_does_not_stop_the_others() -> None:
    box = Box(embed=broken("OSError: no space left"))
    await box.pool.start()
    assert box.states() == {"chat": "ready", "embed": "failed", "draft": "ready"}
    assert ("embed", State.FAILED, "OSError: no space left") in box.seen
    assert [entry.name for entry in box.pool.ready()] == ["chat", "draft"]


async def test_one_that_fails_in_an_unforeseen_way_does_not_stop_the_others() -> None:
    box = Box(embed=Plan(error=RuntimeError("boom")))
    await box.pool.start()
    assert box.states() == {"chat": "ready", "embed": "failed", "draft": "ready"}
    assert "boom" in box.pool.entries["embed"].note


async def test_a_required_one_that_fails_ends_the_start_at_once() -> None:
    gate = Gate()
    box = Box(required=True, chat=broken("ValueError: no KV cache"), embed=Plan(gate=gate))
    with pytest.raises(StartupError) as ended:
        await soon(box.pool.start())
    assert ended.value.message == "chat is required and failed: ValueError: no KV cache"
    assert ended.value.exit_code == 3
    await soon(gate.left.wait())
    assert gate.cancelled


async def test_a_box_without_one_ready_model_does_not_start() -> None:
    box = Box(chat=broken(), embed=broken(), draft=broken())
    with pytest.raises(StartupError, match="no model could be started"):
        await box.pool.start()


async def test_a_start_that_is_given_up_gives_up_every_model() -> None:
    gates = [Gate(), Gate()]
    box = Box(chat=Plan(gate=gates[0]), embed=Plan(gate=gates[1]))
    starting = asyncio.ensure_future(box.pool.start())
    for gate in gates:
        await soon(gate.reached.wait())
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    for gate in gates:
        await soon(gate.left.wait())
        assert gate.cancelled


async def test_progress_is_passed_on_as_it_comes() -> None:
    box = Box(
        chat=Plan(
            reports=(
                (State.DOWNLOADING, ""),
                (State.DOWNLOADING, "0.10 of 0.27 GiB"),
                (State.LOADING, ""),
                (State.WARMING, ""),
            )
        )
    )
    await box.pool.start()
    assert [(state, note) for name, state, note in box.seen if name == "chat"] == [
        (State.DOWNLOADING, ""),
        (State.DOWNLOADING, "0.10 of 0.27 GiB"),
        (State.LOADING, ""),
        (State.WARMING, ""),
        (State.READY, ""),
    ]
    assert box.pool.entries["chat"].seconds > 0


# --- leases


@pytest.mark.parametrize("state", [State.DOWNLOADING, State.LOADING, State.WARMING])
async def test_a_model_that_is_not_ready_yet_says_when_to_come_back(state: State) -> None:
    gate = Gate()
    box = Box(chat=Plan(reports=((state, ""),), gate=gate))
    starting = asyncio.ensure_future(box.pool.start())
    await soon(gate.reached.wait())
    with pytest.raises(Overloaded) as refused:
        box.pool.lease("chat")
    assert refused.value.message == f"The model `chat` is {state}; try again."
    assert refused.value.code == "model_not_ready"
    assert refused.value.headers() == {"retry-after": "5"}
    assert box.pool.entries["chat"].slots.in_flight == 0
    gate.opened.set()
    await soon(starting)
    box.pool.lease("chat").release()


def test_a_model_that_was_never_started_is_not_ready() -> None:
    with pytest.raises(Overloaded, match="`chat` is waiting") as refused:
        Box().pool.lease("chat")
    assert refused.value.code == "model_not_ready"


async def test_a_model_that_could_not_start_is_not_worth_another_try() -> None:
    box = Box(embed=broken())
    await box.pool.start()
    with pytest.raises(EngineDead, match="`embed` could not be started") as refused:
        box.pool.lease("embed")
    assert refused.value.code == "model_failed"
    assert refused.value.headers() == {}


async def test_an_unknown_name_gets_the_names_there_are_and_the_nearest() -> None:
    box = Box()
    await box.pool.start()
    with pytest.raises(ModelNotFound) as refused:
        box.pool.lease("gpt-4")
    assert refused.value.message == (
        "The model `gpt-4` does not exist; did you mean `gpt-4o`? models here: chat, embed, gpt-4o."
    )


async def test_aliases_share_the_slots_of_their_model() -> None:
    box = Box(max_in_flight=2)
    await box.pool.start()
    leases = [box.pool.lease("chat"), box.pool.lease("gpt-4o")]
    assert {lease.model for lease in leases} == {"chat"}
    assert box.in_flight("chat") == 2
    with pytest.raises(Overloaded, match="its max_in_flight") as refused:
        box.pool.lease("chat")
    assert refused.value.code == "overloaded"
    box.pool.lease("embed").release()


async def test_a_lease_is_given_back_once() -> None:
    box = Box(max_in_flight=2)
    await box.pool.start()
    other = box.pool.lease("chat")
    lease = box.pool.lease("chat")
    lease.release()
    assert box.in_flight("chat") == 1
    lease.release()
    assert box.in_flight("chat") == 1
    other.release()
    assert box.in_flight("chat") == 0


# --- deaths and ends


async def test_an_engine_that_dies_is_noticed_and_the_others_serve_on() -> None:
    box = Box()
    await box.pool.start()
    watching = asyncio.ensure_future(box.pool.watch())
    box.backend.running("chat").dead = True
    await until(lambda: box.states()["chat"] == "failed")
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    assert box.pool.entries["chat"].note == "its engine died"
    with pytest.raises(EngineDead, match="The engine of `chat` has died") as refused:
        box.pool.lease("chat")
    assert refused.value.code == "engine_dead"
    box.pool.lease("embed").release()


async def test_a_closed_pool_admits_nobody_but_lets_requests_finish() -> None:
    box = Box()
    await box.pool.start()
    lease = box.pool.lease("chat")
    box.pool.close()
    with pytest.raises(Overloaded) as refused:
        box.pool.lease("embed")
    assert refused.value.code == "shutting_down"
    assert "retry-after" in refused.value.headers()
    assert box.in_flight("chat") == 1
    lease.release()
    assert box.in_flight("chat") == 0


async def test_a_drain_waits_for_requests_and_no_longer() -> None:
    box = Box()
    await box.pool.start()
    lease = box.pool.lease("chat")
    draining = asyncio.ensure_future(box.pool.drain(10))
    await asyncio.sleep(0.1)
    assert not draining.done()
    lease.release()
    await soon(draining)


async def test_what_takes_longer_than_the_drain_is_cut_off() -> None:
    box = Box()
    await box.pool.start()
    work = asyncio.ensure_future(asyncio.sleep(60))
    lease = box.pool.lease("chat", work)
    await soon(box.pool.drain(0.05))
    with pytest.raises(asyncio.CancelledError):
        await work
    assert lease.was_cut


async def test_all_engines_stop_at_the_same_time() -> None:
    gates = {name: Gate() for name in ("chat", "embed", "draft")}
    box = Box()
    await box.pool.start()
    for name, gate in gates.items():
        box.backend.running(name).stop_gate = gate
    stopping = asyncio.ensure_future(box.pool.stop())
    for gate in gates.values():
        await soon(gate.reached.wait())
    with pytest.raises(Overloaded):
        box.pool.lease("chat")
    for gate in gates.values():
        gate.opened.set()
    await soon(stopping)
    assert set(box.states().values()) == {"stopped"}
    assert [box.backend.running(name).stopped for name in gates] == [1, 1, 1]
    assert box.backend.killed == 0


async def test_an_engine_that_does_not_stop_cleanly_does_not_keep_the_others() -> None:
    box = Box(chat=Plan(), embed=Plan(), draft=Plan())
    await box.pool.start()
    gate = Gate()
    box.backend.running("chat").stop_error = RuntimeError("boom")
    box.backend.running("embed").stop_gate = gate
    stopping = asyncio.ensure_future(box.pool.stop())
    await soon(gate.reached.wait())
    await asyncio.sleep(0.02)
    assert not stopping.done()
    gate.opened.set()
    await soon(stopping)
    assert set(box.states().values()) == {"stopped"}


async def test_a_stop_during_the_start_ends_what_is_under_way() -> None:
    gate = Gate()
    box = Box(embed=Plan(gate=gate))
    starting = asyncio.ensure_future(box.pool.start())
    await soon(gate.reached.wait())
    starting.cancel()
    await soon(box.pool.stop())
    assert box.backend.killed == 1
    assert box.backend.running("chat").stopped == 1
    assert box.states()["chat"] == "stopped"


async def test_a_stopped_pool_says_that_the_server_stops() -> None:
    box = Box()
    await box.pool.start()
    await box.pool.stop()
    with pytest.raises(Overloaded, match="The server is stopping"):
        box.pool.lease("chat")


# --- figures


async def test_states_are_in_the_metrics() -> None:
    gate = Gate()
    box = Box(chat=Plan(reports=((State.LOADING, ""),), gate=gate), embed=broken())
    assert box.shown_states() == {"chat": "waiting", "embed": "waiting", "draft": "waiting"}
    starting = asyncio.ensure_future(box.pool.start())
    await soon(gate.reached.wait())
    await until(lambda: box.states()["draft"] == "ready")
    assert box.shown_states() == {"chat": "loading", "embed": "failed", "draft": "ready"}
    gate.opened.set()
    await soon(starting)
    assert box.shown_states()["chat"] == "ready"
    seconds = {"model": "chat"}
    assert box.metrics.registry.get_sample_value("llmserve_model_start_seconds", seconds)
    await box.pool.stop()
    assert box.shown_states() == {"chat": "stopped", "embed": "failed", "draft": "stopped"}


async def test_the_figures_of_running_engines_are_collected() -> None:
    box = Box(embed=broken())
    assert list(box.pool.registries()) == []
    await box.pool.start()
    running = [box.backend.running(name).registry for name in ("chat", "draft")]
    assert list(box.pool.registries()) == running
