"""Who may enter a model and who waits: slots, a line in order of arrival, its pace."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from llmserve.errors import DeadlineExceeded, Overloaded, quoted

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmserve.errors import LLMServeError


class Held(Protocol):
    def release(self) -> None: ...


T = TypeVar("T", bound=Held)
W = TypeVar("W")

_RECENT = 64  # requests by which the pace is told
_ENOUGH = 8  # of them before it is
_MARGIN = 1.1  # of what a request will take, for those that are longer than others
_LONGEST_S = 600.0  # that anybody is told to wait
_NUMBERS = itertools.count()


class Pace:
    """How fast a model gets through its requests, by those that ended last.

    Time without requests does not count.
    """

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=_RECENT)
        self._idle_s = 0.0
        self._rests_since: float | None = time.monotonic()

    def _now(self) -> float:
        now = time.monotonic() if self._rests_since is None else self._rests_since
        return now - self._idle_s

    def begins(self) -> None:
        """There are requests again."""
        if self._rests_since is not None:
            self._idle_s += time.monotonic() - self._rests_since
            self._rests_since = None

    def rests(self) -> None:
        """There are none."""
        self._rests_since = time.monotonic()

    def ended(self) -> None:
        self._ends.append(self._now())

    def seconds(self, requests: int) -> float | None:
        """What so many will take; None: too few have ended to tell."""
        if len(self._ends) < _ENOUGH:
            return None
        # Up to now: a model that has come to a halt has not kept its pace.
        return requests * (self._now() - self._ends[0]) / len(self._ends)


class Deadline:
    """When a request must be done; `timeout_s` of None: never."""

    def __init__(self, timeout_s: float | None = None) -> None:
        self.timeout_s = timeout_s
        self.at = math.inf if timeout_s is None else time.monotonic() + timeout_s
        self.number = next(_NUMBERS)  # of its arrival

    @property
    def left_s(self) -> float:
        return self.at - time.monotonic()

    def exceeded(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"The request took longer than its {self.timeout_s:g} s.")


class _Place(Generic[W, T]):
    """Somebody in the line, until given what he waits for."""

    def __init__(self, deadline: Deadline, wish: W) -> None:
        self.number = deadline.number
        self.wish = wish
        self.given: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._line: list[_Place[W, T]] = []

    def stand_in(self, line: list[_Place[W, T]]) -> None:
        self._line = line
        bisect.insort(line, self, key=lambda each: each.number)

    def leave(self) -> None:
        """What was given in the moment of leaving goes back."""
        if self in self._line:
            self._line.remove(self)
        elif self.given.done() and not self.given.cancelled() and not self.given.exception():
            self.given.result().release()


class Slots(Generic[W, T]):
    """The requests a model has in flight, at most `limit`, and those that wait for a slot."""

    def __init__(self, model: str, limit: int, longest: int) -> None:
        self.model = model
        self.limit = limit
        self.longest = longest  # line
        self.in_flight = 0
        self.pace = Pace()
        self._line: list[_Place[W, T]] = []

    def count(self) -> int:
        return self.in_flight

    def waiting(self) -> int:
        return len(self._line)

    @property
    def free(self) -> bool:
        """Whether somebody who comes now need not wait."""
        return self.in_flight < self.limit and not self._line

    def take(self) -> Slot:
        self.pace.begins()
        self.in_flight += 1
        return Slot(self)

    def left(self, *, whole: bool) -> None:
        self.in_flight -= 1
        if whole:  # one that was cut off says nothing of the pace
            self.pace.ended()
        if not self.in_flight:
            self.pace.rests()

    def unless_full(self, deadline: Deadline, ready_in_s: float) -> None:
        """Raises Overloaded if the line is full, or too long for the request's deadline."""
        wait_s = ready_in_s + (self.pace.seconds(len(self._line) + 1) or 0.0)
        everybody = len(self._line) + self.in_flight + 1
        done_s = ready_in_s + (self.pace.seconds(everybody) or 0.0) * _MARGIN
        if len(self._line) >= self.longest:
            raise Overloaded(
                f"The model {quoted(self.model)} has {self.in_flight} requests in flight and "
                f"{len(self._line)} that wait, its max_in_flight and max_queue; try again.",
                retry_after_s=_whole(wait_s),
            )
        if done_s > deadline.left_s:
            raise Overloaded(
                f"The model {quoted(self.model)} would be done with this request in {done_s:.1f} s, "
                f"later than the {deadline.left_s:.1f} s that it has left; try again.",
                retry_after_s=_whole(wait_s),
                code="deadline_unreachable",
            )

    async def wait(self, deadline: Deadline, wish: W) -> T:
        """What `advance` gives for the wish when it is this one's turn, in order of arrival.

        Raises DeadlineExceeded, or what `advance` was made to raise.
        """
        place: _Place[W, T] = _Place(deadline, wish)
        place.stand_in(self._line)
        left_s = deadline.left_s
        try:
            return await asyncio.wait_for(place.given, None if left_s == math.inf else left_s)
        except BaseException as error:
            place.leave()
            if isinstance(error, TimeoutError):
                raise deadline.exceeded() from None
            raise

    def move_to(self, other: Slots[W, T]) -> None:
        """The whole line goes over, and waits there in order of arrival."""
        for place in self._line:
            place.stand_in(other._line)
        self._line.clear()

    def advance(self, enter: Callable[[W], T]) -> None:
        """Let in whoever is first, as long as there are slots."""
        while self._line and self.in_flight < self.limit:
            place = self._line.pop(0)
            if place.given.done():  # has left
                continue
            try:
                place.given.set_result(enter(place.wish))
            except Exception as error:
                place.given.set_exception(error)

    def refuse(self, error: Callable[[], LLMServeError]) -> None:
        """Send the whole line away."""
        for place in self._line:
            if not place.given.done():
                place.given.set_exception(error())
        self._line.clear()


class Slot:
    """A place that is given back once, however often it is left."""

    def __init__(self, slots: Slots[Any, Any]) -> None:
        self._slots: Slots[Any, Any] | None = slots

    def release(self, *, whole: bool = True) -> None:
        if self._slots is not None:
            slots, self._slots = self._slots, None
            slots.left(whole=whole)


def _whole(seconds: float) -> int:
    return max(1, math.ceil(min(seconds, _LONGEST_S)))
