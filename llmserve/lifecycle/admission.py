"""Admission to a model: slots, a queue in order of arrival, the completion rate."""

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


class Releasable(Protocol):
    def release(self) -> None: ...


T = TypeVar("T", bound=Releasable)
W = TypeVar("W")

_RECENT = 64  # requests by which the pace is told
_ENOUGH = 8  # of them before it is
_MARGIN = 1.1  # of what a request will take, for those that are longer than others
_LONGEST_S = 600.0  # that anybody is told to wait
_NUMBERS = itertools.count()


class ServiceRate:
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


class QueuedRequest(Generic[W, T]):
    """A request in the queue, until `given` is done: what it waits for, or why it gets nothing.

    Its deadline is a timer here, whatever the request's task does meanwhile.
    """

    def __init__(self, deadline: Deadline, wish: W) -> None:
        loop = asyncio.get_running_loop()
        self.number = deadline.number
        self.wish = wish
        self.given: asyncio.Future[T] = loop.create_future()
        self._queue: list[QueuedRequest[W, T]] = []
        self._timer: asyncio.TimerHandle | None = None
        if deadline.timeout_s is not None:
            self._timer = loop.call_later(deadline.left_s, lambda: self.refuse(deadline.exceeded()))

    def join(self, queue: list[QueuedRequest[W, T]]) -> None:
        self._queue = queue
        bisect.insort(queue, self, key=lambda each: each.number)

    def give(self, enter: Callable[[W], T]) -> None:
        """`enter` makes what it waits for, or raises why it gets nothing."""
        try:
            given = enter(self.wish)
        except Exception as error:
            self.refuse(error)
        else:
            self._leave_queue()
            self.given.set_result(given)

    def refuse(self, error: Exception) -> None:
        self._leave_queue()
        self.given.set_exception(error)

    def cancel(self) -> None:
        """What was given in the moment of leaving goes back."""
        self._leave_queue()
        if not self.given.cancel() and self.given.exception() is None:
            self.given.result().release()

    def _leave_queue(self) -> None:
        if self in self._queue:
            self._queue.remove(self)
        if self._timer is not None:
            self._timer.cancel()


class AdmissionQueue(Generic[W, T]):
    """The requests a model has in flight, at most `limit`, and the queue for its slots.

    `changed` is called in the same step as whatever may let a request in, and advances the
    queue: a place was taken, a slot given back, the limit raised.
    """

    def __init__(
        self, model: str, limit: int, longest: int, changed: Callable[[], None] = lambda: None
    ) -> None:
        self.model = model
        self.limit = limit
        self.longest = longest  # queue
        self.in_flight = 0
        self.pace = ServiceRate()
        self._queue: list[QueuedRequest[W, T]] = []
        self.changed = changed

    def count(self) -> int:
        return self.in_flight

    def waiting(self) -> int:
        return len(self._queue)

    @property
    def free(self) -> bool:
        """Whether a request that comes now need not wait."""
        return self.in_flight < self.limit and not self._queue

    def resize(self, limit: int, longest: int) -> None:
        self.limit, self.longest = limit, longest
        self.changed()

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
        self.changed()

    def raise_if_full(self, deadline: Deadline, ready_in_s: float) -> None:
        """Raises Overloaded if the queue is full, or too long for the request's deadline."""
        wait_s = ready_in_s + (self.pace.seconds(len(self._queue) + 1) or 0.0)
        everybody = len(self._queue) + self.in_flight + 1
        done_s = ready_in_s + (self.pace.seconds(everybody) or 0.0) * _MARGIN
        if len(self._queue) >= self.longest:
            raise Overloaded(
                f"The model {quoted(self.model)} has {self.in_flight} requests in flight and "
                f"{len(self._queue)} that wait, its max_in_flight and max_queue; try again.",
                retry_after_s=_whole(wait_s),
            )
        if done_s > deadline.left_s:
            raise Overloaded(
                f"The model {quoted(self.model)} would be done with this request in {done_s:.1f} s, "
                f"later than the {deadline.left_s:.1f} s that it has left; try again.",
                retry_after_s=_whole(wait_s),
                code="deadline_unreachable",
            )

    def join(self, deadline: Deadline, wish: W) -> QueuedRequest[W, T]:
        """A place in the queue, in order of arrival."""
        place: QueuedRequest[W, T] = QueuedRequest(deadline, wish)
        place.join(self._queue)
        self.changed()
        return place

    def move_to(self, other: AdmissionQueue[W, T]) -> None:
        """The whole queue goes over, and waits there in order of arrival."""
        queue, self._queue = self._queue, []
        for place in queue:
            place.join(other._queue)
        other.changed()

    def advance(self, enter: Callable[[W], T]) -> None:
        """Let in the first in the queue, as long as there are slots."""
        while self._queue and self.in_flight < self.limit:
            self._queue[0].give(enter)

    def refuse(self, error: Callable[[], LLMServeError]) -> None:
        """Send the whole queue away."""
        while self._queue:
            self._queue[0].refuse(error())


class Slot:
    """A place that is given back once, however often it is left."""

    def __init__(self, slots: AdmissionQueue[Any, Any]) -> None:
        self._slots: AdmissionQueue[Any, Any] | None = slots

    def release(self, *, whole: bool = True) -> None:
        if self._slots is not None:
            slots, self._slots = self._slots, None
            slots.left(whole=whole)


def _whole(seconds: float) -> int:
    return max(1, math.ceil(min(seconds, _LONGEST_S)))
