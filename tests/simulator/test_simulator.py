"""Seeds that CI runs, and the proof that a fault of each kind does not pass them."""

from __future__ import annotations

import asyncio
import gc
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from llmserve.engine.backend import _Start
from llmserve.lifecycle.admission import AdmissionQueue, QueuedRequest
from llmserve.lifecycle.placement import Level
from llmserve.lifecycle.replica import State
from llmserve.lifecycle.supervisor import Supervisor
from tests.simulator.engines import Memory
from tests.simulator.world import Violation, World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from contextlib import AbstractAsyncContextManager

    from llmserve.lifecycle.gpu_memory import Keep
    from llmserve.lifecycle.placement import Placement
    from llmserve.lifecycle.replica import Replica
    from llmserve.lifecycle.served_model import ServedModel
    from llmserve.registry.spec import ModelSpec

pytestmark = pytest.mark.no_cover  # tracing makes a seed several times slower

_SEEDS = 2000
_CHUNK = 100


@pytest.fixture(scope="module", autouse=True)
def garbage() -> Iterator[None]:
    """Only of the seeds: a process that has imported vLLM has millions of other objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def run(seeds: range, *, harsh: bool = False) -> None:
    served = 0
    for seed in seeds:
        world = World(seed, harsh=harsh)
        world.run()
        served += world.served
    assert served > len(seeds)  # engines start and answer


@pytest.mark.parametrize("first", range(0, _SEEDS, _CHUNK))
def test_every_seed_keeps_the_invariants(first: int) -> None:
    """A failing one is replayed by `python -m tests.simulator SEED --trace`."""
    run(range(first, first + _CHUNK))


@pytest.mark.parametrize("first", range(0, 100, 50))
def test_every_harsh_seed_keeps_the_invariants(first: int) -> None:
    """The faults below are put back into these seeds."""
    run(range(first, first + 50), harsh=True)


@pytest.mark.parametrize("seed", range(10))
def test_a_seed_replays_event_by_event(seed: int) -> None:
    first, second = World(seed), World(seed)
    first.run()
    second.run()
    assert first.trace
    assert first.trace == second.trace


# --- faults that were here once, put back


def test_a_request_that_queues_a_step_late_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def join_late(
        slots: AdmissionQueue[Any, Any], deadline: Any, request: Any
    ) -> QueuedRequest[Any, Any]:
        queued: QueuedRequest[Any, Any] = QueuedRequest(deadline, request)

        def join() -> None:
            if queued.given.done():  # its client has left
                return
            slots.insert(queued)
            if not ready(slots):  # a model at rest was started
                slots.changed()

        asyncio.get_running_loop().call_soon(join)
        return queued

    def ready(slots: AdmissionQueue[Any, Any]) -> bool:
        """Whether the model of this queue is ready: its `changed` is bound to it."""
        model: ServedModel = slots.changed.__self__  # type: ignore[attr-defined]
        return bool(model.ready)

    monkeypatch.setattr(AdmissionQueue, "join", join_late)
    with pytest.raises(Violation, match="a request waits, a slot is free"):
        run(range(_SEEDS), harsh=True)


def test_a_raised_limit_that_admits_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def resize_only(slots: AdmissionQueue[Any, Any], limit: int, longest: int) -> None:
        slots.limit, slots.longest = limit, longest

    monkeypatch.setattr(AdmissionQueue, "resize", resize_only)
    with pytest.raises(Violation, match="a request waits, a slot is free"):
        run(range(_SEEDS), harsh=True)


def test_a_death_in_the_step_that_ends_a_start_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was noticed, and the new start dropped for the one that had yet to end."""

    def handle_death(supervisor: Supervisor, replica: Replica) -> bool:
        life = supervisor._life
        if not replica.is_dead or replica.state not in {State.READY, State.SLEEPING}:
            return False
        if replica.transition_lock.locked():
            return False
        if supervisor.is_closed:
            life.change(replica, State.FAILED, "its engine died")
        elif replica.state is State.SLEEPING:
            supervisor.begin(replica, partial(life.lower, level=Level.STOPPED))
        elif life.schedule_restart(replica, "its engine died", 0.0):
            supervisor.begin(replica, life.restart)
        else:
            supervisor.begin(replica, life.discard)
        return True

    def finish(supervisor: Supervisor, replica: Replica, _: asyncio.Task[None]) -> None:
        del supervisor._tasks[replica]
        replica.model.serve_queue()

    monkeypatch.setattr(Supervisor, "handle_death", handle_death)
    monkeypatch.setattr(Supervisor, "_finish", finish)
    with pytest.raises(Violation, match=r"stays waiting|wait forever"):
        run(range(_SEEDS), harsh=True)


def test_an_engine_without_an_owner_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that was cancelled left what its thread had made."""
    owned_start = _Start.owned

    @asynccontextmanager
    async def owned(start: _Start) -> AsyncIterator[None]:
        try:
            yield
        except Exception:
            async with owned_start(start):
                raise

    monkeypatch.setattr(_Start, "owned", owned)
    with pytest.raises(Violation, match=r"engines hold|have no owner|alive after the end"):
        run(range(_SEEDS), harsh=True)


def test_an_engine_that_starts_by_a_later_plan_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places were found by name and number, which two engines share during a reload."""
    start = Memory.start

    def start_by_name(
        memory: Memory, spec: ModelSpec, placement: Placement
    ) -> AbstractAsyncContextManager[tuple[ModelSpec, Keep]]:
        if spec.name in memory.plan:
            placement = memory.place(spec, placement.number)
        return start(memory, spec, placement)

    monkeypatch.setattr(Memory, "start", start_by_name)
    with pytest.raises(Violation, match=r"engines hold|is placed elsewhere"):
        run(range(_SEEDS), harsh=True)
