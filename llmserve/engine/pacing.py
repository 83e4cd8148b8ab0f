"""Calls that come at once, spread over turns of the loop."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Generic, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

P = ParamSpec("P")
T = TypeVar("T")

PER_TURN = 64


class PacedRendering(Generic[P, T]):
    """An asynchronous function of which no turn of the loop begins more than PER_TURN calls.

    vLLM begins the prompts of one request all in the same turn.
    """

    def __init__(self, work: Callable[P, Awaitable[T]]) -> None:
        self._work = work
        self._left = PER_TURN  # calls that may begin in this turn
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __call__(self, *arguments: P.args, **named: P.kwargs) -> T:
        if self._left == PER_TURN:
            asyncio.get_running_loop().call_soon(self._turn)
        if self._left > 0 and not self._waiting:
            self._left -= 1
        else:
            place = asyncio.get_running_loop().create_future()
            self._waiting.append(place)
            await place
        return await self._work(*arguments, **named)

    def _turn(self) -> None:
        """The next turn: let in those who wait."""
        self._left = PER_TURN
        while self._waiting and self._left > 0:
            place = self._waiting.popleft()
            if not place.done():  # its request has not been cancelled
                place.set_result(None)
                self._left -= 1
        if self._left < PER_TURN:
            asyncio.get_running_loop().call_soon(self._turn)
