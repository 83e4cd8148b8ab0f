"""Calls that come at once, spread over iterations of the loop."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Generic, ParamSpec, TypeVar

from llmserve.api.schedule import SCHEDULE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

P = ParamSpec("P")
T = TypeVar("T")


class PacedRendering(Generic[P, T]):
    """An asynchronous function with a bound on the calls that begin in one iteration of the loop.

    vLLM begins the prompts of one request all in the same iteration.
    """

    def __init__(
        self, work: Callable[P, Awaitable[T]], per_iteration: int = SCHEDULE.renders
    ) -> None:
        self._work = work
        self._per_iteration = per_iteration
        self._left = per_iteration  # calls that may begin in this iteration
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __call__(self, *arguments: P.args, **named: P.kwargs) -> T:
        if self._left == self._per_iteration:
            asyncio.get_running_loop().call_soon(self._next_iteration)
        if self._left > 0 and not self._waiting:
            self._left -= 1
        else:
            place = asyncio.get_running_loop().create_future()
            self._waiting.append(place)
            await place
        return await self._work(*arguments, **named)

    def _next_iteration(self) -> None:
        """Admit calls that wait."""
        self._left = self._per_iteration
        while self._waiting and self._left > 0:
            place = self._waiting.popleft()
            if not place.done():  # its request has not been cancelled
                place.set_result(None)
                self._left -= 1
        if self._left < self._per_iteration:
            asyncio.get_running_loop().call_soon(self._next_iteration)
