"""Answers of the fast path, queued requests, retries and deadlines."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from starlette.responses import PlainTextResponse, Response

from llmserve.api.context import RequestContext
from llmserve.api.schedule import Schedule
from llmserve.api.sse import EventStream, PeekableStream
from llmserve.api.token_stream import FlushScheduler, TokenStream
from llmserve.errors import EngineDead, EngineError, LLMServeError, RequestError, StartupError
from llmserve.http import request_batcher
from llmserve.lifecycle.replica import State
from tests.fakes import (
    FAST,
    Answer,
    Call,
    FakeRunning,
    Gate,
    Plan,
    error_of,
    failing,
    failure,
    plain,
    soon,
    spec,
    stream,
    until,
)
from tests.unit.test_app import CHAT, HI, Box, asgi, begin, real

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from starlette.types import ASGIApp, Receive, Scope, Send

    from llmserve.api.endpoint_id import EndpointId


class FastPathModel(FakeRunning):
    """A model whose answers need no call."""

    def __init__(self, answer: Callable[[], ASGIApp | None]) -> None:
        super().__init__()
        self.known = answer
        self.asked: list[tuple[str, str, str]] = []
        self.preparing_now = 0

    @contextmanager
    def preparing(self) -> Iterator[None]:
        self.preparing_now += 1
        try:
            yield
        finally:
            self.preparing_now -= 1

    def try_fast_path(
        self, endpoint: EndpointId, body: dict[str, Any], asked: str, scope: Scope
    ) -> Any:
        assert self.preparing_now == 1
        self.asked.append((endpoint, asked, RequestContext.of(scope).id))
        return self.known()


def box_of(answer: Callable[[], ASGIApp | None]) -> Any:
    return asgi(chat=Plan(FastPathModel(answer)))


class Words:
    """`token_stream.StreamFrames`."""

    first = b""

    def middle(self, text: str) -> bytes:
        return text.encode()

    def last(self, text: str, finish: str, *_: object) -> bytes:
        return f"{text} {finish}".encode()


class Talking:
    """A request whose engine has written `text`; `token_stream.StreamSource`."""

    prompt_tokens = 1

    def __init__(self, text: str, error: LLMServeError | None = None) -> None:
        self._text, self._error = text, error
        self.aborts = 0

    def answer(self) -> TokenStream:
        flow = FlushScheduler(lambda _: None)
        return TokenStream(self, flow, Words(), failure)

    async def begin(self, stream: TokenStream) -> None:
        if self._error is not None:
            raise self._error
        if self._text:
            stream.pieces.append(self._text)
            stream.took(1, time.monotonic())

    async def abort(self) -> None:
        self.aborts += 1


async def test_fast_path_answer_needs_no_handler() -> None:
    async with box_of(lambda: PlainTextResponse("known")) as box:
        asked = HI | {"model": "gpt-4o"}
        reply = await box.client.post(CHAT, json=asked, headers={"x-request-id": "r1"})
        assert box.running.calls == []
        assert box.running.asked == [("chat completions", "gpt-4o", "r1")]
        assert box.running.preparing_now == 0
        assert box.in_flight == 0
        assert box.requests(200) == 1
    assert (reply.status_code, reply.text) == (200, "known")
    assert reply.headers["x-request-id"] == "r1"


async def test_handler_answers_without_a_fast_path() -> None:
    async with box_of(lambda: None) as box:
        reply = await box.client.post(CHAT, json=HI)
        assert len(box.running.calls) == 1
    assert reply.json()["asked"] == "chat"


async def test_fast_path_answer_holds_its_slot_until_its_end() -> None:
    gate = Gate()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await gate.wait()
        await PlainTextResponse("known")(scope, receive, send)

    async with box_of(lambda: slow) as box:
        asking = await begin(box, gate, HI)
        assert box.in_flight == 1
        assert (await box.client.post(CHAT, json=HI)).status_code == 503
        gate.opened.set()
        assert (await soon(asking)).text == "known"
        assert box.in_flight == 0


def _fails() -> ASGIApp:
    raise KeyError("secret")


async def test_fast_path_that_fails_releases_the_slot() -> None:
    async with box_of(_fails) as box:
        reply = await box.client.post(CHAT, json=HI)
        assert box.in_flight == 0
        assert box.running.preparing_now == 0
    assert (reply.status_code, error_of(reply)["code"]) == (500, "internal_error")


async def test_an_answer_that_fails_before_its_first_byte_is_an_error() -> None:
    source = Talking("", EngineDead("The engine has died."))
    async with box_of(source.answer) as box:
        reply = await box.client.post(CHAT, json=HI)
        assert box.in_flight == 0
        assert box.requests(503) == 1
    assert (reply.status_code, error_of(reply)["code"]) == (503, "engine_dead")
    assert len(reply.headers["x-request-id"]) == 32


@pytest.mark.parametrize("text", ["", "hello"], ids=["before its first byte", "in mid-stream"])
async def test_token_stream_gets_an_error_after_the_drain(text: str) -> None:
    source = Talking(text)
    async with box_of(source.answer) as box:
        asking = asyncio.ensure_future(box.client.post(CHAT, json=HI))
        await until(lambda: box.in_flight == 1)
        await soon(box.pool.drain(0.05))
        reply = await soon(asking)
        assert box.in_flight == 0
    if text:
        assert (reply.status_code, reply.text) == (200, "hellodata: shutting_down\n\n")
    else:
        assert (reply.status_code, error_of(reply)["code"]) == (503, "shutting_down")
    assert source.aborts == 1


async def test_disconnect_aborts_a_token_stream_and_is_counted() -> None:
    source = Talking("hello")
    async with real() as box:
        running = box.running
        running.try_fast_path = lambda *_: source.answer()  # type: ignore[method-assign, assignment]
        async with box.client.stream("POST", CHAT, json=HI) as reply:
            assert await soon(anext(reply.aiter_raw())) == b"hello"
        await until(lambda: source.aborts == 1)
        await until(lambda: box.in_flight == 0)
        await until(lambda: box.disconnects() == 1)


async def test_request_in_a_batch_gets_an_error_after_the_drain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate()

    async def join(_: request_batcher.RequestBatcher) -> None:
        await gate.wait()

    monkeypatch.setattr(request_batcher.RequestBatcher, "join", join)
    async with box_of(lambda: PlainTextResponse("known")) as box:
        asking = await begin(box, gate, HI)
        assert box.in_flight == 1
        assert box.running.preparing_now == 1  # others' text waits for it
        await soon(box.pool.drain(0.05))
        reply = await soon(asking)
        assert box.in_flight == box.running.preparing_now == 0
        assert box.running.asked == []
    assert (reply.status_code, error_of(reply)["code"]) == (503, "shutting_down")


async def test_many_at_once_are_all_answered() -> None:
    async with asgi(*_wide()) as box:
        replies = await asyncio.gather(*(_ask(box, n) for n in range(60)))
        assert box.in_flight == 0
    assert [reply.json()["body"]["n"] for reply in replies] == list(range(60))


def _wide() -> tuple[Any, ...]:
    return (spec("chat", max_in_flight=100),)


async def _ask(box: Box, n: int) -> Any:
    return await box.client.post(CHAT, json=HI | {"n": n})


@pytest.mark.parametrize(
    "length", [b"-5", b"abc", b"1_000", b"9" * 30], ids=["negative", "words", "python's", "huge"]
)
async def test_a_strange_content_length_is_no_crash(length: bytes) -> None:
    async with asgi() as box:
        body = b'{"model": "chat"}'
        reply = await box.client.post(CHAT, content=body, headers={b"content-length": length})
    assert reply.status_code == (413 if length.isdigit() else 200)


# --- a request that waits

STREAMED = HI | {"stream": True}
DATA = b"data: 1\n\n"


def lazy(gate: Gate, running: FakeRunning | None = None, **more: Any) -> dict[str, Any]:
    """A lazy `chat` that is ready once the gate opens."""
    plan = Plan(running or FakeRunning(stream(DATA)), ((State.LOADING, ""),), gate, **more)
    return {"chat": plan}


LAZY = (spec("chat", start="lazy"),)


TALKATIVE = Schedule(comment_s=0.005)


async def commented(box: Box, gate: Gate, path: str = CHAT) -> Any:
    """The answer to a streamed request whose model is ready after some comments."""
    asking = await begin(box, gate, STREAMED, path)
    await asyncio.sleep(0.03)
    gate.opened.set()
    return await soon(asking)


async def test_queued_stream_gets_comments_then_its_answer() -> None:
    gate = Gate()
    async with asgi(*LAZY, schedule=TALKATIVE, **lazy(gate)) as box:
        reply = await commented(box, gate)
        assert box.in_flight == 0
        assert box.requests(200) == 1
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert len(reply.headers["x-request-id"]) == 32
    *comments, last = reply.content.removesuffix(b"\n\n").split(b"\n\n")
    assert len(comments) >= 2
    assert all(each.startswith(b": ") for each in comments)
    assert b"loading" in comments[-1]
    assert last == b"data: 1"


@pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT, HI), (CHAT, HI | {"stream": False}), ("/v1/embeddings", STREAMED)],
    ids=["not a stream", "stream: false", "no text"],
)
async def test_an_answer_that_is_no_stream_has_no_comments(path: str, body: dict[str, Any]) -> None:
    gate = Gate()
    async with asgi(*LAZY, schedule=TALKATIVE, **lazy(gate, FakeRunning())) as box:
        asking = await begin(box, gate, body, path)
        await asyncio.sleep(0.02)
        gate.opened.set()
        reply = await soon(asking)
    assert reply.status_code == 200
    assert reply.json()["asked"] == "chat"


async def test_short_wait_begins_no_stream_early() -> None:
    gate = Gate()
    async with asgi(*LAZY, **lazy(gate)) as box:
        reply = await commented(box, gate)
    assert reply.content == DATA


@pytest.mark.parametrize(
    ("path", "begins", "kind", "ends"),
    [
        (CHAT, b"data: {", b'"code":"model_failed"', b"data: [DONE]\n\n"),
        ("/v1/messages", b"event: error\ndata: {", b'"type":"api_error"', b"}\n\n"),
        ("/v1/responses", b"event: error\ndata: {", b'"code":"model_failed"', b"}\n\n"),
    ],
)
async def test_an_error_after_comments_is_the_last_event(
    path: str, begins: bytes, kind: bytes, ends: bytes
) -> None:
    gate = Gate()
    failing_start = lazy(gate, error=StartupError("no memory left"))
    async with asgi(*LAZY, schedule=TALKATIVE, **failing_start) as box:
        reply = await commented(box, gate, path)
        assert box.in_flight == 0
    assert reply.status_code == 200
    last = b"\n\n".join(each for each in reply.content.split(b"\n\n") if not each.startswith(b": "))
    assert last.startswith(begins)
    assert last.endswith(ends)
    assert kind in last


async def test_request_error_after_comments_is_the_last_event() -> None:
    gate = Gate()
    async with asgi(
        *LAZY, schedule=TALKATIVE, **lazy(gate, FakeRunning(failing(RequestError("too long"))))
    ) as box:
        reply = await commented(box, gate)
    assert reply.status_code == 200
    assert b"data: {" in reply.content
    assert b"too long" in reply.content
    assert reply.content.endswith(b"data: [DONE]\n\n")


async def test_a_token_stream_goes_on_after_comments() -> None:
    gate, source = Gate(), Talking("hello")
    async with asgi(*LAZY, schedule=TALKATIVE, **lazy(gate, FastPathModel(source.answer))) as box:
        asking = await begin(box, gate, STREAMED)
        await asyncio.sleep(0.02)
        gate.opened.set()
        await until(lambda: box.in_flight == 1)
        await soon(box.pool.drain(0.05))
        reply = await soon(asking)
    assert reply.content.startswith(b": ")
    assert reply.content.endswith(b"\n\nhellodata: shutting_down\n\n")


@pytest.mark.parametrize("streamed", [True, False])
async def test_disconnect_removes_the_request_from_the_queue(streamed: bool) -> None:
    gate = Gate()
    async with real(spec("chat", start="lazy"), schedule=TALKATIVE) as box:
        box.backend.plans["chat"] = lazy(gate)["chat"]
        body = HI | {"stream": streamed}
        asking = await begin(box, gate, body)
        slots = box.pool.models["chat"].slots
        await until(lambda: slots.waiting() == 1)
        await asyncio.sleep(0.01)
        asking.cancel()
        await until(lambda: slots.waiting() == 0)
        gate.opened.set()
        await until(lambda: box.pool.models["chat"].state is State.READY)
        await until(lambda: box.disconnects() == 1)
        assert (box.in_flight, box.running.calls) == (0, [])


async def test_queued_requests_get_slots_in_order() -> None:
    gate = Gate()
    async with asgi(spec("chat", max_in_flight=1, max_queue=2)) as box:
        box.running.answer = plain(gate=gate)
        asking = [asyncio.ensure_future(_ask(box, number)) for number in range(3)]
        await until(lambda: box.pool.models["chat"].slots.waiting() == 2)
        refused = await _ask(box, 3)
        assert (refused.status_code, error_of(refused)["code"]) == (503, "overloaded")
        gate.opened.set()
        replies = [await soon(each) for each in asking]
        assert [call.body["n"] for call in box.running.calls] == [0, 1, 2]
        assert box.in_flight == 0
    assert [reply.status_code for reply in replies] == [200] * 3


# --- an engine that dies over a request


def _dying(times: int, then: Answer) -> Answer:
    """So many calls end with the engine's death."""
    left = [True] * times

    async def answer(call: Call) -> Response:
        if left:
            left.pop()
            raise EngineDead("The engine has died.")
        return await then(call)

    return answer


@pytest.mark.parametrize(
    ("answer", "calls", "status", "code"),
    [
        (_dying(1, plain()), 2, 200, None),
        (_dying(2, plain()), 2, 503, "engine_dead"),
        (failing(EngineError("no")), 1, 500, "engine_error"),
    ],
    ids=["one death", "two deaths", "another error"],
)
async def test_request_is_retried_once_after_a_death(
    answer: Answer, calls: int, status: int, code: str | None
) -> None:
    async with asgi(chat=Plan(FakeRunning(answer))) as box:
        reply = await box.client.post(CHAT, json=HI)
        assert len(box.running.calls) == calls
        assert box.in_flight == 0
        assert box.requests(status) == 1
    assert reply.status_code == status
    assert code is None or error_of(reply)["code"] == code


async def test_retry_waits_for_the_restarted_engine() -> None:
    async with asgi(spec("chat"), timings=FAST) as box:

        async def dies(call: Call) -> Response:
            if len(box.running.calls) == 1:
                box.running.dead = True
                raise EngineDead("The engine has died.")
            return await plain()(call)

        box.running.answer = dies
        reply = await soon(box.client.post(CHAT, json=HI))
    assert reply.status_code == 200
    assert box.backend.started.count("chat") == 2
    assert box.in_flight == 0


async def test_stream_that_has_begun_is_not_retried() -> None:
    async def breaking() -> AsyncGenerator[bytes, None]:
        yield DATA
        raise EngineDead("The engine has died.")

    async def answer(_: Call) -> Response:
        return EventStream(PeekableStream(breaking(), failure))

    async with asgi(chat=Plan(FakeRunning(answer))) as box:
        reply = await box.client.post(CHAT, json=STREAMED)
        assert len(box.running.calls) == 1
    assert (reply.status_code, reply.content) == (200, DATA + b"data: engine_dead\n\n")


@pytest.mark.parametrize("text", ["", "hello"], ids=["before its first byte", "in mid-stream"])
async def test_token_stream_is_retried_before_its_first_byte(text: str) -> None:
    """Streams whose engine dies, as its output handler reports it."""
    streams: list[TokenStream] = []

    class Dying(Talking):
        async def begin(self, stream: TokenStream) -> None:
            await super().begin(stream)
            asyncio.get_running_loop().call_later(
                0.01, stream.failed, EngineDead("The engine has died.")
            )

    def answer() -> TokenStream:
        streams.append(Dying(text).answer())
        return streams[-1]

    async with box_of(answer) as box:
        reply = await soon(box.client.post(CHAT, json=STREAMED))
        assert box.in_flight == 0
    if text:
        assert (reply.status_code, reply.text) == (200, "hellodata: engine_dead\n\n")
        assert len(streams) == 1
    else:
        assert (reply.status_code, error_of(reply)["code"]) == (503, "engine_dead")
        assert len(streams) == 2


# --- deadlines


@pytest.mark.parametrize(
    ("own", "model_s", "shown_s"),
    [
        ("0.05", None, "0.05"),
        (None, 0.05, "0.05"),
        ("0.05", 60.0, "0.05"),
        ("60", 0.05, "0.05"),
    ],
)
async def test_the_shorter_deadline_ends_a_request(
    own: str | None, model_s: float | None, shown_s: str
) -> None:
    gate = Gate()
    headers = {"x-request-timeout": own} if own else {}
    async with asgi(spec("chat", timeout=model_s)) as box:
        box.running.answer = plain(gate=gate)
        reply = await soon(box.client.post(CHAT, json=HI, headers=headers))
        assert box.in_flight == 0
        assert box.requests(504) == 1
    assert gate.cancelled
    assert (reply.status_code, error_of(reply)["code"]) == (504, "deadline_exceeded")
    assert error_of(reply)["message"] == f"The request took longer than its {shown_s} s."
    assert error_of(reply)["type"] == "timeout_error"


@pytest.mark.parametrize("token", [True, False], ids=["fast path", "vLLM"])
async def test_a_deadline_in_mid_stream_is_the_last_event(token: bool) -> None:
    gate, source = Gate(), Talking("data: 1\n\n")
    running = FastPathModel(source.answer) if token else FakeRunning(stream(DATA, gate=gate))
    async with asgi(chat=Plan(running)) as box:
        headers = {"x-request-timeout": "0.05"}
        reply = await soon(box.client.post(CHAT, json=STREAMED, headers=headers))
        assert box.in_flight == 0
    assert reply.status_code == 200
    assert reply.content == DATA + b"data: deadline_exceeded\n\n"
    assert source.aborts if token else gate.cancelled


async def test_a_deadline_ends_a_token_stream_before_its_first_byte() -> None:
    source = Talking("")
    async with box_of(source.answer) as box:
        headers = {"x-request-timeout": "0.02"}
        reply = await soon(box.client.post(CHAT, json=STREAMED, headers=headers))
        assert box.in_flight == 0
    assert (reply.status_code, error_of(reply)["code"]) == (504, "deadline_exceeded")
    assert source.aborts == 1


async def test_deadline_in_the_queue_ends_one_request_only() -> None:
    gate = Gate()
    async with asgi(spec("chat", max_in_flight=1)) as box:
        box.running.answer = plain(gate=gate)
        first = await begin(box, gate, HI | {"n": 0})
        last = asyncio.ensure_future(_ask(box, 2))
        headers = {"x-request-timeout": "0.02"}
        late = await soon(box.client.post(CHAT, json=HI | {"n": 1}, headers=headers))
        gate.opened.set()
        assert [(await soon(each)).status_code for each in (first, last)] == [200, 200]
        assert [call.body["n"] for call in box.running.calls] == [0, 2]
    assert (late.status_code, error_of(late)["code"]) == (504, "deadline_exceeded")


async def test_a_deadline_after_comments_is_the_last_event() -> None:
    gate = Gate()
    async with asgi(spec("chat", max_in_flight=1), schedule=TALKATIVE) as box:
        box.running.answer = plain(gate=gate)
        first = await begin(box, gate, HI | {"n": 0})
        headers = {"x-request-timeout": "0.03"}
        late = await soon(box.client.post(CHAT, json=STREAMED, headers=headers))
        gate.opened.set()
        await soon(first)
    assert late.status_code == 200
    assert late.content.startswith(b": ")
    assert b'"code":"deadline_exceeded"' in late.content
    assert late.content.endswith(b"data: [DONE]\n\n")


async def test_deadline_after_the_answer_has_no_effect() -> None:
    async with asgi() as box:
        headers = {"x-request-timeout": "0.02"}
        reply = await box.client.post(CHAT, json=HI, headers=headers)
        await asyncio.sleep(0.04)  # nothing cancels this task later
        assert (await box.client.post(CHAT, json=HI)).status_code == 200
    assert reply.status_code == 200


@pytest.mark.parametrize("given", ["", "abc", "0", "-1", "nan", "inf", "1e999", "1 s", "0x10"])
async def test_invalid_timeout_is_refused(given: str) -> None:
    async with asgi() as box:
        reply = await box.client.post(CHAT, json=HI, headers={"x-request-timeout": given})
        assert box.running.calls == []
    assert (reply.status_code, error_of(reply)["code"]) == (400, "invalid_value")
    assert error_of(reply)["message"] == (
        f"x-request-timeout must be seconds, greater than 0; it is `{given}`."
    )
