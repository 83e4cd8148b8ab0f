"""Event streams: their bytes and their response.

Source: WHATWG HTML, "Server-sent events"; OpenAI's streams end with `data: [DONE]`.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import orjson
from sse_starlette.sse import AppStatus, EventSourceResponse

from llmserve.api.schedule import SCHEDULE
from llmserve.errors import LLMServeError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

# The server drains streams; a signal does not end them.
AppStatus.enable_automatic_graceful_drain = False


def event(data: Any, name: str | None = None) -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + orjson.dumps(data) + b"\n\n"


def payload(frame: bytes) -> Any:
    """Return the JSON of a frame's data; None for other data."""
    _, found, data = frame.partition(b"data: ")
    try:
        return orjson.loads(data) if found else None
    except orjson.JSONDecodeError:
        return None


def with_payload(frame: bytes, data: Any) -> bytes:
    head, _, _ = frame.partition(b"data: ")
    return head + b"data: " + orjson.dumps(data) + b"\n\n"


class PeekableStream:
    """A source of frames whose first one can be awaited before the headers are sent.

    So an early LLMServeError can have its own status. A later one becomes the last frame,
    `failure(error, sent)`, after `sent` frames.
    """

    def __init__(
        self, source: AsyncGenerator[bytes, None], failure: Callable[[LLMServeError, int], bytes]
    ) -> None:
        self._failure = failure
        self._sent = 0
        self._source = source
        self._first: asyncio.Task[bytes] | None = None
        self._failed = False

    async def begin(self, timeout_s: float) -> None:
        """Wait for the first frame, at most `timeout_s`. Raises the errors of the source."""
        self._first = asyncio.ensure_future(anext(self._source))
        try:
            done, _ = await asyncio.wait({self._first}, timeout=timeout_s)
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if done and not isinstance(self._first.exception(), StopAsyncIteration):
            self._first.result()

    def __aiter__(self) -> PeekableStream:
        return self

    async def __anext__(self) -> bytes:
        if self._failed:
            raise StopAsyncIteration
        first, self._first = self._first, None
        try:
            frame = await (anext(self._source) if first is None else first)
            self._sent += 1
        except LLMServeError as error:
            self._failed = True
            return self.failure(error)
        return frame

    def failure(self, error: LLMServeError) -> bytes:
        return self._failure(error, self._sent)

    async def aclose(self) -> None:
        if self._first is not None:
            self._first.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
                await self._first
        await self._source.aclose()


class EventStream(EventSourceResponse):
    """A response of complete frames.

    It always closes the source: an async generator that was not started does not reach its
    `finally`, for example if the client disconnects before the first frame.
    """

    def __init__(self, frames: PeekableStream) -> None:
        headers, ping_s = {"cache-control": "no-cache"}, int(SCHEDULE.ping_s)
        super().__init__(frames, headers=headers, ping=ping_s, sep="\n")
        del self.headers["connection"]  # the server sets it; HTTP/1.0 closes
        self.frames = frames
        self.failure = frames.failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.frames.aclose()
