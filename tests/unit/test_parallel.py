"""Works that end together."""

from __future__ import annotations

import asyncio

import pytest

from llmserve.lifecycle.parallel import in_parallel
from tests.fakes import Gate, soon


async def _result(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def _fails() -> int:
    raise KeyError("first")


async def test_in_parallel_keeps_the_order() -> None:
    assert await in_parallel(_result(each) for each in range(3)) == [0, 1, 2]
    assert await in_parallel([]) == []


async def test_in_parallel_awaits_all_before_it_raises() -> None:
    gate = Gate()
    running = await gate.begin(in_parallel([_fails(), _through(gate)]))
    assert not running.done()
    gate.opened.set()
    with pytest.raises(KeyError):
        await soon(running)


async def test_in_parallel_cancelled_awaits_the_slow_one() -> None:
    """`asyncio.gather` alone ends with the first work that was cancelled."""
    ended = asyncio.Event()
    began = asyncio.Event()

    async def slow() -> int:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            ended.set()
        return 0

    running = asyncio.create_task(in_parallel([_through(Gate()), slow()]))
    await soon(began.wait())
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()
    assert ended.is_set()


async def _through(gate: Gate) -> int:
    await gate.wait()
    return 1
