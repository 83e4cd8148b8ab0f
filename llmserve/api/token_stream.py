"""A streamed answer on its way to one client, without a task or a queue per token.

The engine's side hands over pieces of text; what one iteration of the loop has brought leaves
as one event per stream. Events are written by stepping the ASGI `send` where the loop
is: it only waits for a client that reads too slowly, and then a task takes it over
while text piles up and becomes one longer event.
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

# What a stream has to write: when it was added, when the engine made the oldest of it (by the
# engine's clock), the stream.
_Text: TypeAlias = "tuple[float, float, TokenStream]"

HELD_LIMIT = 500_000  # characters that wait for one client; `connection` bounds the time
_PING = b": ping\n\n"

# ASGI extensions of our server. Write a piece of a body that has begun, without waiting:
# False if that is not possible now. End the connection without flushing it. Hold the headers
# back until the first piece of the body, even an empty one: one packet instead of two.
WRITE, ABORT, HOLD = "llmserve.write", "llmserve.abort", "llmserve.hold"


class StreamSource(Protocol):
    """The request behind a stream, in an engine."""

    async def begin(self, stream: TokenStream) -> None:
        """Give the request to the engine. Raises LLMServeError."""
        ...

    async def abort(self) -> None: ...

    @property
    def prompt_tokens(self) -> int: ...


class StreamFrames(Protocol):
    """The events of one answer, as bytes around its text."""

    first: bytes

    def middle(self, text: str) -> bytes:
        """Empty if there is nothing to tell."""
        ...

    def last(
        self, text: str, finish: str, stop: int | str | None, prompt_tokens: int, tokens: int
    ) -> bytes:
        """Everything from the last piece of text to the end of the stream."""
        ...


class FlushScheduler:
    """Writes the text of one engine's streams, and tends quiet ones.

    docs/event-loop.md says what is written in which iteration. `lag` receives the age of the
    oldest text when it leaves.
    """

    def __init__(self, lag: Callable[[float], None], schedule: Schedule = SCHEDULE) -> None:
        self.schedule = schedule
        self._lag = lag
        self._first: list[_Text] = []  # of streams that have not written any
        self._ends: list[_Text] = []
        self._later: list[_Text] = []
        self._coming = 0  # requests that are being prepared
        self._crowded = 0  # short iterations to wait for when there are none
        self._more = False  # steps are here that have not been handled
        self._gathers = False
        self._looks = False  # in the loop's next iteration
        self._look_due_s = 0.0  # when it was scheduled
        self._streams: set[TokenStream] = set()
        self._tending = False

    def add(self, stream: TokenStream, since_s: float) -> None:
        """`stream` has something to write that the engine made at `since_s`."""
        if not (self._gathers or self._first or self._ends or self._later):
            self._look_soon()
        text = time.monotonic(), since_s, stream
        if not stream.text_sent:
            self._first.append(text)
        elif stream.ends:
            self._ends.append(text)
        else:
            self._later.append(text)

    def gather(self) -> None:
        """More is about to be added."""
        self._gathers = True

    def release(self, *, more: bool) -> None:
        """That was it, but for steps that wait for the loop's next iteration, if `more`."""
        self._gathers, self._more = False, more
        if self._looks:  # this iteration's share is for it
            self._write_first()
        else:
            self._write_all()

    def _look_soon(self) -> None:
        if not self._looks:
            self._looks = True
            self._look_due_s = time.monotonic()
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        self._looks = False
        short = time.monotonic() - self._look_due_s <= self.schedule.short_s
        if short and self._crowded and not self._coming:
            self._crowded -= 1
        self._write_all()

    def _write_all(self) -> None:
        """Of what is no first text as much as has a share of this iteration."""
        self._write_first()
        now = time.monotonic()
        if self._write_some(self._ends, now):
            self._crowded = self.schedule.short_iterations  # its client may send another request
        self._write_some(self._later, now)
        if self._ends or self._later:
            self._look_soon()

    def _write_first(self) -> None:
        if self._first:
            first, self._first = self._first, []
            for _, _, stream in first:
                self.write(stream)
            if not (self._ends or self._later):
                self._tell_lag(first[0])

    def _write_some(self, texts: list[_Text], now: float) -> int:
        """How many have been written, and are in the list no longer."""
        written, share_s = 0, self.schedule.flush_s
        for _, _, stream in texts[: self._due(texts, now)]:
            self.write(stream)
            written += 1
            if time.monotonic() - now > share_s:
                break
        if written:
            self._tell_lag(texts[0])
            del texts[:written]
        return written

    def _due(self, texts: list[_Text], now: float) -> int:
        """How many of them may be written."""
        waiting = self._more or self._coming > 0 or self._crowded > 0
        return bisect_left(texts, (now - self.schedule.collect_s,)) if waiting else len(texts)

    def _tell_lag(self, oldest: _Text) -> None:
        try:
            self._lag(max(0.0, time.monotonic() - oldest[1]))
        except Exception:  # text is worth more than its figure
            log.exception("a stream's lag could not be counted")

    def write(self, stream: TokenStream) -> None:
        """What it has. A failure ends this stream; the others go on."""
        try:
            stream.write()
        except Exception as error:
            stream.broke(error)

    @contextmanager
    def coming(self) -> Iterator[None]:
        """While a request waits for its batch and is prepared: until it is the engine's or vLLM's."""
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1
            self._crowded = self.schedule.short_iterations

    def register(self, stream: TokenStream) -> None:
        self._streams.add(stream)
        if not self._tending:
            self._tending = True
            asyncio.get_running_loop().call_later(self.schedule.tend_s, self._tend)

    def unregister(self, stream: TokenStream) -> None:
        self._streams.discard(stream)

    def _tend(self) -> None:
        """One timer for all of them: a timer each would cost more than the rest of it."""
        now = time.monotonic()
        for stream in list(self._streams):
            try:
                stream.tend(now)
            except Exception as error:  # as above
                stream.broke(error)
        self._tending = bool(self._streams)
        if self._tending:
            asyncio.get_running_loop().call_later(self.schedule.tend_s, self._tend)


class TokenStream:
    """`source`'s text to the client, in `frames`.

    What fails before the first byte is raised; later it is `failure(error)`, a last event.
    """

    __slots__ = (
        "_abort",
        "_cut_short",
        "_error",
        "_finish",
        "_flow",
        "_frames",
        "_headers_sent",
        "_hold",
        "_moved_s",
        "_over",
        "_send",
        "_sending",
        "_source",
        "_task",
        "_waits",
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
        self._write: Callable[[bytes], bool] = _cannot
        self._abort: Callable[[], None] = _nothing
        self._hold: Callable[[], None] = _nothing
        self._sending: asyncio.Task[None] | None = None
        self.pieces: list[str] = []  # of text, made and not yet written
        self.tokens = 0
        self.last_s = 0.0  # when the engine made the last of them, `time.monotonic`
        self.decode: Callable[[int], str]  # a token id to the text that it completes
        self.table: Sequence[str | None] = ()  # what `decode` says of a whole character's id
        self.partial = False  # a character has begun and is not whole
        self.ends = False  # what it has to write is the last
        self._finish: tuple[str, int | str | None] | None = None
        self._error: LLMServeError | None = None
        self._waits = False  # in the flow's list
        self._headers_sent = self.text_sent = self._over = self._cut_short = False
        self._task: asyncio.Task[Any] | None = None
        self._moved_s = 0.0  # when `send` was last called

    # --- the engine's side

    def took(self, tokens: int, since_s: float) -> None:
        """`tokens` more, made at `since_s`; their text is in `pieces`."""
        self.tokens += tokens
        self.last_s = since_s
        if not self._waits:
            self._waits = True
            self._flow.add(self, since_s)

    def finished(self, reason: str, stop: int | str | None, since_s: float) -> None:
        """Told before `took`, the last tokens leave as an end does."""
        self.ends = True
        self._finish = (reason, stop)
        if not self._waits:
            self._waits = True
            self._flow.add(self, since_s)

    def failed(self, error: LLMServeError) -> None:
        self.ends = True
        self._error = error
        if not self._waits:
            self._waits = True
            self._flow.add(self, time.monotonic())

    # --- the client's side

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        extensions = scope.get("extensions") or {}
        self._write = extensions.get(WRITE, _cannot)
        self._abort = extensions.get(ABORT, _nothing)
        self._hold = extensions.get(HOLD, _nothing)
        self._moved_s = time.monotonic()
        self._task = asyncio.current_task()
        self._flow.register(self)
        try:
            await self._source.begin(self)
            # Both ends are told the same way: the answer is out, or the client has gone.
            while (await receive())["type"] != "http.disconnect":
                pass
        except asyncio.CancelledError:
            if self._task is not None:  # by another than `_leave`
                raise
            if self._error is not None and not self._headers_sent:
                raise self._error from None
        finally:
            self._flow.unregister(self)
            RequestContext.of(scope).count_tokens(self._source.prompt_tokens, self.tokens)
            if not self._over:
                self._over = self._cut_short = True
                await self._source.abort()

    async def end_early(self, error: LLMServeError) -> None:
        """The last event of an answer that the server's end cut short."""
        if self._sending is not None:
            self._abort()
        elif self._cut_short:
            last = self.failure(error)
            await self._send({"type": "http.response.body", "body": last, "more_body": False})

    def write(self) -> None:
        """All that is pending as one event; later, if the client has not taken the last."""
        if self._sending is not None or self._over:
            return
        self._waits = False
        if self._error is not None:
            self._fail(self._error)
            return
        pieces = self.pieces
        if not pieces and self._finish is None:
            return
        text = pieces[0] if len(pieces) == 1 else "".join(pieces)
        pieces.clear()
        if self._finish is not None:
            self._over = True
            prompt_tokens = self._source.prompt_tokens
            body = self._frames.last(text, *self._finish, prompt_tokens, self.tokens)
        else:
            body = self._frames.middle(text)
            if self.text_sent and not body:
                return
            if self.text_sent and self._write(body):
                self._moved_s = time.monotonic()
                return
        if not self.text_sent:
            self.text_sent = True
            body = self._frames.first + body
        self._step(body, more=not self._over)

    def _fail(self, error: LLMServeError) -> None:
        self._over = True
        if self._headers_sent:
            self._step(self.failure(error), more=False)
        else:
            self._leave()

    def _step(self, body: bytes, *, more: bool) -> None:
        """Run `send` here and now. It waits for a slow client only: then a task takes over."""
        message = {"type": "http.response.body", "body": body, "more_body": more}
        if self._headers_sent:
            # As uvicorn's is; ASGI only says that it can be awaited.
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
        self._moved_s = time.monotonic()
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
        if self._waits:
            self._flow.write(self)

    # --- quiet ones

    def tend(self, now: float) -> None:
        """Headers or a comment when they are due; an end if too much waits for the client."""
        quiet_s = now - self._moved_s
        if self._sending is not None:
            if sum(map(len, self.pieces)) > HELD_LIMIT:
                self._give_up()
        elif self._over:
            pass
        elif not self._headers_sent:
            if quiet_s >= self._flow.schedule.headers_s:
                self._step(b"", more=True)
        elif quiet_s >= self._flow.schedule.ping_s:
            self._step(_PING, more=True)

    def broke(self, error: Exception) -> None:
        log.error("an event could not be written", exc_info=error)
        self._give_up()

    def _give_up(self) -> None:
        """End the connection and the wait, which aborts the request."""
        try:
            self._abort()
        except Exception:
            log.exception("a connection could not be ended")
        self._leave()

    def _leave(self) -> None:
        """End the wait in `__call__`, as if the client had gone."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            task.uncancel()


def _nothing() -> None:
    pass


def _cannot(_: bytes) -> bool:
    return False


@types.coroutine
def _resume(coroutine: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """What is left of a coroutine that was stepped as far as `waits_for`."""
    yield waits_for
    yield from coroutine
