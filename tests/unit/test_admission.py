from __future__ import annotations

import asyncio
import math
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.errors import DeadlineExceeded, EngineDead, LLMServeError, Overloaded
from llmserve.lifecycle import admission
from llmserve.lifecycle.admission import AdmissionQueue, Deadline, ServiceRate
from tests.fakes import cancel, lease_of, soon, until

if TYPE_CHECKING:
    from collections.abc import Sequence


class Clock:
    """`time.monotonic`, which stands still."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(admission, "time", made)
    return made


class FakeLease:
    """The lease of a request."""

    def __init__(self, request: str, slots: AdmissionQueue[str, FakeLease]) -> None:
        self.request = request
        self.released = 0
        self._slots = slots
        slots.take_slot()

    def release(self) -> None:
        self.released += 1
        self._slots.release_slot()


class Queue:
    """A model's slots, and requests that wait for them."""

    def __init__(self, limit: int = 1, longest: int = 9) -> None:
        self.slots: AdmissionQueue[str, FakeLease] = AdmissionQueue("chat", limit, longest)
        self.admitted: list[str] = []
        self.given: list[FakeLease] = []

    def enter(self, request: str) -> FakeLease:
        self.admitted.append(request)
        self.given.append(FakeLease(request, self.slots))
        return self.given[-1]

    def advance(self) -> None:
        self.slots.advance(self.enter)

    async def join(self, request: str, deadline: Deadline | None = None) -> asyncio.Task[FakeLease]:
        place = self.slots.join(deadline or Deadline(), request)
        waiting = asyncio.create_task(lease_of(place))
        await asyncio.sleep(0)
        return waiting


# --- slots


@given(limit=st.integers(1, 5), takes=st.lists(st.booleans(), max_size=60))
def test_in_flight_stays_between_zero_and_the_limit(limit: int, takes: list[bool]) -> None:
    """Each step takes a slot if one is free, or releases one."""
    slots: AdmissionQueue[str, FakeLease] = AdmissionQueue("chat", limit, 0)
    held = 0
    for take in takes:
        if take and slots.free:
            slots.take_slot()
            held += 1
        elif take:
            with pytest.raises(Overloaded):
                slots.raise_if_full(Deadline(), 0)
        elif held:
            slots.release_slot()
            held -= 1
        assert slots.in_flight == held
        assert slots.free == (held < limit)


# --- the queue


async def test_new_request_does_not_pass_queued_ones() -> None:
    queue = Queue(limit=2)
    for _ in range(2):
        queue.slots.take_slot()
    waiting = await queue.join("first")
    queue.slots.release_slot()
    assert not queue.slots.free  # the slot is the first one's
    queue.advance()
    assert (await soon(waiting)).request == "first"
    queue.slots.release_slot()
    assert queue.slots.free


async def test_queued_requests_are_admitted_in_order_of_arrival() -> None:
    queue = Queue()
    waiting = [await queue.join(name) for name in "abc"]
    assert queue.slots.waiting() == 3
    queue.advance()
    assert queue.admitted == ["a"]
    for each in waiting:
        (await soon(each)).release()
        queue.advance()
    assert queue.admitted == ["a", "b", "c"]
    assert (queue.slots.waiting(), queue.slots.in_flight) == (0, 0)


async def test_as_many_are_admitted_as_there_are_slots() -> None:
    queue = Queue(limit=3)
    queue.slots.take_slot()
    for name in "abcd":
        await queue.join(name)
    queue.advance()
    assert queue.admitted == ["a", "b"]
    assert queue.slots.in_flight == 3
    queue.advance()
    assert queue.admitted == ["a", "b"]
    queue.slots.release_slot()
    queue.given[0].release()
    queue.advance()
    assert queue.admitted == ["a", "b", "c", "d"]


async def test_retried_request_has_its_old_position() -> None:
    queue = Queue()
    early = Deadline()
    for name in "bc":
        await queue.join(name)
    await queue.join("a, again", early)
    await queue.join("d")
    for _ in range(4):
        queue.advance()
        queue.given[-1].release()
    assert queue.admitted == ["a, again", "b", "c", "d"]


@given(st.permutations(range(6)))
def test_retries_in_any_order_keep_the_order_of_arrival(order: Sequence[int]) -> None:
    async def run() -> list[str]:
        queue = Queue(limit=9)
        deadlines = [Deadline() for _ in order]
        for each in order:
            await queue.join(str(each), deadlines[each])
        queue.advance()
        return queue.admitted

    assert asyncio.run(run()) == [str(each) for each in range(6)]


async def test_moved_queue_merges_by_arrival() -> None:
    old, new = Queue(), Queue(limit=9)
    waiting = [await (old if name in "ac" else new).join(name) for name in "abcd"]
    old.slots.move_to(new.slots)
    assert (old.slots.waiting(), new.slots.waiting()) == (0, 4)
    waiting[2].cancel()  # a moved request can leave
    await asyncio.sleep(0)
    new.advance()
    assert new.admitted == ["a", "b", "d"]


async def test_request_whose_lease_fails_is_refused_alone() -> None:
    queue = Queue(limit=9)
    waiting = [await queue.join(name) for name in "ab"]

    def enter(request: str) -> FakeLease:
        if request == "a":
            raise EngineDead("gone")
        return queue.enter(request)

    queue.slots.advance(enter)
    with pytest.raises(EngineDead, match="gone"):
        await soon(waiting[0])
    assert (await soon(waiting[1])).request == "b"
    assert queue.slots.in_flight == 1


async def test_refused_queue_gets_an_error_each() -> None:
    queue = Queue()
    waiting = [await queue.join(name) for name in "ab"]
    made: list[LLMServeError] = []

    def refused() -> LLMServeError:
        made.append(EngineDead("gone"))
        return made[-1]

    queue.slots.refuse(refused)
    for each in waiting:
        with pytest.raises(EngineDead, match="gone"):
            await soon(each)
    assert len(made) == 2  # one for each: an error that is raised holds its traceback
    assert (queue.slots.waiting(), queue.slots.in_flight) == (0, 0)


# --- requests that leave


async def test_request_that_left_the_queue_is_not_admitted() -> None:
    queue = Queue()
    waiting = [await queue.join(name) for name in "ab"]
    waiting[0].cancel()
    await asyncio.wait(waiting[:1])
    assert queue.slots.waiting() == 1
    queue.advance()
    assert (await soon(waiting[1])).request == "b"
    assert queue.admitted == ["b"]


@pytest.mark.parametrize("timeout_s", [None, 60.0])
async def test_request_admitted_as_it_leaves_releases_its_slot(timeout_s: float | None) -> None:
    queue = Queue()
    waiting = await queue.join("a", Deadline(timeout_s))
    queue.advance()
    await cancel(waiting)
    if not waiting.cancelled():  # `wait_for` gives what is there all the same
        waiting.result().release()
    assert queue.given[0].released == 1
    assert queue.slots.in_flight == 0


async def test_slot_of_a_request_that_left_goes_to_the_next() -> None:
    queue = Queue()
    waiting = [await queue.join(name) for name in "ab"]
    waiting[0].cancel()  # and has not run since
    queue.advance()
    await asyncio.wait(waiting[:1])
    queue.advance()
    assert (await soon(waiting[1])).request == "b"
    assert queue.slots.in_flight == 1


# --- a queue that is full


async def test_full_queue_refuses_with_its_limits() -> None:
    queue = Queue(limit=2, longest=1)
    for _ in range(2):
        queue.slots.take_slot()
    queue.slots.raise_if_full(Deadline(), 0)
    await queue.join("a")
    with pytest.raises(Overloaded) as refused:
        queue.slots.raise_if_full(Deadline(), 0)
    assert refused.value.message == (
        "The model `chat` has 2 requests in flight and 1 in its queue, its max_in_flight and "
        "max_queue; try again."
    )
    assert refused.value.code == "overloaded"
    assert refused.value.headers() == {"retry-after": "1"}


async def test_retry_after_follows_the_completion_rate(clock: Clock) -> None:
    queue = Queue(limit=1, longest=1)
    for _ in range(admission._ENOUGH):
        queue.slots.take_slot()
        clock.now += 2.0
        queue.slots.release_slot()
    queue.slots.take_slot()
    await queue.join("a")
    with pytest.raises(Overloaded) as refused:
        queue.slots.raise_if_full(Deadline(), 10.0)
    # Of eight ends in 14 busy seconds; two requests to wait for, and the model first.
    assert refused.value.retry_after_s == 10 + math.ceil(2 * 14 / 8)
    clock.now += 10_000
    with pytest.raises(Overloaded) as refused:
        queue.slots.raise_if_full(Deadline(), 10.0)
    assert refused.value.retry_after_s == 600  # at most ten minutes


def test_few_requests_give_no_completion_rate(clock: Clock) -> None:
    rate = ServiceRate()
    rate.begin()
    for _ in range(admission._ENOUGH - 1):
        rate.record_completion()
        clock.now += 1.0
    assert rate.seconds(5) is None
    rate.record_completion()
    assert rate.seconds(8) == pytest.approx(7.0)


def test_completion_rate_of_a_halted_model_falls(clock: Clock) -> None:
    rate = ServiceRate()
    rate.begin()
    for gap_s in [100.0] * 10 + [1.0] * admission._RECENT:
        clock.now += gap_s
        rate.record_completion()
    assert rate.seconds(64) == pytest.approx(63.0)
    clock.now += 63.0
    assert rate.seconds(64) == pytest.approx(126.0)


# --- deadlines


async def test_unreachable_deadline_is_refused_at_once(clock: Clock) -> None:
    slots = Queue(limit=1).slots
    with pytest.raises(Overloaded) as refused:
        slots.raise_if_full(Deadline(3.0), 4.5)
    assert refused.value.code == "deadline_unreachable"
    assert re.search(
        r"needs 4\.5 s .* more than the 3\.0 s until its deadline", refused.value.message
    )
    assert refused.value.retry_after_s == 5
    slots.raise_if_full(Deadline(4.5), 4.5)
    slots.raise_if_full(Deadline(), 1e9)


async def test_queued_requests_count_for_the_deadline(clock: Clock) -> None:
    queue = Queue(limit=1)
    for _ in range(admission._ENOUGH):
        queue.slots.take_slot()
        clock.now += 1.0
        queue.slots.release_slot()
    queue.slots.take_slot()
    needs_s = 3 * 7 / 8 * admission._MARGIN  # one in flight, one in the queue, and this one
    await queue.join("a")
    queue.slots.raise_if_full(Deadline(needs_s + 0.01), 0)
    with pytest.raises(Overloaded, match=r"needs 2\.9 s for this request"):
        queue.slots.raise_if_full(Deadline(needs_s - 0.01), 0)
    clock.now += 100
    queue.slots.release_slot(whole=False)
    clock.now += 1000  # without requests
    queue.slots.take_slot()
    queue.slots.raise_if_full(Deadline(3 * 107 / 8 * admission._MARGIN + 0.01), 0)


async def test_deadline_in_the_queue_ends_the_wait() -> None:
    queue = Queue()
    late, patient = await queue.join("late", Deadline(0.01)), await queue.join("patient")
    with pytest.raises(DeadlineExceeded) as ended:
        await soon(late)
    assert ended.value.message == "The request took longer than its 0.01 s."
    assert (ended.value.status, ended.value.code) == (504, "deadline_exceeded")
    assert queue.slots.waiting() == 1
    queue.advance()
    assert (await soon(patient)).request == "patient"
    assert queue.slots.in_flight == 1


async def test_passed_deadline_does_not_wait() -> None:
    queue = Queue()
    deadline = Deadline(1e-9)
    await until(lambda: deadline.left_s < 0)
    with pytest.raises(DeadlineExceeded):
        await soon(lease_of(queue.slots.join(deadline, "late")))
    assert queue.slots.waiting() == 0


def test_request_without_a_timeout_has_no_deadline() -> None:
    assert Deadline().left_s == math.inf


def test_deadlines_are_numbered_by_arrival() -> None:
    first, second = Deadline(), Deadline(9.0)
    assert first.number < second.number
