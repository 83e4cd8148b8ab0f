"""Batches of new requests, each with a bounded share of the loop's time: docs/event-loop.md.

Requests that arrive together are prepared together: work that is repeated finds its code and
tables in the CPU's caches, and the messages to an engine leave in one go. Batches are small at
first, so that the first requests do not wait for the rest, and twice as large each time while
more wait. Between two batches the loop serves streams and the engines of other models.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

from llmserve.api.schedule import SCHEDULE, Schedule


class RequestBatcher:
    def __init__(self, schedule: Schedule = SCHEDULE) -> None:
        self._schedule = schedule
        self._size = schedule.first_batch  # of the next batch
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._came = False  # a request, since the last look
        self._since_s = 0.0
        self._looking = False

    async def join(self) -> None:
        """Return with the others of a batch: when it is full, or no more requests have come."""
        loop = asyncio.get_running_loop()
        if not self._looking:
            self._looking = True
            self._since_s = time.monotonic()
            loop.call_soon(self._admit_some)
        self._came = True
        waiting = loop.create_future()
        self._waiting.append(waiting)
        await waiting

    def _admit_some(self) -> None:
        """Once per iteration of the loop, while any wait."""
        came, self._came = self._came, False
        held_s = time.monotonic() - self._since_s
        try:
            if not came or len(self._waiting) >= self._size or held_s >= self._schedule.batch_s:
                self._admit_batch()
        finally:  # also after a failure, the rest is admitted
            self._looking = bool(self._waiting)
            if self._looking:
                asyncio.get_running_loop().call_soon(self._admit_some)
            else:
                self._size = self._schedule.first_batch

    def _admit_batch(self) -> None:
        left, self._size = self._size, min(2 * self._size, self._schedule.largest_batch)
        while self._waiting and left:
            waiting = self._waiting.popleft()
            if not waiting.done():  # its client has left
                waiting.set_result(None)
                left -= 1
        self._since_s = time.monotonic()
