"""Streamed answers, without a task or a queue per token.

The engine appends pieces of text; a flush writes all pieces of a stream as one event. A write
steps the ASGI `send` in the current callback. `send` suspends only for a client that reads too
slowly: then a task resumes it, and the collected text becomes one longer event.
"""

from __future__ import annotations

import asyncio
import logging
import time
import types
from bisect import bisect_left
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from llmserve.api.context import RequestContext
from llmserve.api.schedule import SCHEDULE, Schedule
from llmserve.api.sse import HEADERS

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence

    from starlette.types import Receive, Scope, Send

    from llmserve.errors import LLMServeError

log = logging.getLogger(__name__)

# Pending text: when it was added, when the engine generated its oldest token, the stream.
_Text: TypeAlias = "tuple[float, float, TokenStream]"

HELD_LIMIT = 500_000  # pending characters of one client; `connection` bounds the time
_PING = b": ping\n\n"

# ASGI extensions of our server. WRITE writes a piece of a body without waiting, or returns
# False. ABORT ends the connection without its pending bytes. HOLD holds the headers back until
# the first piece of the body, even an empty one: one packet instead of two.
WRITE, ABORT, HOLD = "llmserve.write", "llmserve.abort", "llmserve.hold"


class StreamSource(Protocol):
    """The request of a stream in its engine."""

    async def begin(self, stream: TokenStream) -> None:
        """Send the request to the engine. Raises LLMServeError."""
        ...

    async def abort(self) -> None: ...

    @property
    def prompt_tokens(self) -> int: ...


class StreamFrames(Protocol):
    """The events of one answer, as bytes around its text."""

    first: bytes

    def middle(self, text: str) -> bytes:
        """Return the event of a text; empty if it has no event."""
        ...

    def last(
        self, text: str, finish: str, stop: int | str | None, prompt_tokens: int, tokens: int
    ) -> bytes:
        """Return the events from the last text to the end of the stream."""
        ...


class FlushScheduler:
    """Writes the text of one engine's streams, and pings idle ones.

    docs/event-loop.md has the order of writes. `lag` receives the age of the oldest text when
    it is written.
    """

    def __init__(self, lag: Callable[[float], None], schedule: Schedule = SCHEDULE) -> None:
        self.schedule = schedule
        self._lag = lag
        self._first: list[_Text] = []  # first texts of their streams
        self._ends: list[_Text] = []
        self._later: list[_Text] = []
        self._preparing = 0  # requests in preparation
        self._short_iterations = 0  # short iterations that must pass before ends and later text
        self._more_steps = False  # steps have arrived and wait for the next iteration
        self._is_held = False
        self._is_scheduled = False  # a flush is scheduled
        self._scheduled_s = 0.0  # when it was scheduled
        self._streams: set[TokenStream] = set()
        self._tending = False

    def add(self, stream: TokenStream, since_s: float) -> None:
        """Schedule pending text of a stream, which the engine generated at `since_s`."""
        if not (self._is_held or self._first or self._ends or self._later):
            self._schedule_flush()
        text = time.monotonic(), since_s, stream
        if not stream.text_sent:
            self._first.append(text)
        elif stream.ends:
            self._ends.append(text)
        else:
            self._later.append(text)

    def gather(self) -> None:
        """Hold flushes until `release`."""
        self._is_held = True

    def release(self, *, more: bool) -> None:
        """Flush; `more`: further steps wait for the next event-loop iteration."""
        self._is_held, self._more_steps = False, more
        if self._is_scheduled:  # it has this iteration's share
            self._write_first()
        else:
            self._write_all()

    def _schedule_flush(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._scheduled_s = time.monotonic()
            asyncio.get_running_loop().call_soon(self._run_flush)

    def _run_flush(self) -> None:
        self._is_scheduled = False
        short = time.monotonic() - self._scheduled_s <= self.schedule.short_s
        if short and self._short_iterations and not self._preparing:
            self._short_iterations -= 1
        self._write_all()

    def _write_all(self) -> None:
        """Write first texts, then ends and later text within this iteration's share."""
        self._write_first()
        now = time.monotonic()
        if self._write_some(self._ends, now):
            self._short_iterations = (
                self.schedule.short_iterations
            )  # its client may send another request
        self._write_some(self._later, now)
        if self._ends or self._later:
            self._schedule_flush()

    def _write_first(self) -> None:
        if self._first:
            first, self._first = self._first, []
            for _, _, stream in first:
                self.write(stream)
            if not (self._ends or self._later):
                self._record_lag(first[0])

    def _write_some(self, texts: list[_Text], now: float) -> int:
        """Write and remove due texts; return how many."""
        written, share_s = 0, self.schedule.flush_s
        for _, _, stream in texts[: self._due(texts, now)]:
            self.write(stream)
            written += 1
            if time.monotonic() - now > share_s:
                break
        if written:
            self._record_lag(texts[0])
            del texts[:written]
        return written

    def _due(self, texts: list[_Text], now: float) -> int:
        """Return how many of the texts are due."""
        waiting = self._more_steps or self._preparing > 0 or self._short_iterations > 0
        return bisect_left(texts, (now - self.schedule.collect_s,)) if waiting else len(texts)

    def _record_lag(self, oldest: _Text) -> None:
        try:
            self._lag(max(0.0, time.monotonic() - oldest[1]))
        except Exception:  # streams continue without the metric
            log.exception("the lag of a stream could not be recorded")

    def write(self, stream: TokenStream) -> None:
        """Write the pending text of a stream. A failure ends this stream only."""
        try:
            stream.write()
        except Exception as error:
            stream.broke(error)

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Count a request in preparation, from its batch to the engine or vLLM's handler."""
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1
            self._short_iterations = self.schedule.short_iterations

    def register(self, stream: TokenStream) -> None:
        self._streams.add(stream)
        if not self._tending:
            self._tending = True
            asyncio.get_running_loop().call_later(self.schedule.tend_s, self._tend)

    def unregister(self, stream: TokenStream) -> None:
        self._streams.discard(stream)

    def _tend(self) -> None:
        """Tend all streams. One timer costs less than a timer per stream."""
        now = time.monotonic()
        for stream in list(self._streams):
            try:
                stream.tend(now)
            except Exception as error:
                stream.broke(error)
        self._tending = bool(self._streams)
        if self._tending:
            asyncio.get_running_loop().call_later(self.schedule.tend_s, self._tend)


class TokenStream:
    """The answer to one client: text of `source` in events of `frames`.

    An error before the first byte is raised; a later one becomes `failure(error)`, a last event.
    """

    __slots__ = (
        "_abort",
        "_error",
        "_finish",
        "_flow",
        "_frames",
        "_has_ended",
        "_headers_sent",
        "_hold",
        "_is_incomplete",
        "_is_pending",
        "_send",
        "_sending",
        "_sent_s",
        "_source",
        "_task",
        "_write",
        "decode",
        "ends",
        "failure",
        "last_s",
        "partial",
        "pieces",
        "table",
        "text_sent",
        "tokens",
    )

    def __init__(
        self,
        source: StreamSource,
        flow: FlushScheduler,
        frames: StreamFrames,
        failure: Callable[[LLMServeError], bytes],
    ) -> None:
        self.failure = failure
        self._source = source
        self._flow = flow
        self._frames = frames
        self._send: Send
        self._write: Callable[[bytes], bool] = _refuse_write
        self._abort: Callable[[], None] = _do_nothing
        self._hold: Callable[[], None] = _do_nothing
        self._sending: asyncio.Task[None] | None = None
        self.pieces: list[str] = []  # pending text
        self.tokens = 0
        self.last_s = 0.0  # when the engine generated the last token, `time.monotonic`
        self.decode: Callable[[int], str]  # from a token id to the text that it completes
        self.table: Sequence[str | None] = ()  # results of `decode` for ids of whole characters
        self.partial = False  # the text ends within a character
        self.ends = False  # the pending text is the last
        self._finish: tuple[str, int | str | None] | None = None
        self._error: LLMServeError | None = None
        self._is_pending = False  # in a list of the flow
        self._headers_sent = self.text_sent = self._has_ended = self._is_incomplete = False
        self._task: asyncio.Task[Any] | None = None
        self._sent_s = 0.0  # when `send` was last called

    # --- calls of the engine

    def took(self, tokens: int, since_s: float) -> None:
        """Count tokens that the engine generated at `since_s`; their text is in `pieces`."""
        self.tokens += tokens
        self.last_s = since_s
        if not self._is_pending:
            self._is_pending = True
            self._flow.add(self, since_s)

    def finished(self, reason: str, stop: int | str | None, since_s: float) -> None:
        """End the answer. A call before `took` gives its text the priority of an end."""
        self.ends = True
        self._finish = (reason, stop)
        if not self._is_pending:
            self._is_pending = True
            self._flow.add(self, since_s)

    def failed(self, error: LLMServeError) -> None:
        self.ends = True
        self._error = error
        if not self._is_pending:
            self._is_pending = True
            self._flow.add(self, time.monotonic())

    # --- the connection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        extensions = scope.get("extensions") or {}
        self._write = extensions.get(WRITE, _refuse_write)
        self._abort = extensions.get(ABORT, _do_nothing)
        self._hold = extensions.get(HOLD, _do_nothing)
        self._sent_s = time.monotonic()
        self._task = asyncio.current_task()
        self._flow.register(self)
        try:
            await self._source.begin(self)
            # The server sends this message after the answer and after a disconnect.
            while (await receive())["type"] != "http.disconnect":
                pass
        except asyncio.CancelledError:
            if self._task is not None:  # not cancelled by `_end_call`
                raise
            if self._error is not None and not self._headers_sent:
                raise self._error from None
        finally:
            self._flow.unregister(self)
            RequestContext.of(scope).count_tokens(self._source.prompt_tokens, self.tokens)
            if not self._has_ended:
                self._has_ended = self._is_incomplete = True
                await self._source.abort()

    async def end_early(self, error: LLMServeError) -> None:
        """Send an error as the last event of an answer that is incomplete."""
        if self._sending is not None:
            self._abort()
        elif self._is_incomplete:
            last = self.failure(error)
            await self._send({"type": "http.response.body", "body": last, "more_body": False})

    def write(self) -> None:
        """Write all pending text as one event; later if the last `send` is suspended."""
        if self._sending is not None or self._has_ended:
            return
        self._is_pending = False
        if self._error is not None:
            self._fail(self._error)
            return
        pieces = self.pieces
        if not pieces and self._finish is None:
            return
        text = pieces[0] if len(pieces) == 1 else "".join(pieces)
        pieces.clear()
        if self._finish is not None:
            self._has_ended = True
            prompt_tokens = self._source.prompt_tokens
            body = self._frames.last(text, *self._finish, prompt_tokens, self.tokens)
        else:
            body = self._frames.middle(text)
            if self.text_sent and not body:
                return
            if self.text_sent and self._write(body):
                self._sent_s = time.monotonic()
                return
        if not self.text_sent:
            self.text_sent = True
            body = self._frames.first + body
        self._send_now(body, more=not self._has_ended)

    def _fail(self, error: LLMServeError) -> None:
        self._has_ended = True
        if self._headers_sent:
            self._send_now(self.failure(error), more=False)
        else:
            self._end_call()

    def _send_now(self, body: bytes, *, more: bool) -> None:
        """Step `send` in this callback. It suspends for a slow client only; a task resumes it."""
        message = {"type": "http.response.body", "body": body, "more_body": more}
        if self._headers_sent:
            # uvicorn's `send` is a coroutine function; ASGI requires an awaitable only.
            sending = cast("Coroutine[Any, Any, None]", self._send(message))
        else:
            self._headers_sent = True
            sending = self._start(message)
        self._run(sending)

    async def _start(self, message: dict[str, Any]) -> None:
        self._hold()
        await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        body = message["body"]
        if not (body and message["more_body"] and self._write(body)):
            await self._send(message)

    def _run(self, sending: Coroutine[Any, Any, None]) -> None:
        self._sent_s = time.monotonic()
        try:
            waits_for = sending.send(None)
        except StopIteration:
            return
        except Exception as error:
            self.broke(error)
        else:
            rest = self._rest(sending, waits_for)
            self._sending = asyncio.get_running_loop().create_task(rest)

    async def _rest(self, sending: Coroutine[Any, Any, None], waits_for: Any) -> None:
        try:
            await _resume(sending, waits_for)
        except Exception as error:
            self.broke(error)
        self._sending = None
        if self._is_pending:
            self._flow.write(self)

    # --- idle streams

    def tend(self, now: float) -> None:
        """Send headers or a comment when due; close a stream with too much pending text."""
        idle_s = now - self._sent_s
        if self._sending is not None:
            if sum(map(len, self.pieces)) > HELD_LIMIT:
                self._close()
        elif self._has_ended:
            pass
        elif not self._headers_sent:
            if idle_s >= self._flow.schedule.headers_s:
                self._send_now(b"", more=True)
        elif idle_s >= self._flow.schedule.ping_s:
            self._send_now(_PING, more=True)

    def broke(self, error: Exception) -> None:
        log.error("an event could not be written", exc_info=error)
        self._close()

    def _close(self) -> None:
        """End the connection and `__call__`, which aborts the request."""
        try:
            self._abort()
        except Exception:
            log.exception("a connection could not be ended")
        self._end_call()

    def _end_call(self) -> None:
        """End `__call__`, as after a disconnect."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            task.uncancel()


def _do_nothing() -> None:
    pass


def _refuse_write(_: bytes) -> bool:
    return False


@types.coroutine
def _resume(coroutine: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """Resume a coroutine that was stepped as far as `waits_for`."""
    yield waits_for
    yield from coroutine
