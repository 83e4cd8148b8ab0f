from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import Response

from llmserve.errors import EngineError, RequestError
from llmserve.lifecycle.response_store import EVENT_BYTES, Archive, ResponseStore, owned_by, size_of
from tests.fakes import soon

KIB = "x" * 1024


@pytest.fixture
def responses() -> ResponseStore:
    return ResponseStore()


def handler_of(responses: ResponseStore) -> Any:
    """vLLM's, with the dictionaries that it has been given."""
    handler = SimpleNamespace()
    responses.keep_for(handler, lambda stored: Response(str(stored)))
    return handler


def answer(status: str = "completed", text: str = "") -> Any:
    return SimpleNamespace(status=status, text=text)


def store(handler: Any, response_id: str, text: str = "") -> None:
    """As vLLM does: the messages, then the answer."""
    handler.msg_store[response_id] = [{"role": "user", "content": text}]
    handler.response_store[response_id] = answer(text=text)


class Stream:
    """A response in the background, as vLLM runs one with `stream: true`."""

    def __init__(self, handler: Any, response_id: str = "r") -> None:
        self.handler, self.id = handler, response_id
        self.events: list[Any] = []
        self.signal = asyncio.Event()
        self.ends: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        handler.response_store[response_id] = answer("queued")
        self.task = asyncio.create_task(self._run())
        handler.background_tasks[response_id] = self.task
        self.task.add_done_callback(lambda _: handler.background_tasks.pop(response_id, None))

    async def _run(self) -> None:
        self.handler.event_store[self.id] = (self.events, self.signal)
        try:
            await self.ends
            self.handler.response_store[self.id] = answer()
        finally:
            self.signal.set()

    def write(self, event: str) -> None:
        self.events.append(event)
        self.signal.set()


async def all_of(responses: ResponseStore, *, after: int | None = None) -> list[Any]:
    return [event async for event in responses.replay("r", after)]


# --- what is kept


def test_parts_of_a_response_are_evicted_together() -> None:
    responses = ResponseStore(limit=2)
    handler = handler_of(responses)
    for n in range(4):
        store(handler, str(n))
    for n, there in enumerate((False, False, True, True)):
        assert responses.has(str(n), "") is there
        assert (handler.msg_store.get(str(n)) is not None) is there
        assert (str(n) in handler.msg_store) is there
    with pytest.raises(KeyError):
        handler.msg_store["0"]


def test_archive_bounds_bytes_of_all_models() -> None:
    archive = Archive(64 * 1024)
    models = [archive.new_store() for _ in range(3)]
    handlers = [handler_of(each) for each in models]
    for n in range(90):
        store(handlers[n % 3], str(n), KIB * (1 + n % 4))
    held = sum(each.size for each in models)
    assert 32 * 1024 < held <= 64 * 1024
    kept = [n for n in range(90) if models[n % 3].has(str(n), "")]
    assert kept == list(range(kept[0], 90)), "the oldest go first, whichever model's"


def test_archive_evicts_one_that_is_larger_than_all() -> None:
    archive = Archive(10_000)
    responses = archive.new_store()
    store(handler_of(responses), "r", KIB * 20)
    assert responses.size == 0


def test_archive_does_not_count_a_removed_model() -> None:
    archive = Archive(10_000)
    left = archive.new_store()
    store(handler_of(left), "r", KIB * 8)
    del left
    other = archive.new_store()
    store(handler_of(other), "r", KIB * 4)
    assert other.has("r", "")


async def test_response_that_runs_is_never_evicted() -> None:
    responses = ResponseStore(limit=1)
    handler = handler_of(responses)
    running = Stream(handler)
    for n in range(5):
        store(handler, str(n))
    assert responses.has("r", "")
    running.ends.set_result(None)
    await soon(asyncio.wait({running.task}))
    await asyncio.sleep(0)
    store(handler, "last")
    assert not responses.has("r", "")


async def test_events_of_a_stream_count() -> None:
    responses = Archive(100 * EVENT_BYTES).new_store()
    running = Stream(handler_of(responses))
    await asyncio.sleep(0)
    for _ in range(200):
        running.write("event")
    assert responses.size >= 200 * EVENT_BYTES
    running.ends.set_result(None)
    await soon(asyncio.wait({running.task}))
    for _ in range(2):
        await asyncio.sleep(0)
    store(running.handler, "next")
    assert not responses.has("r", "")
    assert responses.has("next", "")


@given(
    st.recursive(st.text() | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_size_of_a_value_is_no_less_than_its_text(value: Any) -> None:
    def text(of: Any) -> int:
        if isinstance(of, dict):
            return sum(text(each) for each in (*of, *of.values()))
        return sum(map(text, of)) if isinstance(of, list) else len(str(of)) if of else 0

    assert size_of([value]) >= 0
    unique = [value, "y" * 5000]
    assert size_of(unique) >= 5000
    circle: list[Any] = [value]
    circle.append(circle)
    assert size_of(circle) < size_of([value]) + 1000 + text(value)


# --- whose it is


def test_response_is_its_owners_alone(responses: ResponseStore) -> None:
    handler = handler_of(responses)
    with owned_by("a"):
        store(handler, "r")
    assert responses.has("r", "a")
    assert not responses.has("r", "b")
    assert not responses.has("r", "")
    with owned_by("b"):  # an answer is stored where another request runs
        handler.response_store["r"] = answer()
    assert responses.has("r", "a")


def test_messages_without_a_response_are_not_found(responses: ResponseStore) -> None:
    handler_of(responses).msg_store["r"] = []
    assert not responses.has("r", "")


# --- replays end


async def test_replay_yields_events_as_they_are_stored(responses: ResponseStore) -> None:
    running = Stream(handler_of(responses))
    replaying = asyncio.create_task(all_of(responses))
    late = asyncio.create_task(all_of(responses, after=0))
    for event in "abc":
        running.write(event)
        await asyncio.sleep(0)
    running.ends.set_result(None)
    assert await soon(replaying) == ["a", "b", "c"]
    assert await soon(late) == ["b", "c"]
    assert await soon(all_of(responses)) == ["a", "b", "c"]


async def test_replay_of_cancelled_response_ends(responses: ResponseStore) -> None:
    running = Stream(handler_of(responses))
    replaying = asyncio.create_task(all_of(responses))
    await asyncio.sleep(0)
    running.write("a")
    for _ in range(2):
        await soon(responses.cancel("r"))
    assert await soon(replaying) == ["a"]
    assert running.task.cancelled()
    assert responses.part("r", "response").status == "cancelled"


async def test_replay_of_failed_response_ends_in_an_error(
    responses: ResponseStore, caplog: pytest.LogCaptureFixture
) -> None:
    running = Stream(handler_of(responses))
    replaying = asyncio.create_task(all_of(responses))
    await asyncio.sleep(0)
    running.ends.set_exception(RuntimeError("no more"))
    with pytest.raises(EngineError):
        await soon(replaying)
    assert responses.part("r", "response").status == "failed"
    assert "response r failed" in caplog.text


async def test_replay_of_response_that_was_not_streamed_is_refused(
    responses: ResponseStore,
) -> None:
    store(handler_of(responses), "r")
    with pytest.raises(RequestError, match="not streamed"):
        await soon(all_of(responses))


async def test_deleted_response_is_gone(responses: ResponseStore) -> None:
    store(handler_of(responses), "r")
    await soon(responses.delete("r"))
    assert not responses.has("r", "")
    assert responses.size == 0


async def test_deleted_response_in_background_is_ended_first(responses: ResponseStore) -> None:
    """Else the task would store the response again at its end."""
    handler = handler_of(responses)
    running = Stream(handler)
    await asyncio.sleep(0)
    await soon(responses.delete("r"))
    assert running.task.cancelled()
    assert not responses.has("r", "")


async def test_cancel_of_completed_response_is_refused(responses: ResponseStore) -> None:
    store(handler_of(responses), "r")
    with pytest.raises(RequestError, match="Cannot cancel"):
        await soon(responses.cancel("r"))
