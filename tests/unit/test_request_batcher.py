from __future__ import annotations

import asyncio
import itertools

from llmserve.api.schedule import SCHEDULE, Schedule
from llmserve.http.request_batcher import RequestBatcher
from tests.fakes import soon


class Queue:
    """Requests that join batches, and the order of their admission."""

    def __init__(self, group: int, largest: int = 0, *, batch_s: float = SCHEDULE.batch_s) -> None:
        schedule = Schedule(first_batch=group, largest_batch=largest or group, batch_s=batch_s)
        self.batcher = RequestBatcher(schedule)
        self.order: list[int] = []

    def come(self, *numbers: int) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self._take(number)) for number in numbers]

    async def _take(self, number: int) -> None:
        await self.batcher.join()
        self.order.append(number)

    async def until(self, count: int) -> list[int]:
        """The number of admitted requests after each event-loop iteration."""
        sizes = [len(self.order)]
        while sizes[-1] < count:
            assert len(sizes) < 50
            await asyncio.sleep(0)
            sizes.append(len(self.order))
        return sizes


async def test_single_request_waits_for_few_loop_iterations() -> None:
    queue = Queue(8)
    (task,) = queue.come(0)
    assert len(await queue.until(1)) <= 6
    await task


async def test_requests_of_successive_iterations_share_a_batch() -> None:
    queue = Queue(8, batch_s=60)
    tasks = []
    for number in range(5):
        tasks += queue.come(number)
        await asyncio.sleep(0)
        assert queue.order == []
    sizes = await queue.until(5)
    assert sizes[-2:] == [0, 5]
    await soon(asyncio.gather(*tasks))


async def test_batch_is_admitted_after_its_time() -> None:
    queue = Queue(8, batch_s=0.0)
    tasks = []
    for number in range(5):
        tasks += queue.come(number)
        await asyncio.sleep(0)
    assert len(queue.order) > 1
    await soon(asyncio.gather(*tasks))


async def test_batches_follow_the_order_of_arrival() -> None:
    queue = Queue(2)
    tasks = queue.come(*range(9))
    sizes = await queue.until(9)
    assert max(after - before for before, after in itertools.pairwise(sizes)) == 2
    assert queue.order == list(range(9))
    await soon(asyncio.gather(*tasks))


async def test_groups_grow_while_more_wait_and_begin_small_again() -> None:
    queue = Queue(2, 8)
    for first in (0, 25):
        tasks = queue.come(*range(first, first + 25))
        sizes = await queue.until(first + 25)
        groups = [after - before for before, after in itertools.pairwise(sizes) if after > before]
        assert groups == [2, 4, 8, 8, 3]
        await soon(asyncio.gather(*tasks))
    assert queue.order == list(range(50))


async def test_a_small_group_that_is_full_goes_though_more_come() -> None:
    queue = Queue(2, 8)
    tasks = queue.come(0, 1)
    await asyncio.sleep(0)
    tasks += queue.come(2)
    await asyncio.sleep(0)
    tasks += queue.come(3)
    await asyncio.sleep(0)
    assert queue.order == [0, 1]
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


async def test_later_request_does_not_overtake() -> None:
    queue = Queue(1)
    tasks = queue.come(0, 1, 2)
    await queue.until(1)
    tasks += queue.come(3)
    await soon(asyncio.gather(*tasks))
    assert queue.order == [0, 1, 2, 3]


async def test_cancelled_request_takes_no_place_in_a_batch() -> None:
    queue = Queue(1)
    tasks = queue.come(0, 1, 2, 3, 4)
    await asyncio.sleep(0)
    for task in tasks[1:4]:
        task.cancel()
    await soon(asyncio.wait(tasks))
    assert queue.order == [0, 4]
    assert [task.cancelled() for task in tasks] == [False, True, True, True, False]


async def test_request_after_cancelled_ones_is_admitted() -> None:
    queue = Queue(1)
    tasks = queue.come(0, 1, 2)
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await soon(asyncio.wait(tasks))
    await soon(asyncio.gather(*queue.come(3)))
    assert queue.order == [3]


async def test_idle_batcher_schedules_no_callback() -> None:
    queue = Queue(2)
    await soon(asyncio.gather(*queue.come(0, 1, 2)))
    for _ in range(3):
        await asyncio.sleep(0)
    assert not queue.batcher._scheduled
    await soon(asyncio.gather(*queue.come(3, 4)))
    assert queue.order == [0, 1, 2, 3, 4]


class Failing(RequestBatcher):
    """Its first group cannot be let in."""

    failed = False

    def _admit_batch(self) -> None:
        if not self.failed:
            self.failed = True
            raise RuntimeError("no batch")
        super()._admit_batch()


async def test_batches_after_a_failure_are_admitted() -> None:
    queue = Queue(4)
    queue.batcher = Failing()
    seen: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: seen.append(what["message"]))
    taking = queue.come(1, 2, 3)
    await soon(asyncio.gather(*taking))
    assert queue.order == [1, 2, 3]
    assert len(seen) == 1  # the loop tells what a callback raised
