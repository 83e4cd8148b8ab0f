"""Admission to a model: slots, a queue in order of arrival, the completion rate."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import math
import time
from collections import deque
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from llmserve.errors import DeadlineExceeded, Overloaded, quoted

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmserve.errors import LLMServeError


class Releasable(Protocol):
    def release(self) -> None: ...


T = TypeVar("T", bound=Releasable)
W = TypeVar("W")

_RECENT = 64  # requests that determine the completion rate
_ENOUGH = 8  # of them, before there is a rate
_MARGIN = 1.1  # on the expected duration of a request, for those that are longer than others
_LONGEST_S = 600.0  # of a Retry-After
_NUMBERS = itertools.count()


class ServiceRate:
    """The completion rate of a model over its last requests, idle time excluded."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=_RECENT)
        self._idle_s = 0.0
        self._idle_since: float | None = time.monotonic()

    def _now(self) -> float:
        now = time.monotonic() if self._idle_since is None else self._idle_since
        return now - self._idle_s

    def begin(self) -> None:
        """Record that a request runs."""
        if self._idle_since is not None:
            self._idle_s += time.monotonic() - self._idle_since
            self._idle_since = None

    def pause(self) -> None:
        """Record that no request runs."""
        self._idle_since = time.monotonic()

    def record_completion(self) -> None:
        self._ends.append(self._now())

    def seconds(self, requests: int) -> float | None:
        """The expected seconds for so many requests; None if too few have ended."""
        if len(self._ends) < _ENOUGH:
            return None
        # Up to now, so that the rate of a model that has halted falls.
        return requests * (self._now() - self._ends[0]) / len(self._ends)


class Deadline:
    """The arrival number of a request and the time when it must be done; None: no limit."""

    def __init__(self, timeout_s: float | None = None) -> None:
        self.timeout_s = timeout_s
        self.at = math.inf if timeout_s is None else time.monotonic() + timeout_s
        self.number = next(_NUMBERS)

    @property
    def left_s(self) -> float:
        return self.at - time.monotonic()

    def exceeded(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"The request took longer than its {self.timeout_s:g} s.")


class QueuedRequest(Generic[W, T]):
    """A request in the queue, until `given` has its lease or the error that refuses it.

    Its deadline is a timer here, independent of the task of the request.
    """

    def __init__(self, deadline: Deadline, request: W) -> None:
        loop = asyncio.get_running_loop()
        self.number = deadline.number
        self.request = request
        self.given: asyncio.Future[T] = loop.create_future()
        self.queue: AdmissionQueue[W, T] | None = None
        self._timer: asyncio.TimerHandle | None = None
        if deadline.timeout_s is not None:
            self._timer = loop.call_later(deadline.left_s, lambda: self.refuse(deadline.exceeded()))

    def admit(self, lease: Callable[[W], T]) -> None:
        """`lease` creates the lease of the request, or raises the error that refuses it."""
        try:
            given = lease(self.request)
        except Exception as error:
            self.refuse(error)
        else:
            self._leave_queue()
            self.given.set_result(given)

    def refuse(self, error: Exception) -> None:
        self._leave_queue()
        self.given.set_exception(error)

    def cancel(self) -> None:
        """Leave the queue; release a lease that was given meanwhile."""
        self._leave_queue()
        if not self.given.cancel() and self.given.exception() is None:
            self.given.result().release()

    def _leave_queue(self) -> None:
        if self.queue is not None:
            self.queue.remove(self)
        if self._timer is not None:
            self._timer.cancel()


class AdmissionQueue(Generic[W, T]):
    """The requests of a model in flight, at most `limit`, and the queue for its slots.

    `changed` is called in the step that may admit a request: it joined the queue, a slot was
    released, or the limit was raised. It advances the queue.
    """

    def __init__(
        self, model: str, limit: int, longest: int, changed: Callable[[], None] = lambda: None
    ) -> None:
        self.model = model
        self.limit = limit
        self.longest = longest  # queue
        self.in_flight = 0
        self.changed = changed
        self._rate = ServiceRate()
        self._queue: list[QueuedRequest[W, T]] = []
        self._emptied = asyncio.Event()  # set when the queue or the slots become empty

    def waiting(self) -> int:
        return len(self._queue)

    @property
    def free(self) -> bool:
        """Whether a new request can be admitted at once."""
        return self.in_flight < self.limit and not self._queue

    @property
    def is_busy(self) -> bool:
        """Whether requests wait or run."""
        return bool(self._queue or self.in_flight)

    async def wait_empty(self) -> None:
        """Return when no request waits."""
        while self._queue:
            self._emptied.clear()
            await self._emptied.wait()

    async def wait_idle(self) -> None:
        """Return when no request waits or runs."""
        while self.is_busy:
            self._emptied.clear()
            await self._emptied.wait()

    def resize(self, limit: int, longest: int) -> None:
        self.limit, self.longest = limit, longest
        self.changed()

    def take_slot(self) -> None:
        self._rate.begin()
        self.in_flight += 1

    def release_slot(self, *, whole: bool = True) -> None:
        """`whole`: the request was completed; only such requests count for the rate."""
        self.in_flight -= 1
        if whole:
            self._rate.record_completion()
        if not self.in_flight:
            self._rate.pause()
            self._emptied.set()
        self.changed()

    def raise_if_full(self, deadline: Deadline, ready_in_s: float) -> None:
        """Raises Overloaded if the queue is full, or too long for the request's deadline."""
        queued = len(self._queue)
        wait_s = ready_in_s + (self._rate.seconds(queued + 1) or 0.0)
        done_s = ready_in_s + (self._rate.seconds(queued + self.in_flight + 1) or 0.0) * _MARGIN
        if queued >= self.longest:
            raise Overloaded(
                f"The model {quoted(self.model)} has {self.in_flight} requests in flight and "
                f"{queued} in its queue, its max_in_flight and max_queue; try again.",
                retry_after_s=_whole(wait_s),
            )
        if done_s > deadline.left_s:
            raise Overloaded(
                f"The model {quoted(self.model)} needs {done_s:.1f} s for this request, more than "
                f"the {deadline.left_s:.1f} s until its deadline; try again.",
                retry_after_s=_whole(wait_s),
                code="deadline_unreachable",
            )

    def join(self, deadline: Deadline, request: W) -> QueuedRequest[W, T]:
        """Queue a request, in order of arrival."""
        queued: QueuedRequest[W, T] = QueuedRequest(deadline, request)
        self.insert(queued)
        self.changed()
        return queued

    def insert(self, queued: QueuedRequest[W, T]) -> None:
        queued.queue = self
        bisect.insort(self._queue, queued, key=lambda each: each.number)

    def remove(self, queued: QueuedRequest[W, T]) -> None:
        queued.queue = None
        self._queue.remove(queued)
        if not self._queue:
            self._emptied.set()

    def move_to(self, other: AdmissionQueue[W, T]) -> None:
        """Move the whole queue to another one, in order of arrival."""
        queue, self._queue = self._queue, []
        for queued in queue:
            other.insert(queued)
        self._emptied.set()
        other.changed()

    def advance(self, lease: Callable[[W], T]) -> None:
        """Admit queued requests, the first ones first, as long as there are slots."""
        while self._queue and self.in_flight < self.limit:
            self._queue[0].admit(lease)

    def refuse(self, error: Callable[[], LLMServeError]) -> None:
        """Refuse all queued requests, each with an error of its own."""
        while self._queue:
            self._queue[0].refuse(error())


def _whole(seconds: float) -> int:
    return max(1, math.ceil(min(seconds, _LONGEST_S)))
