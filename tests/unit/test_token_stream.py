from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from llmserve.api import token_stream as stream
from llmserve.api.context import RequestContext
from llmserve.api.schedule import SCHEDULE, Schedule
from llmserve.api.sse import HEADERS
from llmserve.api.token_stream import ABORT, HOLD, WRITE, FlushScheduler, TokenStream
from llmserve.errors import LLMServeError, Overloaded, RequestError
from tests.fakes import Gate, failure, http_scope, soon, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.types import Message


class Engine:
    """The far side of a stream; `token_stream.StreamSource`."""

    prompt_tokens = 7

    def __init__(self, *, gate: Gate | None = None, error: LLMServeError | None = None) -> None:
        self._gate, self._error = gate, error
        self.begun = asyncio.Event()
        self.aborts = 0
        self._stream: TokenStream

    async def begin(self, stream: TokenStream) -> None:
        self._stream = stream
        self.begun.set()
        if self._gate is not None:
            await self._gate.wait()
        if self._error is not None:
            raise self._error

    async def abort(self) -> None:
        self.aborts += 1

    def gives(self, text: str, since_s: float | None = None) -> None:
        self._stream.pieces.append(text)
        self._stream.took(1, time.monotonic() if since_s is None else since_s)

    def ends(self, reason: str = "stop", stop: str | None = None) -> None:
        self._stream.finished(reason, stop, time.monotonic())

    def fails(self, error: LLMServeError) -> None:
        self._stream.failed(error)


class Frames:
    first = b"first "

    def middle(self, text: str) -> bytes:
        return f"[{text}]".encode() if text else b""

    def last(
        self, text: str, finish: str, stop: int | str | None, prompt_tokens: int, tokens: int
    ) -> bytes:
        return f"[{text}] {finish} {stop} {prompt_tokens}+{tokens}".encode()


class Client:
    """The near side: an ASGI server's `receive` and `send`."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self.breaks: Exception | None = None
        self.aborts = 0
        self.written: list[bytes] = []
        self._gone = asyncio.Event()

    def leaves(self) -> None:
        self._gone.set()

    def has(self, bodies: int) -> bool:
        return len(self.bodies) == bodies

    def stops_reading(self) -> None:
        self.reads.clear()

    async def receive(self) -> Message:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if not self.reads.is_set():
            await self.reads.wait()
        if self.breaks is not None:
            raise self.breaks
        self.sent.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._gone.set()  # as servers say it

    def abort(self) -> None:
        self.aborts += 1
        self._gone.set()

    def write(self, body: bytes) -> bool:
        """A server's direct way, which is open while the client reads."""
        if not self.reads.is_set():
            return False
        self.written.append(body)
        self.sent.append({"type": "http.response.body", "body": body, "more_body": True})
        return True

    @property
    def status(self) -> int:
        status: int = self.sent[0]["status"]
        return status

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.sent[1:]]


class Line:
    """A stream between an engine and a client."""

    def __init__(self, engine: Engine, schedule: Schedule = SCHEDULE) -> None:
        self.engine, self.client = engine, Client()
        self.lags: list[float] = []
        self.flow = FlushScheduler(self.lags.append, schedule)
        self.stream = TokenStream(engine, self.flow, Frames(), failure)
        self.answering: asyncio.Task[None]
        self.extensions: dict[str, object] = {ABORT: self.client.abort}
        self.scope = http_scope(extensions=self.extensions)

    async def answer(self) -> None:
        await self.stream(self.scope, self.client.receive, self.client.send)

    async def gives(self, *texts: str) -> None:
        """Each in an event-loop iteration of its own."""
        for text in texts:
            self.engine.gives(text)
            await next_iteration()

    async def ends(self, reason: str = "stop", stop: str | None = None) -> None:
        self.engine.ends(reason, stop)
        await soon(self.answering)

    async def leaves(self) -> None:
        self.client.leaves()
        await soon(self.answering)

    async def is_cut(self) -> None:
        self.answering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await soon(self.answering)

    @property
    def counts(self) -> tuple[int | None, int | None]:
        """Tokens of the prompt and of the answer."""
        context = RequestContext.of(self.scope)
        return context.prompt_tokens, context.generated_tokens


@asynccontextmanager
async def begun(
    engine: Engine | None = None, *, direct: bool = False, schedule: Schedule = SCHEDULE
) -> AsyncIterator[Line]:
    """A stream whose request is in the engine; at the end the client has left."""
    line = Line(engine or Engine(), schedule)
    if direct:
        line.extensions[WRITE] = line.client.write
    line.answering = asyncio.create_task(line.answer())
    await soon(line.engine.begun.wait())
    yield line
    line.client.leaves()
    await soon(asyncio.wait({line.answering}))


async def next_iteration() -> None:
    """Wait until the callbacks of this event-loop iteration have run."""
    await asyncio.sleep(0)


PATIENT = Schedule(collect_s=60)  # text is written by other rules than its age
HURRIED = Schedule(tend_s=0.005)  # quiet streams are looked at often


# --- text


async def test_first_text_is_written_in_the_same_iteration() -> None:
    async with begun() as line:
        assert line.client.sent == []
        await line.gives("a")
        assert line.client.sent == [
            {"type": "http.response.start", "status": 200, "headers": HEADERS},
            {"type": "http.response.body", "body": b"first [a]", "more_body": True},
        ]
        await line.gives("b")
        assert line.client.bodies == [b"first [a]", b"[b]"]


async def test_text_of_one_iteration_becomes_one_event() -> None:
    async with begun() as line:
        for text in "abc":
            line.engine.gives(text)
        await next_iteration()
        assert line.client.bodies == [b"first [abc]"]


async def test_end_has_the_last_text_and_the_token_counts() -> None:
    async with begun() as line:
        await line.gives("a")
        line.engine.gives("b")
        await line.ends("stop", "x")
    assert line.client.bodies == [b"first [a]", b"[b] stop x 7+2"]
    assert line.counts == (7, 2)
    assert [message["more_body"] for message in line.client.sent[1:]] == [True, False]
    assert line.engine.aborts == 0


async def test_an_answer_of_one_event_has_its_first_frame() -> None:
    async with begun() as line:
        line.engine.gives("a")
        await line.ends("length")
    assert line.client.bodies == [b"first [a] length None 7+1"]


async def test_an_end_without_text_is_an_end() -> None:
    async with begun() as line:
        await line.gives("a")
        await line.ends("abort")
    assert line.client.bodies[-1] == b"[] abort None 7+1"


async def test_tokens_without_text_are_counted() -> None:
    async with begun() as line:
        await line.gives("", "", "é")
        await line.ends()
    assert line.client.bodies[-1].endswith(b"7+3")
    assert b"\xc3\xa9" in b"".join(line.client.bodies)


def asked(
    flow: FlushScheduler, engines: list[Engine], clients: list[Client]
) -> list[asyncio.Task[None]]:
    return [
        asyncio.create_task(
            TokenStream(engine, flow, Frames(), failure)(http_scope(), client.receive, client.send)
        )
        for engine, client in zip(engines, clients, strict=True)
    ]


@asynccontextmanager
async def several(
    count: int,
    lag: Callable[[float], None] = lambda _: None,
    schedule: Schedule = SCHEDULE,
) -> AsyncIterator[tuple[FlushScheduler, list[Engine], list[Client]]]:
    """Streams of one flow that have written a first text; at the end all clients have left."""
    flow = FlushScheduler(lag, schedule)
    engines, clients = [Engine() for _ in range(count)], [Client() for _ in range(count)]
    answering = asked(flow, engines, clients)
    await next_iteration()
    for engine in engines:
        engine.gives("a")
    await next_iteration()
    yield flow, engines, clients
    for client in clients:
        client.leaves()
    await soon(asyncio.gather(*answering))


async def test_streams_of_one_iteration_report_the_lag_of_the_oldest() -> None:
    lags: list[float] = []
    flow = FlushScheduler(lags.append)
    engines, clients = [Engine() for _ in range(3)], [Client() for _ in range(3)]
    answering = asked(flow, engines, clients)
    await next_iteration()
    for engine in engines:
        engine.gives("a", time.monotonic() - 5)
    await next_iteration()
    assert [client.bodies for client in clients] == [[b"first [a]"]] * 3
    (lag,) = lags
    assert 5 <= lag < 10
    for client in clients:
        client.leaves()
    await soon(asyncio.gather(*answering))


def failing(_: bytes) -> bool:
    raise RuntimeError("the transport is closed")


async def test_failed_write_ends_one_stream_only() -> None:
    flow = FlushScheduler(lambda _: None)
    engines, clients = [Engine() for _ in range(2)], [Client() for _ in range(2)]
    direct = [{WRITE: failing}, {WRITE: clients[1].write}]  # no way to end a connection either
    answering = [
        asyncio.create_task(
            TokenStream(engine, flow, Frames(), failure)(
                http_scope(extensions=extensions), client.receive, client.send
            )
        )
        for engine, client, extensions in zip(engines, clients, direct, strict=True)
    ]
    await next_iteration()
    for text in "ab":
        for engine in engines:
            engine.gives(text)
        await next_iteration()
    await soon(answering[0])
    assert engines[0].aborts == 1
    assert clients[1].bodies == [b"first [a]", b"[b]"]
    clients[1].leaves()
    await soon(answering[1])


@pytest.mark.parametrize("direct", [False, True], ids=["by send", "by write"])
async def test_empty_event_is_not_written(direct: bool) -> None:
    """An empty chunk would end an HTTP body."""
    async with begun(direct=direct) as line:
        await line.gives("", "", "a", "")
        line.engine.gives("b")
        await until(partial(line.client.has, 3))
        assert line.client.bodies == [b"first ", b"[a]", b"[b]"]


# --- an engine that is ahead


async def test_text_of_a_step_is_flushed_at_its_end() -> None:
    async with begun() as line:
        await line.gives("a")
        line.engine.gives("b")
        await until(partial(line.client.has, 2))  # its own request came long ago
        line.lags.clear()
        for first, last in ("cd", "ef"):
            line.flow.gather()
            await line.gives(first)
            line.engine.gives(last)
            line.flow.release(more=False)  # in the same iteration
        assert line.client.bodies == [b"first [a]", b"[b]", b"[cd]", b"[ef]"]
        assert len(line.lags) == 2
        await next_iteration()
        assert len(line.client.bodies) == 4
        assert len(line.lags) == 2


async def test_text_waits_for_a_step_that_is_here_already() -> None:
    async with begun(schedule=PATIENT) as line:
        line.flow.gather()
        line.engine.gives("a")
        line.flow.release(more=True)
        assert line.client.bodies == [b"first [a]"]  # a first text never waits
        line.engine.gives("b")
        for _ in range(5):
            await next_iteration()
        line.engine.gives("c")
        assert line.client.bodies == [b"first [a]"]
        line.flow.gather()
        line.flow.release(more=False)
        await next_iteration()
        assert line.client.bodies == [b"first [a]", b"[bc]"]


async def test_text_waits_no_longer_than_it_may() -> None:
    async with begun() as line:
        for count, text in enumerate("abc", 1):
            line.flow.gather()
            line.engine.gives(text)
            line.flow.release(more=True)
            await until(partial(line.client.has, count))
        assert line.client.bodies == [b"first [a]", b"[b]", b"[c]"]


async def test_text_waits_while_requests_come_in() -> None:
    flow = FlushScheduler(lambda _: None, PATIENT)
    engines, clients = [Engine() for _ in range(4)], [Client() for _ in range(4)]

    def come(n: int) -> asyncio.Task[None]:
        answer = TokenStream(engines[n], flow, Frames(), failure)
        return asyncio.create_task(answer(http_scope(), clients[n].receive, clients[n].send))

    answering = [come(0)]
    await next_iteration()
    engines[0].gives("a")
    await next_iteration()
    with flow.preparing():
        for _ in range(2 * SCHEDULE.short_iterations):  # iterations during a request do not count
            await next_iteration()
            engines[0].gives(".")
    for n in (1, 2, 3):
        with flow.preparing():
            answering.append(come(n))
            await next_iteration()
        engines[0].gives(str(n))
        engines[n].gives("x")
        await next_iteration()
    assert clients[0].bodies == [b"first [a]"]
    for _ in range(SCHEDULE.short_iterations):
        await next_iteration()
    assert clients[0].bodies == [b"first [a]", b"[........123]"]
    assert [client.bodies for client in clients[1:]] == [[b"first [x]"]] * 3
    for client in clients:
        client.leaves()
    await soon(asyncio.gather(*answering))


async def test_text_does_not_wait_for_a_request_that_failed() -> None:
    async with begun(schedule=PATIENT) as line:
        await line.gives("a")
        with pytest.raises(KeyError), line.flow.preparing():
            raise KeyError
        line.engine.gives("b")
        await until(partial(line.client.has, 2))
        assert line.client.bodies == [b"first [a]", b"[b]"]


async def test_first_texts_precede_later_text_without_its_share() -> None:
    one_each = Schedule(flush_s=0)  # iteration writes one of them
    async with several(3, schedule=one_each) as (flow, engines, clients):
        for engine in engines:
            engine.gives("b")
        newest, client = Engine(), Client()
        (answering,) = asked(flow, [newest], [client])
        while not clients[0].has(2):
            await next_iteration()
        newest.gives("x")
        assert [len(each.bodies) for each in (*clients, client)] == [2, 1, 1, 0]
        await next_iteration()
        assert [len(each.bodies) for each in (*clients, client)] == [2, 2, 1, 1]
        await next_iteration()
        assert [each.bodies[-1] for each in clients] == [b"[b]"] * 3
        client.leaves()
        await soon(answering)


async def test_end_precedes_later_text_of_others() -> None:
    lags: list[float] = []
    async with several(2, lags.append) as (flow, engines, clients):
        lags.clear()
        flow.gather()
        engines[0].gives("b", time.monotonic() - 5)
        engines[1].ends()
        engines[1].gives("c")
        flow.release(more=False)
        for _ in range(SCHEDULE.short_iterations - 1):
            assert [client.bodies[-1] for client in clients] == [b"first [a]", b"[c] stop None 7+2"]
            await next_iteration()
        await next_iteration()
        assert clients[0].bodies[-1] == b"[b]"
        assert [round(lag) for lag in lags] == [0, 5]


async def test_ends_hold_up_others_no_longer_than_they_may() -> None:
    async with several(2) as (_, engines, clients):
        engines[1].ends()
        await next_iteration()
        engines[0].gives("b")
        await next_iteration()
        assert [len(client.bodies) for client in clients] == [1, 2]
        time.sleep(1.1 * SCHEDULE.collect_s)  # noqa: ASYNC251  # no short iteration
        await next_iteration()
        assert clients[0].bodies[-1] == b"[b]"


# --- errors


async def test_what_fails_before_the_first_byte_is_raised() -> None:
    busy = Overloaded("busy", retry_after_s=1)
    line = Line(Engine())
    line.answering = asyncio.create_task(line.answer())
    await soon(line.engine.begun.wait())
    line.engine.fails(busy)
    with pytest.raises(Overloaded) as raised:
        await soon(line.answering)
    assert raised.value is busy
    assert raised.value.__suppress_context__  # the cancellation by which it got here says nothing
    assert line.client.sent == []
    assert line.engine.aborts == 0
    assert not line.answering.cancelling()


async def test_what_fails_later_is_the_last_event() -> None:
    async with begun() as line:
        await line.gives("a")
        line.engine.fails(RequestError("no", code="late"))
        await soon(line.answering)
    assert line.client.status == 200
    assert line.client.bodies == [b"first [a]", b"data: late\n\n"]
    assert line.client.sent[-1]["more_body"] is False
    assert line.engine.aborts == 0


async def test_what_the_engine_does_not_take_is_raised() -> None:
    line = Line(Engine(error=RequestError("too long")))
    with pytest.raises(RequestError, match="too long"):
        await soon(line.answer())
    assert line.client.sent == []


async def test_what_comes_after_the_end_is_not_written() -> None:
    async with begun() as line:
        line.engine.gives("a")
        line.engine.ends()
        await next_iteration()
        line.engine.gives("b")
        line.engine.fails(RequestError("no"))
        await next_iteration()
        assert len(line.client.bodies) == 1


# --- quiet streams


async def test_headers_are_sent_without_an_early_first_text() -> None:
    async with begun(schedule=replace(HURRIED, headers_s=0.01)) as line:
        await until(lambda: bool(line.client.sent))
        assert line.client.status == 200
        assert b"".join(line.client.bodies) == b""
        await line.gives("a")
        assert line.client.bodies[-1] == b"first [a]"
        line.engine.fails(RequestError("no", code="late"))
        await soon(line.answering)
    assert line.client.bodies[-1] == b"data: late\n\n"


async def test_headers_are_sent_before_the_request_is_accepted() -> None:
    gate = Gate()
    async with begun(Engine(gate=gate), schedule=replace(HURRIED, headers_s=0.01)) as line:
        await until(lambda: bool(line.client.sent))
        gate.opened.set()
        await line.gives("a")
        assert line.client.bodies[-1] == b"first [a]"


async def test_a_quiet_stream_gets_a_comment() -> None:
    async with begun(schedule=replace(HURRIED, ping_s=0.01)) as line:
        line.engine.gives("a")
        await until(lambda: len(line.client.bodies) > 2)
        assert line.client.bodies[:3] == [b"first [a]", b": ping\n\n", b": ping\n\n"]
        await line.gives("b")
        assert line.client.bodies[-1] == b"[b]"


async def test_a_stream_with_text_gets_no_comment() -> None:
    async with begun(schedule=replace(HURRIED, ping_s=60)) as line:
        line.engine.gives("a")
        await asyncio.sleep(0.03)
        assert line.client.bodies == [b"first [a]"]


async def test_an_answer_that_is_out_gets_no_comment() -> None:
    """Until the server has told that the client is gone or done."""
    async with begun(schedule=replace(HURRIED, ping_s=0.0)) as line:
        line.engine.gives("a")
        line.engine.ends()
        await next_iteration()
        bodies = list(line.client.bodies)
        line.stream.tend(time.monotonic() + 100)
        assert line.client.bodies == bodies


# --- clients that read slowly or not at all


async def test_text_for_a_slow_client_becomes_one_event_in_order() -> None:
    async with begun() as line:
        await line.gives("a")
        line.client.stops_reading()
        await line.gives("b", "c", "d")
        assert line.client.bodies == [b"first [a]"]
        line.client.reads.set()
        await until(lambda: len(line.client.bodies) == 3)
        assert line.client.bodies == [b"first [a]", b"[b]", b"[cd]"]
        await line.gives("e")
        assert line.client.bodies[-1] == b"[e]"


async def test_a_client_may_pause_before_the_headers() -> None:
    async with begun() as line:
        line.client.stops_reading()
        await line.gives("a")
        line.engine.gives("b")
        line.engine.ends()
        await next_iteration()
        assert line.client.sent == []
        line.client.reads.set()
        await soon(line.answering)
    assert line.client.status == 200
    assert line.client.bodies == [b"first [a]", b"[b] stop None 7+2"]


async def test_a_client_may_pause_again_and_again() -> None:
    async with begun() as line:
        for n in range(5):
            line.client.stops_reading()
            for _ in range(3):
                await line.gives(str(n))
            line.client.reads.set()
            await next_iteration()
        await line.ends()
    text = b"".join(line.client.bodies).replace(b"][", b"")
    assert text == b"first [000111222333444] stop None 7+15"


async def test_step_without_text_keeps_the_stream_of_a_slow_client() -> None:
    async with begun() as line:
        await line.gives("a")
        line.client.stops_reading()
        await line.gives("b")
        line.stream.took(0, time.monotonic())
        await next_iteration()
        line.client.reads.set()
        await until(lambda: len(line.client.bodies) == 2)
        await next_iteration()
        line.engine.gives("c")
        await until(lambda: b"[c]" in line.client.bodies)


async def test_an_end_and_a_failure_wait_for_a_slow_client() -> None:
    async with begun() as line:
        await line.gives("a")
        line.client.stops_reading()
        await line.gives("b")
        line.engine.fails(RequestError("no", code="late"))
        await next_iteration()
        line.client.reads.set()
        await soon(line.answering)
    assert line.client.bodies == [b"first [a]", b"[b]", b"data: late\n\n"]
    assert line.engine.aborts == 0


async def test_a_client_for_which_too_much_waits_is_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "HELD_LIMIT", 10)
    async with begun(schedule=HURRIED) as line:
        line.client.stops_reading()
        await line.gives("a")
        line.engine.gives("x" * 11)
        await soon(line.answering)
        line.client.reads.set()
    assert line.client.aborts >= 1
    assert line.engine.aborts == 1


async def test_a_client_that_pauses_for_a_while_is_not_cut_off() -> None:
    async with begun(schedule=HURRIED) as line:
        line.client.stops_reading()
        line.engine.gives("a")
        await asyncio.sleep(0.03)
        line.client.reads.set()
        await until(lambda: bool(line.client.bodies))
    assert line.client.aborts == 0


@pytest.mark.parametrize("later", [False, True], ids=["at once", "after a wait"])
async def test_a_write_that_breaks_ends_the_connection(
    caplog: pytest.LogCaptureFixture, *, later: bool
) -> None:
    async with begun() as line:
        await line.gives("a")
        if later:
            line.client.stops_reading()
        line.client.breaks = OSError("connection lost")
        await line.gives("b")
        line.client.reads.set()
        await soon(line.answering)
    assert line.client.aborts == 1
    assert line.engine.aborts == 1
    assert "an event could not be written" in caplog.text


# --- a server that writes without being awaited


async def test_direct_write_has_all_but_headers_and_last_event() -> None:
    async with begun(direct=True) as line:
        await line.gives("a", "b", "c")
        await line.ends()
    assert line.client.written == [b"first [a]", b"[b]", b"[c]"]
    assert line.client.bodies == [b"first [a]", b"[b]", b"[c]", b"[] stop None 7+3"]


async def test_headers_alone_are_not_written_directly() -> None:
    async with begun(direct=True, schedule=replace(HURRIED, headers_s=0.01)) as line:
        await until(lambda: bool(line.client.sent))
        assert line.client.bodies == [b""]
        assert line.client.written == []  # an empty chunk is the end of a body


async def test_headers_are_held_for_the_first_event() -> None:
    line = Line(Engine())
    held: list[int] = []
    line.extensions[HOLD] = lambda: held.append(len(line.client.sent))
    line.answering = asyncio.create_task(line.answer())
    await soon(line.engine.begun.wait())
    await line.gives("a", "b")
    assert held == [0]
    await line.leaves()


async def test_text_after_a_failed_direct_write_keeps_its_order() -> None:
    async with begun(direct=True) as line:
        await line.gives("a")
        line.client.stops_reading()
        await line.gives("b", "c")
        line.client.reads.set()
        line.engine.gives("d")
        await until(lambda: len(line.client.bodies) > 2)
        await line.gives("e")
        await line.ends()
    text = b"".join(line.client.bodies).replace(b"][", b"")
    assert text == b"first [abcde] stop None 7+5"


async def test_a_stream_that_is_written_directly_is_not_quiet() -> None:
    async with begun(direct=True, schedule=replace(HURRIED, ping_s=1.0)) as line:
        await line.gives("a", "b")
        line.stream.tend(time.monotonic() + 0.5)
        assert line.client.bodies == [b"first [a]", b"[b]"]
        line.stream.tend(time.monotonic() + 1.5)
        assert line.client.bodies[-1] == b": ping\n\n"


# --- the end


@pytest.mark.parametrize("texts", [0, 2])
async def test_disconnect_aborts_the_request_once(texts: int) -> None:
    async with begun() as line:
        for _ in range(texts):
            await line.gives("a")
        await line.leaves()
        assert line.counts == (7, texts)
        await line.gives("late")
    assert line.engine.aborts == 1
    assert len(line.client.bodies) == texts


async def test_disconnect_during_a_write_aborts_the_request_once() -> None:
    async with begun() as line:
        line.client.stops_reading()
        await line.gives("a")
        await line.leaves()
        line.client.reads.set()
        await next_iteration()
    assert line.engine.aborts == 1


async def test_an_answer_that_is_cut_aborts_its_request_once() -> None:
    async with begun() as line:
        await line.gives("a")
        await line.is_cut()
    assert line.engine.aborts == 1


async def test_cancellation_before_acceptance_aborts_the_request() -> None:
    gate = Gate()
    async with begun(Engine(gate=gate)) as line:
        await soon(gate.reached.wait())
        await line.is_cut()
    assert line.engine.aborts == 1


async def test_streams_that_have_ended_are_unregistered() -> None:
    line = Line(Engine(), HURRIED)
    flow = line.stream._flow
    line.answering = asyncio.create_task(line.answer())
    await next_iteration()
    assert flow._streams == {line.stream}
    await line.leaves()
    assert not flow._streams
    await until(lambda: not flow._tending)


async def test_text_waits_after_a_request_for_short_iterations() -> None:
    async with begun(schedule=PATIENT) as line:
        await line.gives("a")
        with line.flow.preparing():
            pass
        line.flow.gather()
        line.engine.gives("b")
        line.flow.release(more=False)
        for _ in range(3):
            time.sleep(2 * SCHEDULE.short_s)  # noqa: ASYNC251  # another callback takes long
            await next_iteration()
            assert line.client.bodies == [b"first [a]"]
        await until(partial(line.client.has, 2))
        assert line.client.bodies == [b"first [a]", b"[b]"]


class Clock:
    """Stands for `time` in `stream`: what it tells passes when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


async def test_each_text_waits_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(stream, "time", clock)
    async with several(2) as (flow, engines, clients):
        for engine in engines:
            flow.gather()
            engine.gives("b", clock.now)
            flow.release(more=True)
            clock.now += 0.8 * SCHEDULE.collect_s
        for expected in ([2, 1], [2, 2]):  # 1.6 and 0.8 of what each may wait, then 1.4
            await next_iteration()
            assert [len(client.bodies) for client in clients] == expected
            clock.now += 0.6 * SCHEDULE.collect_s


# --- failures that must not stop the others


def refusing(_: Message) -> None:
    raise RuntimeError("no message is taken")


async def test_tend_that_raises_leaves_others_tended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hurried = replace(HURRIED, ping_s=0.001)
    async with several(2, schedule=hurried) as (flow, engines, clients):
        broken = engines[0]._stream
        broken._send = refusing  # type: ignore[assignment]  # raises where it is called
        await until(lambda: engines[0].aborts == 1)
        before = len(clients[1].bodies)
        await until(lambda: len(clients[1].bodies) > before + 1)
        assert flow._streams == {engines[1]._stream}
    assert "an event could not be written" in caplog.text


async def test_abort_that_raises_leaves_others_written() -> None:
    def unclosable() -> None:
        raise RuntimeError("no connection")

    async with several(3) as (_, engines, clients):
        for engine in engines[:2]:
            engine._stream._write = failing
            engine._stream._abort = unclosable
        for engine in engines:
            engine.gives("b")
        await until(partial(clients[2].has, 2))
        await until(lambda: [engine.aborts for engine in engines] == [1, 1, 0])


async def test_lag_that_cannot_be_counted_loses_no_text() -> None:
    def uncounted(_: float) -> None:
        raise RuntimeError("no figure")

    async with several(2, uncounted) as (_, engines, clients):
        for text in "bc":
            for engine in engines:
                engine.gives(text)
            await next_iteration()
        for client in clients:
            await until(partial(client.has, 3))
            assert client.bodies == [b"first [a]", b"[b]", b"[c]"]


# --- an end before the answer's


async def test_end_early_cuts_off_client_that_does_not_read() -> None:
    async with begun() as line:
        await line.gives("a")
        line.client.stops_reading()
        await line.gives("b")
        await line.is_cut()
        sent = list(line.client.sent)
        await soon(line.stream.end_early(Overloaded("late", retry_after_s=1)))
        assert line.client.aborts == 1
        assert line.client.sent == sent
        line.client.reads.set()


async def test_end_early_sends_the_error_to_a_client_that_reads() -> None:
    async with begun() as line:
        await line.gives("a")
        await line.is_cut()
        await soon(line.stream.end_early(Overloaded("late", retry_after_s=1, code="late")))
        assert line.client.aborts == 0
        assert line.client.bodies == [b"first [a]", b"data: late\n\n"]
