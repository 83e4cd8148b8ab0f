"""What `llmserve.work` does with answers that need no call of the model's handlers."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest
from starlette.responses import PlainTextResponse, Response

from llmserve import turns
from llmserve.errors import EngineDead, LLMServeError
from llmserve.stream import Flow, TokenStream
from tests.fakes import FakeRunning, Gate, Plan, failure, soon, until
from tests.unit.test_app import CHAT, HI, Box, asgi, error_of, real

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Receive, Scope, Send


class Expressed(FakeRunning):
    """A model whose answers need no call."""

    def __init__(self, answer: Callable[[], ASGIApp | None]) -> None:
        super().__init__()
        self.known = answer
        self.asked: list[tuple[str, str, str]] = []

    def express(self, endpoint: str, body: dict[str, Any], asked: str, scope: Scope) -> Any:
        self.asked.append((endpoint, asked, scope["state"]["request_id"]))
        return self.known()


def box_of(answer: Callable[[], ASGIApp | None]) -> Any:
    return asgi(chat=Plan(Expressed(answer)))


class Words:
    """`stream.Frames`."""

    first = b""

    def middle(self, text: str) -> bytes:
        return text.encode()

    def last(self, text: str, finish: str, *_: object) -> bytes:
        return f"{text} {finish}".encode()


class Talking:
    """A request in an engine that has said `text`; `stream.Source`."""

    prompt_tokens = 1

    def __init__(self, text: str, error: LLMServeError | None = None) -> None:
        self._text, self._error = text, error
        self.aborts = 0

    def answer(self) -> TokenStream:
        flow = Flow(lambda: False, lambda _: None)
        return TokenStream(self, flow, Words(), lambda e: Response(e.code, e.status), failure)

    async def begin(self, stream: TokenStream) -> None:
        if self._error is not None:
            raise self._error
        if self._text:
            stream.pieces.append(self._text)
            stream.took(1, time.monotonic())

    async def abort(self) -> None:
        self.aborts += 1


async def test_an_answer_that_is_known_needs_no_call() -> None:
    async with box_of(lambda: PlainTextResponse("known")) as box:
        asked = HI | {"model": "gpt-4o"}
        reply = await box.client.post(CHAT, json=asked, headers={"x-request-id": "r1"})
        assert box.running.calls == []
        assert box.running.asked == [("chat completions", "gpt-4o", "r1")]
        assert box.in_flight == 0
        assert box.requests(200) == 1
    assert (reply.status_code, reply.text) == (200, "known")
    assert reply.headers["x-request-id"] == "r1"


async def test_an_answer_that_is_not_known_is_the_handlers() -> None:
    async with box_of(lambda: None) as box:
        reply = await box.client.post(CHAT, json=HI)
        assert len(box.running.calls) == 1
    assert reply.json()["asked"] == "chat"


async def test_a_known_answer_holds_its_slot_until_it_is_out() -> None:
    gate = Gate()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await gate.wait()
        await PlainTextResponse("known")(scope, receive, send)

    async with box_of(lambda: slow) as box:
        asking = asyncio.ensure_future(box.client.post(CHAT, json=HI))
        await soon(gate.reached.wait())
        assert box.in_flight == 1
        assert (await box.client.post(CHAT, json=HI)).status_code == 503
        gate.opened.set()
        assert (await soon(asking)).text == "known"
        assert box.in_flight == 0


def _fails() -> ASGIApp:
    raise KeyError("secret")


async def test_a_look_for_a_known_answer_that_fails_gives_the_slot_back() -> None:
    async with box_of(_fails) as box:
        reply = await box.client.post(CHAT, json=HI)
        assert box.in_flight == 0
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
async def test_a_token_stream_that_outlasts_the_drain_is_told_so(text: str) -> None:
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


async def test_a_client_that_leaves_a_token_stream_aborts_it_and_is_counted() -> None:
    source = Talking("hello")
    async with real() as box:
        running = box.running
        running.express = lambda *_: source.answer()  # type: ignore[method-assign, assignment]
        async with box.client.stream("POST", CHAT, json=HI) as reply:
            assert await soon(anext(reply.aiter_raw())) == b"hello"
        await until(lambda: source.aborts == 1)
        await until(lambda: box.in_flight == 0)
        await until(lambda: box.disconnects() == 1)


async def test_a_request_that_waits_for_its_turn_is_told_when_the_server_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate()

    async def take(_: turns.Turns) -> None:
        await gate.wait()

    monkeypatch.setattr(turns.Turns, "take", take)
    async with asgi() as box:
        asking = asyncio.ensure_future(box.client.post(CHAT, json=HI))
        await soon(gate.reached.wait())
        assert box.in_flight == 1
        await soon(box.pool.drain(0.05))
        reply = await soon(asking)
        assert box.in_flight == 0
        assert box.running.calls == []
    assert (reply.status_code, error_of(reply)["code"]) == (503, "shutting_down")


async def test_many_at_once_are_all_answered() -> None:
    async with asgi(*_wide()) as box:
        replies = await asyncio.gather(*(_ask(box, n) for n in range(60)))
        assert box.in_flight == 0
    assert [reply.json()["body"]["n"] for reply in replies] == list(range(60))


def _wide() -> tuple[Any, ...]:
    from tests.fakes import spec

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
