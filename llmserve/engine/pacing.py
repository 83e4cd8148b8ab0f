"""Spreads simultaneous calls over event-loop iterations."""

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
    """An asynchronous function with a bound on the calls that begin per event-loop iteration.

    vLLM begins all prompts of a request in the same iteration.
    """

    def __init__(
        self, work: Callable[P, Awaitable[T]], per_iteration: int = SCHEDULE.renders
    ) -> None:
        self._work = work
        self._per_iteration = per_iteration
        self._remaining = per_iteration  # calls that may begin in this iteration
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __call__(self, *arguments: P.args, **named: P.kwargs) -> T:
        if self._remaining == self._per_iteration:
            asyncio.get_running_loop().call_soon(self._next_iteration)
        if self._remaining > 0 and not self._waiting:
            self._remaining -= 1
        else:
            admitted = asyncio.get_running_loop().create_future()
            self._waiting.append(admitted)
            await admitted
        return await self._work(*arguments, **named)

    def _next_iteration(self) -> None:
        """Admit waiting calls."""
        self._remaining = self._per_iteration
        while self._waiting and self._remaining > 0:
            admitted = self._waiting.popleft()
            if not admitted.done():  # its request was not cancelled
                admitted.set_result(None)
                self._remaining -= 1
        if self._remaining < self._per_iteration:
            asyncio.get_running_loop().call_soon(self._next_iteration)
