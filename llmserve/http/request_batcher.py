"""Groups of new requests, so that each has a bounded share of the loop's time.

Requests that come together are prepared together: what is done for many one after another
finds its code and tables in the CPU's caches, and their messages to an engine leave as one
batch. Groups are small at first, so that those who come first need not wait for the rest,
and twice as large each time while more wait. Between two groups running streams and the
other models' engines are looked after.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

SMALLEST, LARGEST = 4, 64  # requests of a group
HOLD_S = 0.008  # from the first of a group to the last, at most


class RequestBatcher:
    def __init__(self, smallest: int = SMALLEST, largest: int = LARGEST) -> None:
        self._smallest, self._largest = smallest, largest
        self._size = smallest  # of the next group
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._came = False  # a request, since the last look
        self._since_s = 0.0
        self._looking = False

    async def take(self) -> None:
        """Returns with the others of its group: when it is full, or no more have come."""
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
        """Once a turn of the loop, while any wait."""
        came, self._came = self._came, False
        held_s = time.monotonic() - self._since_s
        try:
            if not came or len(self._waiting) >= self._size or held_s >= HOLD_S:
                self._admit_batch()
        finally:  # whatever fails, those that are left have their turn
            self._looking = bool(self._waiting)
            if self._looking:
                asyncio.get_running_loop().call_soon(self._admit_some)
            else:
                self._size = self._smallest

    def _admit_batch(self) -> None:
        left, self._size = self._size, min(2 * self._size, self._largest)
        while self._waiting and left:
            waiting = self._waiting.popleft()
            if not waiting.done():  # its client has left
                waiting.set_result(None)
                left -= 1
        self._since_s = time.monotonic()
