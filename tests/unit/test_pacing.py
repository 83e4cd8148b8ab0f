from __future__ import annotations

import asyncio

from llmserve.api.schedule import SCHEDULE
from llmserve.engine.pacing import PacedRendering
from tests.fakes import soon


class Begun:
    """Calls, with the turn of the loop in which each began."""

    def __init__(self) -> None:
        self.turn = 0
        self.turns: list[int] = []

    async def count_turns(self) -> None:
        while True:
            self.turn += 1
            await asyncio.sleep(0)

    async def __call__(self, value: int) -> int:
        self.turns.append(self.turn)
        return value


async def test_paced_calls_begin_in_order_some_each_turn() -> None:
    begun = Begun()
    paced = PacedRendering(begun)
    counting = asyncio.ensure_future(begun.count_turns())
    values = await soon(asyncio.gather(*(paced(i) for i in range(5 * SCHEDULE.renders + 1))))
    counting.cancel()
    assert values == list(range(5 * SCHEDULE.renders + 1))
    assert max(begun.turns.count(turn) for turn in set(begun.turns)) <= SCHEDULE.renders


async def test_paced_call_alone_begins_at_once() -> None:
    begun = Begun()
    paced = PacedRendering(begun)
    for i in range(3):
        assert await paced(i) == i
    assert begun.turns == [0, 0, 0]


async def test_paced_calls_that_are_cancelled_take_no_place() -> None:
    begun = Begun()
    paced = PacedRendering(begun)
    calls = [asyncio.ensure_future(paced(i)) for i in range(3 * SCHEDULE.renders)]
    await asyncio.sleep(0)
    for call in calls[SCHEDULE.renders : -1]:
        call.cancel()
    assert await soon(calls[-1]) == 3 * SCHEDULE.renders - 1
    assert len(begun.turns) == SCHEDULE.renders + 1
