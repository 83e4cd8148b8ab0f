"""A bounded share of the loop's turns for new requests.

Preparing a request takes a fraction of a millisecond in which nothing else runs. When
hundreds come at once, they are let in a few per turn, first come first served, so that
running streams and the other models' engines are looked after in between.
"""

from __future__ import annotations

import asyncio
from collections import deque

PER_TURN = 8


class Turns:
    def __init__(self, per_turn: int = PER_TURN) -> None:
        self._per_turn = per_turn
        self._left = per_turn
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._scheduled = False

    async def take(self) -> None:
        """Returns at once, unless this turn has had its share."""
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)
        if self._left > 0 and not self._waiting:
            self._left -= 1
            return
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        await waiting

    def _turn(self) -> None:
        """A new turn: let the next ones in."""
        self._left = self._per_turn
        while self._waiting and self._left:
            waiting = self._waiting.popleft()
            if not waiting.done():  # its client has left
                waiting.set_result(None)
                self._left -= 1
        self._scheduled = self._left < self._per_turn
        if self._scheduled:
            asyncio.get_running_loop().call_soon(self._turn)
