"""The stored answers of /v1/responses: their owners and their memory.

vLLM keeps the answers of an engine without limit, in dictionaries of its handler.
`ResponseStore` replaces these dictionaries. It belongs to a model, so replicas share it and it
outlives engines; `Archive` bounds the bytes of all models. A response is evicted with its
messages and events, oldest first, and never while it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections import OrderedDict, deque
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from llmserve.errors import EngineError, RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from starlette.responses import Response

log = logging.getLogger(__name__)

LIMIT = 1000  # responses of a model
LIMIT_BYTES = 1 << 30  # of all models
EVENT_BYTES = 2048  # of a streamed event, however short its text
_PENDING = frozenset({"queued", "in_progress"})

# The API key, as a hash, that owns the responses which the running request stores.
_owner: ContextVar[str] = ContextVar("owner", default="")


@contextlib.contextmanager
def owned_by(owner: str) -> Iterator[None]:
    token = _owner.set(owner)
    try:
        yield
    finally:
        _owner.reset(token)


@dataclass
class Record:
    """A response with the messages and events that vLLM has stored for it."""

    owner: str
    since_s: float
    parts: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes, estimated; events are appended to without being stored again."""
        events = self.parts.get("events")
        streamed = EVENT_BYTES * len(events[0]) if events is not None else 0
        return sum(self.sizes.values()) + streamed


class Archive:
    """Bounds the bytes that all models store together."""

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._models: WeakSet[ResponseStore] = WeakSet()

    def new_store(self, limit: int = LIMIT) -> ResponseStore:
        store = ResponseStore(limit, self.trim)
        self._models.add(store)
        return store

    def trim(self) -> None:
        """Evict the oldest responses of all models until the rest fits."""
        over = sum(each.size for each in self._models) - self._limit_bytes
        while over > 0:
            holders = [(first.since_s, each) for each in self._models if (first := each.oldest)]
            if not holders:
                return
            _, oldest = min(holders, key=lambda holder: holder[0])
            over -= oldest.evict()


class ResponseStore:
    """The responses of one model. `grown` is called when their memory has grown."""

    def __init__(self, limit: int = LIMIT, grown: Callable[[], None] = lambda: None) -> None:
        self._limit = limit
        self._grown = grown
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._lock = asyncio.Lock()
        self._running = _Running(self._ended)
        self._written: Callable[[Any], Response]
        self._whole: Callable[[Any], None] = lambda _: None

    # --- vLLM's side

    def keep_for(
        self,
        handler: Any,
        written: Callable[[Any], Response],
        whole: Callable[[Any], None] = lambda _: None,
    ) -> None:
        """Replace the stores of an OpenAIServingResponses before its first request.

        `written` returns the HTTP answer for a response or an async generator of events;
        `whole` adds to a response the fields that vLLM omits.
        """
        self._written = written
        self._whole = whole
        vars(handler).update(
            response_store=_Part(self, "response"),
            msg_store=_Part(self, "messages"),
            event_store=_Part(self, "events"),
            response_store_lock=self._lock,
            background_tasks=self._running,
        )

    def part(self, response_id: str, name: str) -> Any:
        record = self._records.get(response_id)
        return None if record is None else record.parts.get(name)

    def store(self, response_id: str, name: str, value: Any) -> None:
        record = self._records.get(response_id)
        if record is None:
            record = self._records[response_id] = Record(_owner.get(), time.monotonic())
        if name == "response":
            self._whole(value)
        record.parts[name] = value
        record.sizes[name] = 0 if name == "events" else size_of(value)
        if len(self._records) > self._limit:
            self.evict()
        self._grown()

    # --- memory

    @property
    def size(self) -> int:
        return sum(record.size for record in self._records.values())

    @property
    def oldest(self) -> Record | None:
        """The oldest record that can be evicted."""
        found = self._evictable()
        return None if found is None else self._records[found]

    def evict(self) -> int:
        """Evict the oldest record; return its bytes."""
        found = self._evictable()
        return 0 if found is None else self._records.pop(found).size

    def _evictable(self) -> str | None:
        return next((each for each in self._records if each not in self._running), None)

    # --- clients

    def task(self, response_id: str) -> asyncio.Task[Any] | None:
        """The background task of a response that still runs."""
        return self._running.get(response_id)

    def has(self, response_id: str, owner: str) -> bool:
        """Whether the store has the response, and it has this owner."""
        record = self._records.get(response_id)
        return record is not None and record.owner == owner and "response" in record.parts

    def fetch(self, response_id: str, *, stream: bool, starting_after: int | None) -> Response:
        """The HTTP answer for a stored response. Raises RequestError if it was not streamed."""
        if not stream:
            return self._written(self.part(response_id, "response"))
        if self.part(response_id, "events") is None:
            raise _not_streamed()
        return self._written(self.replay(response_id, starting_after))

    async def cancel(self, response_id: str) -> Response:
        """Cancel a stored response, if it is not cancelled yet. Raises RequestError."""
        response = self.part(response_id, "response")
        if response.status in _PENDING:
            response.status = "cancelled"
            await self._end(response_id)
        elif response.status != "cancelled":
            raise RequestError("Cannot cancel a synchronous response.", param="response_id")
        return self._written(response)

    async def delete(self, response_id: str) -> None:
        """Delete a stored response; cancel it if it runs."""
        await self._end(response_id)
        self._records.pop(response_id, None)

    async def _end(self, response_id: str) -> None:
        if task := self._running.get(response_id):
            task.cancel()
            await asyncio.wait({task})

    async def replay(
        self, response_id: str, starting_after: int | None = None
    ) -> AsyncGenerator[Any, None]:
        """The events of a background response, to the last one.

        vLLM's own generator does not end for a response that fails or is cancelled.
        """
        task = self._running.get(response_id)
        if task is not None:
            await asyncio.sleep(0)  # it may not have begun
        events, more = self.part(response_id, "events") or (deque[Any](), None)
        if more is None:
            raise _not_streamed()
        at = 0 if starting_after is None else starting_after + 1
        while True:
            more.clear()
            ended = task is None or task.done()
            while at < len(events):
                yield events[at]
                at += 1
            if ended:
                break
            await more.wait()
        if _failed(task) or self._status(response_id) == "failed":
            raise EngineError("The response failed.")

    def _ended(self, response_id: str, task: asyncio.Task[Any]) -> None:
        """Set the status of a response whose task failed: vLLM does not."""
        if self._status(response_id) in _PENDING:
            self.part(response_id, "response").status = "failed"
        if _failed(task):
            log.error("response %s failed", response_id, exc_info=task.exception())
        if (events := self.part(response_id, "events")) is not None:
            events[1].set()
        self._grown()

    def _status(self, response_id: str) -> str:
        return getattr(self.part(response_id, "response"), "status", "")


def _failed(task: asyncio.Task[Any] | None) -> bool:
    return (
        task is not None and task.done() and not task.cancelled() and task.exception() is not None
    )


def _not_streamed() -> RequestError:
    return RequestError("The response was not streamed; fetch it without `stream`.", param="stream")


class _Part:
    """Replaces one of vLLM's dictionaries, with the methods that its handler uses."""

    def __init__(self, responses: ResponseStore, name: str) -> None:
        self._responses = responses
        self._name = name

    def __setitem__(self, response_id: str, value: Any) -> None:
        self._responses.store(response_id, self._name, value)

    def get(self, response_id: str) -> Any:
        return self._responses.part(response_id, self._name)

    def __getitem__(self, response_id: str) -> Any:
        found = self.get(response_id)
        if found is None:
            raise KeyError(response_id)
        return found

    def __contains__(self, response_id: str) -> bool:
        return self.get(response_id) is not None


class _Running(dict[str, "asyncio.Task[Any]"]):
    """The background tasks by response; `ended` is called at the end of each."""

    def __init__(self, ended: Callable[[str, asyncio.Task[Any]], None]) -> None:
        super().__init__()
        self._ended = ended

    def __setitem__(self, response_id: str, task: asyncio.Task[Any]) -> None:
        super().__setitem__(response_id, task)
        task.add_done_callback(partial(self._ended, response_id))


def size_of(value: Any) -> int:
    """The bytes of a value and of all objects in it, each counted once."""
    total, seen, left = 0, set[int](), [value]
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        total += sys.getsizeof(each, 64)
        if isinstance(each, dict):
            left += each.keys()
            left += each.values()
        elif isinstance(each, list | tuple | set | deque):
            left += each
        elif hasattr(each, "__dict__") and not isinstance(each, type):
            left.append(vars(each))
    return total
