"""What the health monitor does about replicas that are idle."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from llmserve.lifecycle.placement import Level
from tests.fakes import FAST, FakeBackend, PoolBox, soon, spec, until

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from llmserve.lifecycle.replica import Replica


async def test_replica_that_is_used_again_is_not_stopped_as_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A request can arrive between the check and the transition."""
    timings = replace(FAST, health_check_s=0.001)
    model = spec("chat", idle={"stop_after": 0.01})
    box = PoolBox((model,), FakeBackend(), timings)
    await soon(box.pool.start())
    conditions: list[Callable[[], bool]] = []

    async def record(_: Replica, level: Level, still: Callable[[], bool]) -> None:
        assert level is Level.STOPPED
        conditions.append(still)

    monkeypatch.setattr(box.pool.life, "lower", record)
    async with box.watched():
        await until(lambda: bool(conditions))
    assert conditions[0]()
    lease = await soon(box.ask("chat"))
    assert not conditions[0]()
    lease.release()
