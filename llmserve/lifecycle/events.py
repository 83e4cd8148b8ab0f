"""Events of replicas, for every listener."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from llmserve.lifecycle.replica import Replica, State

_KEPT = 1000  # events for one who is slow to take them
Event = dict[str, Any]


class Events:
    """A slow listener loses the oldest, and is told how many."""

    def __init__(self) -> None:
        self._listeners: set[_Listener] = set()

    def publish(self, replica: Replica, before: State) -> None:
        event = {
            "at": time.time(),
            "model": replica.model.name,
            "replica": replica.number,
            "from": before.value,
            "to": replica.state.value,
            "note": replica.note,
        }
        for listener in self._listeners:
            listener.take(event)

    async def listen(self) -> AsyncIterator[Event]:
        """From now on; never ends by itself."""
        listener = _Listener()
        self._listeners.add(listener)
        try:
            while True:
                yield await listener.next()
        finally:
            self._listeners.discard(listener)


class _Listener:
    def __init__(self) -> None:
        self._events: asyncio.Queue[Event] = asyncio.Queue(_KEPT)
        self._lost = 0

    def take(self, event: Event) -> None:
        if self._events.full():
            self._events.get_nowait()
            self._lost += 1
        self._events.put_nowait(event)

    async def next(self) -> Event:
        event = await self._events.get()
        lost, self._lost = self._lost, 0
        return event | ({"lost": lost} if lost else {})
