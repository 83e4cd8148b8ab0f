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


def moved(told: Events, state: State, note: str = "", *, of: Replica | None = None) -> None:
    one = of or replica(spec())
    before, one.state, one.note = one.state, state, note
    told.publish(one, before)


class Listener:
    """From its making on."""

    def __init__(self, told: Events) -> None:
        self._events = told.listen()
        self._next: asyncio.Future[Event] = asyncio.ensure_future(anext(self._events))

    async def next(self) -> Event:
        event = await soon(self._next)
        self._next = asyncio.ensure_future(anext(self._events))
        await asyncio.sleep(0)
        return event

    async def leave(self) -> None:
        self._next.cancel()
        await asyncio.wait({self._next})


async def listening(told: Events) -> Listener:
    made = Listener(told)
    await asyncio.sleep(0)
    return made


async def test_a_change_is_told_whole() -> None:
    told = Events()
    listener = await listening(told)
    before_s = time.time()
    moved(told, State.FAILED, "no memory left", of=replica(spec("embed"), 3))
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


async def test_every_listener_hears_all_in_order_from_its_coming_on() -> None:
    told, one = Events(), replica(spec())
    first = await listening(told)
    moved(told, State.LOADING, of=one)
    second = await listening(told)
    moved(told, State.READY, of=one)
    assert [(await first.next())["to"] for _ in range(2)] == ["loading", "ready"]
    assert (await second.next())["to"] == "ready"
    await first.leave()
    moved(told, State.DRAINING, of=one)
    assert (await second.next())["to"] == "draining"
    await second.leave()
    assert told._listeners == set()


async def test_a_slow_listener_loses_the_oldest_and_is_told_how_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "_KEPT", 2)
    told = Events()
    slow, quick = await listening(told), await listening(told)
    heard: list[str] = []
    for number in range(5):
        moved(told, State.LOADING, str(number))
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
