"""Batches of new requests, with a bounded share of each iteration: docs/event-loop.md.

Requests of one batch are prepared together. So code and tables stay in the CPU's caches, and
their messages to an engine leave together. The first batch is small, so that its requests
start early; each further one is twice as large. The loop serves streams between two batches.
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
        self._joined = False  # a request since the last iteration
        self._since_s = 0.0
        self._scheduled = False

    async def join(self) -> None:
        """Return with the batch: when it is full, or after an iteration without a new request."""
        loop = asyncio.get_running_loop()
        if not self._scheduled:
            self._scheduled = True
            self._since_s = time.monotonic()
            loop.call_soon(self._admit_some)
        self._joined = True
        waiting = loop.create_future()
        self._waiting.append(waiting)
        await waiting

    def _admit_some(self) -> None:
        """Run in each event-loop iteration while requests wait."""
        joined, self._joined = self._joined, False
        held_s = time.monotonic() - self._since_s
        try:
            if not joined or len(self._waiting) >= self._size or held_s >= self._schedule.batch_s:
                self._admit_batch()
        finally:  # admits the rest after a failure too
            self._scheduled = bool(self._waiting)
            if self._scheduled:
                asyncio.get_running_loop().call_soon(self._admit_some)
            else:
                self._size = self._schedule.first_batch

    def _admit_batch(self) -> None:
        free, self._size = self._size, min(2 * self._size, self._schedule.largest_batch)
        while self._waiting and free:
            waiting = self._waiting.popleft()
            if not waiting.done():  # its client is connected
                waiting.set_result(None)
                free -= 1
        self._since_s = time.monotonic()
