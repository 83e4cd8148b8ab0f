from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from llmserve.lifecycle import events
from llmserve.lifecycle.events import Event, Events
from llmserve.lifecycle.replica import Replica, State
from tests.fakes import replica, soon, spec

if TYPE_CHECKING:
    import pytest


def moved(source: Events, state: State, note: str = "", *, of: Replica | None = None) -> None:
    one = of or replica(spec())
    before, one.state, one.note = one.state, state, note
    source.publish(one, before)


class Listener:
    """From its making on."""

    def __init__(self, source: Events) -> None:
        self._events = source.listen()
        self._next: asyncio.Future[Event] = asyncio.ensure_future(anext(self._events))

    async def next(self) -> Event:
        event = await soon(self._next)
        self._next = asyncio.ensure_future(anext(self._events))
        await asyncio.sleep(0)
        return event

    async def leave(self) -> None:
        self._next.cancel()
        await asyncio.wait({self._next})


async def listening(source: Events) -> Listener:
    made = Listener(source)
    await asyncio.sleep(0)
    return made


async def test_event_has_all_fields_of_a_change() -> None:
    source = Events()
    listener = await listening(source)
    before_s = time.time()
    moved(source, State.FAILED, "no memory left", of=replica(spec("embed"), 3))
    event = await listener.next()
    assert before_s <= event.pop("at") <= time.time()
    assert event == {
        "model": "embed",
        "replica": 3,
        "from": "waiting",
        "to": "failed",
        "note": "no memory left",
    }
    await listener.leave()


async def test_listener_gets_all_later_events_in_order() -> None:
    source, one = Events(), replica(spec())
    first = await listening(source)
    moved(source, State.LOADING, of=one)
    second = await listening(source)
    moved(source, State.READY, of=one)
    assert [(await first.next())["to"] for _ in range(2)] == ["loading", "ready"]
    assert (await second.next())["to"] == "ready"
    await first.leave()
    moved(source, State.DRAINING, of=one)
    assert (await second.next())["to"] == "draining"
    await second.leave()
    assert source._listeners == set()


async def test_slow_listener_loses_the_oldest_and_gets_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "_KEPT", 2)
    source = Events()
    slow, quick = await listening(source), await listening(source)
    heard: list[str] = []
    for number in range(5):
        moved(source, State.LOADING, str(number))
        heard.append((await quick.next())["note"])
    assert heard == list("01234")
    await quick.leave()
    left = [await slow.next() for _ in range(3)]
    await slow.leave()
    # The first was on its way to it already.
    assert [(event["note"], event.get("lost")) for event in left] == [
        ("0", None),
        ("3", 2),
        ("4", None),
    ]
