"""State changes of replicas as events, for any number of listeners."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from llmserve.lifecycle.replica import Replica, State

_KEPT = 1000  # events of a slow listener
Event = dict[str, Any]


class Events:
    """A slow listener loses its oldest events; `lost` has their number."""

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
            listener.put(event)

    async def listen(self) -> AsyncIterator[Event]:
        """Events from now on, without end."""
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

    def put(self, event: Event) -> None:
        if self._events.full():
            self._events.get_nowait()
            self._lost += 1
        self._events.put_nowait(event)

    async def next(self) -> Event:
        event = await self._events.get()
        lost, self._lost = self._lost, 0
        return event | ({"lost": lost} if lost else {})
