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
    """`time.monotonic`, which stands still unless told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(admission, "time", made)
    return made


class Leave:
    """The lease of a request."""

    def __init__(self, request: str, slots: AdmissionQueue[str, Leave]) -> None:
        self.request = request
        self.released = 0
        self._slots = slots
        slots.take_slot()

    def release(self) -> None:
        self.released += 1
        self._slots.release_slot()


class Line:
    """A model's slots, and requests that wait for them."""

    def __init__(self, limit: int = 1, longest: int = 9) -> None:
        self.slots: AdmissionQueue[str, Leave] = AdmissionQueue("chat", limit, longest)
        self.let_in: list[str] = []
        self.given: list[Leave] = []

    def enter(self, wish: str) -> Leave:
        self.let_in.append(wish)
        self.given.append(Leave(wish, self.slots))
        return self.given[-1]

    def advance(self) -> None:
        self.slots.advance(self.enter)

    async def stand(self, wish: str, deadline: Deadline | None = None) -> asyncio.Task[Leave]:
        place = self.slots.join(deadline or Deadline(), wish)
        waiting = asyncio.create_task(lease_of(place))
        await asyncio.sleep(0)
        return waiting


# --- slots


@given(limit=st.integers(1, 5), takes=st.lists(st.booleans(), max_size=60))
def test_in_flight_stays_between_zero_and_the_limit(limit: int, takes: list[bool]) -> None:
    """Each step takes a slot if one is free, or releases one."""
    slots: AdmissionQueue[str, Leave] = AdmissionQueue("chat", limit, 0)
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


# --- the line


async def test_whoever_comes_while_others_wait_does_not_pass_them() -> None:
    line = Line(limit=2)
    for _ in range(2):
        line.slots.take_slot()
    waiting = await line.stand("first")
    line.slots.release_slot()
    assert not line.slots.free  # the slot is the first one's
    line.advance()
    assert (await soon(waiting)).request == "first"
    line.slots.release_slot()
    assert line.slots.free


async def test_those_who_wait_are_let_in_as_they_came() -> None:
    line = Line()
    waiting = [await line.stand(name) for name in "abc"]
    assert line.slots.waiting() == 3
    line.advance()
    assert line.let_in == ["a"]
    for each in waiting:
        (await soon(each)).release()
        line.advance()
    assert line.let_in == ["a", "b", "c"]
    assert (line.slots.waiting(), line.slots.in_flight) == (0, 0)


async def test_as_many_are_let_in_as_there_are_slots() -> None:
    line = Line(limit=3)
    line.slots.take_slot()
    for name in "abcd":
        await line.stand(name)
    line.advance()
    assert line.let_in == ["a", "b"]
    assert line.slots.in_flight == 3
    line.advance()
    assert line.let_in == ["a", "b"]
    line.slots.release_slot()
    line.given[0].release()
    line.advance()
    assert line.let_in == ["a", "b", "c", "d"]


async def test_a_request_that_comes_again_has_its_old_place() -> None:
    line = Line()
    early = Deadline()
    for name in "bc":
        await line.stand(name)
    await line.stand("a, again", early)
    await line.stand("d")
    for _ in range(4):
        line.advance()
        line.given[-1].release()
    assert line.let_in == ["a, again", "b", "c", "d"]


@given(st.permutations(range(6)))
def test_any_order_of_coming_again_leads_to_that_of_arrival(order: Sequence[int]) -> None:
    async def run() -> list[str]:
        line = Line(limit=9)
        deadlines = [Deadline() for _ in order]
        for each in order:
            await line.stand(str(each), deadlines[each])
        line.advance()
        return line.let_in

    assert asyncio.run(run()) == [str(each) for each in range(6)]


async def test_a_line_that_moves_to_another_s_mixes_in_by_arrival() -> None:
    old, new = Line(), Line(limit=9)
    waiting = [await (old if name in "ac" else new).stand(name) for name in "abcd"]
    old.slots.move_to(new.slots)
    assert (old.slots.waiting(), new.slots.waiting()) == (0, 4)
    waiting[2].cancel()  # and who moved can leave
    await asyncio.sleep(0)
    new.advance()
    assert new.let_in == ["a", "b", "d"]


async def test_a_wish_that_cannot_be_granted_fails_alone() -> None:
    line = Line(limit=9)
    waiting = [await line.stand(name) for name in "ab"]

    def enter(wish: str) -> Leave:
        if wish == "a":
            raise EngineDead("gone")
        return line.enter(wish)

    line.slots.advance(enter)
    with pytest.raises(EngineDead, match="gone"):
        await soon(waiting[0])
    assert (await soon(waiting[1])).request == "b"
    assert line.slots.in_flight == 1


async def test_a_line_that_is_sent_away_is_told_why() -> None:
    line = Line()
    waiting = [await line.stand(name) for name in "ab"]
    made: list[LLMServeError] = []

    def refused() -> LLMServeError:
        made.append(EngineDead("gone"))
        return made[-1]

    line.slots.refuse(refused)
    for each in waiting:
        with pytest.raises(EngineDead, match="gone"):
            await soon(each)
    assert len(made) == 2  # one for each: an error that is raised holds its traceback
    assert (line.slots.waiting(), line.slots.in_flight) == (0, 0)


# --- those who leave


async def test_whoever_leaves_the_line_is_not_lease_of() -> None:
    line = Line()
    waiting = [await line.stand(name) for name in "ab"]
    waiting[0].cancel()
    await asyncio.wait(waiting[:1])
    assert line.slots.waiting() == 1
    line.advance()
    assert (await soon(waiting[1])).request == "b"
    assert line.let_in == ["b"]


@pytest.mark.parametrize("timeout_s", [None, 60.0])
async def test_whoever_is_let_in_as_he_leaves_keeps_nothing(timeout_s: float | None) -> None:
    line = Line()
    waiting = await line.stand("a", Deadline(timeout_s))
    line.advance()
    await cancel(waiting)
    if not waiting.cancelled():  # `wait_for` gives what is there all the same
        waiting.result().release()
    assert line.given[0].released == 1
    assert line.slots.in_flight == 0


async def test_the_slot_of_one_who_left_unseen_goes_to_the_next() -> None:
    line = Line()
    waiting = [await line.stand(name) for name in "ab"]
    waiting[0].cancel()  # and has not run since
    line.advance()
    await asyncio.wait(waiting[:1])
    line.advance()
    assert (await soon(waiting[1])).request == "b"
    assert line.slots.in_flight == 1


# --- a line that is full


async def test_a_full_line_refuses_and_says_its_limits() -> None:
    line = Line(limit=2, longest=1)
    for _ in range(2):
        line.slots.take_slot()
    line.slots.raise_if_full(Deadline(), 0)
    await line.stand("a")
    with pytest.raises(Overloaded) as refused:
        line.slots.raise_if_full(Deadline(), 0)
    assert refused.value.message == (
        "The model `chat` has 2 requests in flight and 1 in its queue, its max_in_flight and "
        "max_queue; try again."
    )
    assert refused.value.code == "overloaded"
    assert refused.value.headers() == {"retry-after": "1"}


async def test_how_soon_to_try_again_is_told_by_the_pace(clock: Clock) -> None:
    line = Line(limit=1, longest=1)
    for _ in range(admission._ENOUGH):
        line.slots.take_slot()
        clock.now += 2.0
        line.slots.release_slot()
    line.slots.take_slot()
    await line.stand("a")
    with pytest.raises(Overloaded) as refused:
        line.slots.raise_if_full(Deadline(), 10.0)
    # Of eight ends in 14 busy seconds; two requests to wait for, and the model first.
    assert refused.value.retry_after_s == 10 + math.ceil(2 * 14 / 8)
    clock.now += 10_000
    with pytest.raises(Overloaded) as refused:
        line.slots.raise_if_full(Deadline(), 10.0)
    assert refused.value.retry_after_s == 600  # nobody is told to wait for hours


def test_a_few_requests_tell_no_pace(clock: Clock) -> None:
    pace = ServiceRate()
    pace.begin()
    for _ in range(admission._ENOUGH - 1):
        pace.record_completion()
        clock.now += 1.0
    assert pace.seconds(5) is None
    pace.record_completion()
    assert pace.seconds(8) == pytest.approx(7.0)


def test_the_pace_is_that_of_the_last_requests_and_slows_down_in_a_halt(clock: Clock) -> None:
    pace = ServiceRate()
    pace.begin()
    for gap_s in [100.0] * 10 + [1.0] * admission._RECENT:
        clock.now += gap_s
        pace.record_completion()
    assert pace.seconds(64) == pytest.approx(63.0)
    clock.now += 63.0
    assert pace.seconds(64) == pytest.approx(126.0)


# --- deadlines


async def test_one_that_cannot_be_reached_is_told_at_once(clock: Clock) -> None:
    slots = Line(limit=1).slots
    with pytest.raises(Overloaded) as refused:
        slots.raise_if_full(Deadline(3.0), 4.5)
    assert refused.value.code == "deadline_unreachable"
    assert re.search(
        r"needs 4\.5 s .* more than the 3\.0 s until its deadline", refused.value.message
    )
    assert refused.value.retry_after_s == 5
    slots.raise_if_full(Deadline(4.5), 4.5)
    slots.raise_if_full(Deadline(), 1e9)


async def test_those_in_the_line_count_for_the_deadline(clock: Clock) -> None:
    line = Line(limit=1)
    for _ in range(admission._ENOUGH):
        line.slots.take_slot()
        clock.now += 1.0
        line.slots.release_slot()
    line.slots.take_slot()
    needs_s = 3 * 7 / 8 * admission._MARGIN  # one in flight, one in the line, and this one
    await line.stand("a")
    line.slots.raise_if_full(Deadline(needs_s + 0.01), 0)
    with pytest.raises(Overloaded, match=r"needs 2\.9 s for this request"):
        line.slots.raise_if_full(Deadline(needs_s - 0.01), 0)
    clock.now += 100
    line.slots.release_slot(whole=False)
    clock.now += 1000  # without requests
    line.slots.take_slot()
    line.slots.raise_if_full(Deadline(3 * 107 / 8 * admission._MARGIN + 0.01), 0)


async def test_one_that_passes_in_the_line_ends_the_wait() -> None:
    line = Line()
    late, patient = await line.stand("late", Deadline(0.01)), await line.stand("patient")
    with pytest.raises(DeadlineExceeded) as ended:
        await soon(late)
    assert ended.value.message == "The request took longer than its 0.01 s."
    assert (ended.value.status, ended.value.code) == (504, "deadline_exceeded")
    assert line.slots.waiting() == 1
    line.advance()
    assert (await soon(patient)).request == "patient"
    assert line.slots.in_flight == 1


async def test_one_that_has_passed_does_not_wait_at_all() -> None:
    line = Line()
    deadline = Deadline(1e-9)
    await until(lambda: deadline.left_s < 0)
    with pytest.raises(DeadlineExceeded):
        await soon(lease_of(line.slots.join(deadline, "late")))
    assert line.slots.waiting() == 0


def test_no_deadline_is_never_over() -> None:
    assert Deadline().left_s == math.inf


def test_deadlines_are_numbered_as_they_come() -> None:
    first, second = Deadline(), Deadline(9.0)
    assert first.number < second.number
