from __future__ import annotations

import asyncio
import itertools

from llmserve.turns import Turns
from tests.fakes import soon


class Queue:
    """Requests that take a turn, and the order in which they got it."""

    def __init__(self, per_turn: int) -> None:
        self.turns = Turns(per_turn)
        self.order: list[int] = []

    def come(self, *numbers: int) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self._take(number)) for number in numbers]

    async def _take(self, number: int) -> None:
        await self.turns.take()
        self.order.append(number)


async def test_a_few_get_in_without_waiting() -> None:
    turns = Turns(3)
    for _ in range(3):
        taking = turns.take()
        try:
            taking.send(None)
        except StopIteration:
            continue
        raise AssertionError("it waited")


async def test_more_are_let_in_a_share_per_turn_first_come_first_served() -> None:
    queue = Queue(2)
    tasks = queue.come(*range(9))
    sizes = [0]
    while len(queue.order) < 9:
        await asyncio.sleep(0)
        sizes.append(len(queue.order))
        assert len(sizes) < 50
    assert max(after - before for before, after in itertools.pairwise(sizes)) == 2
    assert queue.order == list(range(9))
    await soon(asyncio.gather(*tasks))


async def test_the_loop_runs_in_between() -> None:
    queue = Queue(1)
    seen: list[int] = []

    def look() -> None:
        seen.append(len(queue.order))
        if len(queue.order) < 5:
            asyncio.get_running_loop().call_soon(look)

    tasks = queue.come(*range(5))
    asyncio.get_running_loop().call_soon(look)
    await soon(asyncio.gather(*tasks))
    await asyncio.sleep(0)
    assert {1, 2, 3, 4} <= set(seen)


async def test_who_comes_later_does_not_overtake() -> None:
    queue = Queue(1)
    tasks = queue.come(0, 1, 2)
    await asyncio.sleep(0)
    assert queue.order == [0]
    tasks += queue.come(3)
    await soon(asyncio.gather(*tasks))
    assert queue.order == [0, 1, 2, 3]


async def test_who_has_left_takes_nobody_s_place() -> None:
    queue = Queue(1)
    tasks = queue.come(0, 1, 2, 3, 4)
    await asyncio.sleep(0)
    for task in tasks[1:4]:
        task.cancel()
    await soon(asyncio.wait(tasks))
    assert queue.order == [0, 4]
    assert [task.cancelled() for task in tasks] == [False, True, True, True, False]


async def test_when_all_that_wait_have_left_the_next_gets_in() -> None:
    queue = Queue(1)
    tasks = queue.come(0, 1, 2)
    await asyncio.sleep(0)
    for task in tasks[1:]:
        task.cancel()
    await soon(asyncio.wait(tasks))
    await soon(asyncio.gather(*queue.come(3)))
    assert queue.order == [0, 3]


async def test_a_quiet_server_has_its_whole_share_again_and_no_timer() -> None:
    queue = Queue(2)
    await soon(asyncio.gather(*queue.come(0, 1, 2)))
    for _ in range(3):
        await asyncio.sleep(0)
    assert not queue.turns._scheduled
    tasks = queue.come(3, 4)
    await asyncio.sleep(0)
    assert queue.order == [0, 1, 2, 3, 4]
    await soon(asyncio.gather(*tasks))
