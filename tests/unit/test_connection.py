"""Raw bytes on a real socket against the server as `llmserve up` configures it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from llmserve.api import token_stream
from llmserve.registry.spec import ServerSpec
from llmserve.server import process
from llmserve.server.connection import Connection
from llmserve.server.limits import Limits
from tests.fakes import Gate, soon, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from starlette.types import ASGIApp, Receive, Scope, Send

SWEEP_S = 0.02
HEAD = b"POST /a HTTP/1.1\r\nHost: x\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
BODY = b"GET /inside HTTP/1.1\r\nHost: x\r\n\r\n"  # which must never be a request


@dataclass
class Echo:
    """Answers with the request that it has read, and keeps it.

    /early answers before it has read the body, /stream in two pieces of unknown length,
    /endless until the client disconnects, /gate when `gate` opens.
    """

    seen: list[tuple[str, str, bytes]] = field(default_factory=list)
    headers: list[list[tuple[bytes, bytes]]] = field(default_factory=list)
    gate: Gate = field(default_factory=Gate)
    left: int = 0  # streams that ended because the client left
    wrote: list[bool] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path == "/early":
            self.seen.append((scope["method"], path, b""))
            await _answer(send, 413, b"early")
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left += 1
                return
            body += message["body"]
            more = message["more_body"]
        self.seen.append((scope["method"], path, body))
        self.headers.append(list(scope["headers"]))
        if path == "/gate":
            await self.gate.wait()
        if path == "/endless":
            await self._stream_until_left(send, receive)
        elif path == "/stream":
            await self._stream_twice(scope, send)
        elif path == "/large":
            await _answer(send, 200, b"x" * 2**23)
        else:
            await _answer(send, 200, orjson.dumps([scope["method"], path, body.decode("latin-1")]))

    async def _stream_twice(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one ", "more_body": True})
        wrote = scope["extensions"][token_stream.WRITE](b"two ")
        self.wrote.append(wrote)
        if not wrote:
            await send({"type": "http.response.body", "body": b"two ", "more_body": True})
        await send({"type": "http.response.body", "body": b"three", "more_body": False})

    async def _stream_until_left(self, send: Send, receive: Receive) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        writing = asyncio.ensure_future(_write_for_ever(send))
        await receive()
        self.left += 1
        writing.cancel()


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _write_for_ever(send: Send) -> None:
    while True:
        await send({"type": "http.response.body", "body": b"x" * 2**14, "more_body": True})
        await asyncio.sleep(0)


@dataclass
class Served:
    port: int
    uvicorn: process._Uvicorn

    @property
    def connections(self) -> set[Any]:
        return self.uvicorn.server_state.connections


@asynccontextmanager
async def serving(app: ASGIApp, **limits: Any) -> AsyncIterator[Served]:
    spec = ServerSpec(port=0, drain_timeout=1)
    bounds = Limits(**{"sweep_s": SWEEP_S} | limits)
    with process.bind(spec) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # accepted ones inherit it
        uvicorn = process._Uvicorn(process._uvicorn_config(spec, app, bounds))
        task = asyncio.ensure_future(uvicorn.serve(sockets=[listener]))
        try:
            yield Served(listener.getsockname()[1], uvicorn)
        finally:
            uvicorn.end()
            uvicorn.force_exit = True
            await soon(task, 60)


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, *parts: bytes) -> None:
        """Each part is a piece that the server reads by itself."""
        with contextlib.suppress(ConnectionError):
            for part in parts:
                self.writer.write(part)
                await self.writer.drain()
                for _ in range(3 if len(parts) > 1 else 0):
                    await asyncio.sleep(0)

    async def rest(self) -> bytes:
        """The bytes until the server closes the connection."""
        parts = []
        with contextlib.suppress(ConnectionError):
            while part := await soon(self.reader.read(2**16), 60):
                parts.append(part)
        return b"".join(parts)


@asynccontextmanager
async def client_of(served: Served) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


async def exchange(served: Served, *parts: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """What is answered until the connection closes."""
    async with client_of(served) as client:
        await client.send(*parts)
        return answers(await client.rest())


async def ask(*parts: bytes, **limits: Any) -> tuple[Echo, list[tuple[int, dict[str, str], bytes]]]:
    """The application of a new server, and what the server answers."""
    echo = Echo()
    async with serving(echo, **limits) as served:
        return echo, await exchange(served, *parts)


def answers(raw: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Status, headers and body of each answer. Fails on bytes that are none."""
    found = []
    while raw:
        head, _, raw = raw.partition(b"\r\n\r\n")
        line, *fields = head.decode("latin-1").split("\r\n")
        version, status, _ = line.split(" ", 2)
        assert version == "HTTP/1.1"
        headers = dict(each.lower().split(": ", 1) for each in fields)
        if status == "100":
            continue
        body, raw = _body(headers, raw)
        found.append((int(status), headers, body))
    return found


def _body(headers: dict[str, str], raw: bytes) -> tuple[bytes, bytes]:
    if "content-length" in headers:
        size = int(headers["content-length"])
        assert len(raw) >= size, "an answer is cut"
        return raw[:size], raw[size:]
    if "transfer-encoding" not in headers:
        return raw, b""
    body = b""
    while True:
        line, _, raw = raw.partition(b"\r\n")
        size = int(line, 16)
        body, end, raw = body + raw[:size], raw[size : size + 2], raw[size + 2 :]
        assert end == b"\r\n"
        if not size:
            return body, raw


def code_of(body: bytes) -> str:
    code: str = orjson.loads(body)["error"]["code"]
    return code


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def sized(body: bytes, head: bytes = HEAD) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def chunked(body: bytes, head: bytes = HEAD) -> bytes:
    half = len(body) // 2
    pieces = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (body[:half], body[half:]) if p)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n"


# --- offers of another protocol

OFFERS = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
    "websocket": b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA==\r\n",
    "expects": b"Connection: Upgrade\r\nUpgrade: h2c\r\nExpect: 100-continue\r\n",
}


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
@pytest.mark.parametrize("framed", [sized, chunked])
@pytest.mark.parametrize("split", [False, True])
async def test_upgrade_offer_leaves_the_body_intact(offer: bytes, framed: Any, split: bool) -> None:
    sent = framed(BODY, HEAD + offer)
    echo, got = await ask(*(bytewise(sent) if split else [sent]), LAST)
    assert [status for status, _, _ in got] == [200, 200]
    assert echo.seen == [("POST", "/a", BODY), ("GET", "/last", b"")]
    assert (b"upgrade", b"h2c") in echo.headers[0] or b"websocket" in offer


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
async def test_upgrade_offers_in_a_row_are_all_answered(offer: bytes) -> None:
    bare = b"GET /a HTTP/1.1\r\nHost: x\r\n" + offer + b"\r\n"
    echo, got = await ask(bare + sized(BODY, HEAD + offer) + bare + chunked(b"x") + LAST)
    assert [status for status, _, _ in got] == [200] * 5
    assert [body for _, _, body in echo.seen] == [b"", BODY, b"", b"x", b""]


@pytest.mark.parametrize("body", [b"", BODY])
async def test_connect_method_is_a_request_like_others(body: bytes) -> None:
    echo, got = await ask(sized(body, b"CONNECT /a HTTP/1.1\r\nHost: x\r\n") + LAST)
    assert [status for status, _, _ in got] == [200, 200]
    assert echo.seen[0] == ("CONNECT", "/a", body)


# --- framing that may not be served: RFC 9112, 2.2, 3.2, 5, 6.1, 6.3, 7.1

REFUSED = {
    "length and coding": HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "coding and length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    "the same length twice": HEAD + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "a list of lengths": HEAD + b"Content-Length: 3, 3\r\n\r\nabc",
    "signed length": HEAD + b"Content-Length: +3\r\n\r\nabc",
    "negative length": HEAD + b"Content-Length: -3\r\n\r\nabc",
    "hexadecimal length": HEAD + b"Content-Length: 0x3\r\n\r\nabc",
    "length with an underscore": HEAD + b"Content-Length: 1_0\r\n\r\nabc",
    "empty length": HEAD + b"Content-Length:\r\n\r\nabc",
    "length with a space inside": HEAD + b"Content-Length: 3 0\r\n\r\nabc",
    "overlong length": HEAD + b"Content-Length: 99999999999999999999\r\n\r\nabc",
    "gzip, chunked": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "gzip in a line of its own": HEAD
    + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "identity": HEAD + b"Transfer-Encoding: identity\r\n\r\nabc",
    "chunked twice": HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "chunked not last": HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "xchunked": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked with a parameter": HEAD + b"Transfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n",
    "quoted coding": HEAD + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "empty coding": HEAD + b"Transfer-Encoding:\r\n\r\n0\r\n\r\n",
    "coding in HTTP/1.0": b"POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "coding with a vertical tab": HEAD + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "folded coding": HEAD + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "folded header": HEAD + b"X: a\r\n Content-Length: 3\r\n\r\nabc",
    "space before the colon": HEAD + b"Content-Length : 3\r\n\r\nabc",
    "space before the name": b"POST /a HTTP/1.1\r\n Host: x\r\n\r\n",
    "line feed alone": b"POST /a HTTP/1.1\nHost: x\nContent-Length: 3\n\nabc",
    "line feed alone after a header": HEAD + b"X: a\n\r\n",
    "return alone in a value": HEAD + b"X: a\rContent-Length: 3\r\n\r\n",
    "zero byte in a value": HEAD + b"X: a\0b\r\n\r\n",
    "header without a name": HEAD + b": a\r\n\r\n",
    "header without a colon": HEAD + b"X\r\n\r\n",
    "no host": b"POST /a HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
    "two hosts": HEAD + b"Host: x\r\n\r\n",
    "HTTP/2.0": b"GET /a HTTP/2.0\r\nHost: x\r\n\r\n",
    "HTTP/0.9": b"GET /a HTTP/0.9\r\nHost: x\r\n\r\n",
    "HTTP/1.2": b"GET /a HTTP/1.2\r\nHost: x\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "unknown method": b"FOO /a HTTP/1.1\r\nHost: x\r\n\r\n",
    "method in small letters": b"get /a HTTP/1.1\r\nHost: x\r\n\r\n",
    "authority as a target": b"CONNECT x:443 HTTP/1.1\r\nHost: x:443\r\n\r\n",
    "target without a host": b"GET http:///a HTTP/1.1\r\nHost: x\r\n\r\n",
    "target with a byte over 127": b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 no http\r\n\r\n",
}
BROKEN_BODIES = {
    "size with a sign": b"+3\r\nabc\r\n0\r\n\r\n",
    "size with 0x": b"0x3\r\nabc\r\n0\r\n\r\n",
    "size with a space": b"3 \r\nabc\r\n0\r\n\r\n",
    "no size": b"\r\nabc\r\n0\r\n\r\n",
    "overlong size": b"fffffffffffffffff\r\nabc",
    "size and a line feed": b"3\nabc\r\n0\r\n\r\n",
    "extension and a line feed": b"3;a=b\nabc\r\n0\r\n\r\n",
    "line feed in an extension": b'3;a="\n"\r\nabc\r\n0\r\n\r\n',
    "data over the size": b"3\r\nabcXX0\r\n\r\n",
    "data and a line feed": b"3\r\nabc\n0\r\n\r\n",
    "length as a trailer": b"3\r\nabc\r\n0\r\nContent-Length: 3\r\n\r\n",
    "coding as a trailer": b"3\r\nabc\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "trailer and a line feed": b"3\r\nabc\r\n0\r\nX: a\n\r\n",
}


@pytest.mark.parametrize("sent", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("split", [False, True])
async def test_forbidden_head_is_refused_and_closes(sent: bytes, split: bool) -> None:
    echo, ((status, headers, body),) = await ask(*(bytewise(sent) if split else [sent]), BODY, LAST)
    assert status in {400, 501, 505}
    assert headers["connection"] == "close"
    assert headers["x-request-id"]
    assert code_of(body) == "invalid_http"
    assert echo.seen == []


@pytest.mark.parametrize("broken", BROKEN_BODIES.values(), ids=BROKEN_BODIES)
@pytest.mark.parametrize("split", [False, True])
async def test_broken_chunks_are_refused_and_close(broken: bytes, split: bool) -> None:
    echo = Echo()
    sent = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + broken
    async with serving(echo) as served:
        ((status, headers, body),) = await exchange(
            served, *(bytewise(sent) if split else [sent]), BODY, LAST
        )
        await until(lambda: echo.left == 1)
    assert (status, headers["connection"], code_of(body)) == (400, "close", "invalid_http")
    assert echo.seen == []


# --- framing that is served

SERVED = {
    "spaces around a length": (HEAD + b"Content-Length: \t 3 \t\r\n\r\nabc", b"abc"),
    "coding in capitals": (HEAD + b"Transfer-Encoding: Chunked \r\n\r\n0\r\n\r\n", b""),
    "empty element of a coding": (HEAD + b"Transfer-Encoding: , chunked\r\n\r\n0\r\n\r\n", b""),
    "extension": (
        HEAD + b'Transfer-Encoding: chunked\r\n\r\n3;a=b;c="d"\r\nabc\r\n0;x\r\n\r\n',
        b"abc",
    ),
    "leading zeros of a size": (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n0003\r\nabc\r\n000\r\n\r\n",
        b"abc",
    ),
    "empty lines first": (b"\r\n\r\n" + HEAD + b"Content-Length: 3\r\n\r\nabc", b"abc"),
    "no length": (HEAD + b"\r\n", b""),
    "upgrade without its connection option": (
        HEAD + b"Upgrade: h2c\r\nContent-Length: 3\r\n\r\nabc",
        b"abc",
    ),
}


@pytest.mark.parametrize(("sent", "body"), SERVED.values(), ids=SERVED)
@pytest.mark.parametrize("split", [False, True])
async def test_odd_but_valid_framing_is_served(sent: bytes, body: bytes, split: bool) -> None:
    echo, got = await ask(*(bytewise(sent) if split else [sent]), LAST)
    assert [status for status, _, _ in got] == [200, 200]
    assert echo.seen == [("POST", "/a", body), ("GET", "/last", b"")]


async def test_body_of_a_get_is_read_as_its_body() -> None:
    echo, _ = await ask(sized(BODY, b"GET /a HTTP/1.1\r\nHost: x\r\n") + LAST)
    assert echo.seen == [("GET", "/a", BODY), ("GET", "/last", b"")]


async def test_trailers_do_not_become_headers() -> None:
    sent = HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Api-Key: k\r\n\r\n"
    echo, _ = await ask(sent + LAST)
    assert echo.seen[0] == ("POST", "/a", b"abc")
    assert b"x-api-key" not in dict(echo.headers[0])


async def test_absolute_target_replaces_the_host() -> None:
    """RFC 9112, 3.2.2: a proxy may have routed by it."""
    sent = b"GET http://other.example:81/a?b HTTP/1.1\r\nHost: localhost\r\n\r\n"
    echo, _ = await ask(sent + b"GET http://[::1] HTTP/1.1\r\nHost: x\r\n\r\n" + LAST)
    assert [path for _, path, _ in echo.seen] == ["/a", "/", "/last"]
    hosts = [[v for n, v in headers if n == b"host"] for headers in echo.headers]
    assert hosts == [[b"other.example:81"], [b"[::1]"], [b"x"]]


async def test_head_request_gets_no_body() -> None:
    async with serving(Echo()) as served, client_of(served) as client:
        await client.send(b"HEAD /a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        head, _, body = (await client.rest()).partition(b"\r\n\r\n")
    assert b"content-length: " in head
    assert body == b""


# --- the order of answers


async def test_requests_in_a_row_are_answered_in_order() -> None:
    _, got = await ask(b"".join(sized(b"%d" % n) for n in range(9)) + LAST)
    assert [orjson.loads(body)[2] for _, _, body in got] == [*map(str, range(9)), ""]


@pytest.mark.parametrize("fault", [b"\0\r\n\r\n", HEAD + b"Content-Length: x\r\n\r\n"])
async def test_refusal_waits_for_the_answers_before_it(fault: bytes) -> None:
    """Otherwise it would be in the middle of them."""
    echo = Echo()
    gated = b"GET /gate HTTP/1.1\r\nHost: x\r\n\r\n"
    streamed = b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n"
    async with serving(echo) as served, client_of(served) as client:
        await client.send(gated + streamed + fault + LAST)
        await soon(echo.gate.reached.wait())
        echo.gate.opened.set()
        got = answers(await client.rest())
    assert [status for status, _, _ in got] == [200, 200, 400]
    assert got[1][2] == b"one two three"
    assert [path for _, path, _ in echo.seen] == ["/gate", "/stream"]


async def test_broken_body_in_the_queue_is_refused_in_order() -> None:
    echo = Echo()
    broken = HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
    async with serving(echo) as served, client_of(served) as client:
        await client.send(b"GET /gate HTTP/1.1\r\nHost: x\r\n\r\n" + broken)
        await soon(echo.gate.reached.wait())
        echo.gate.opened.set()
        got = answers(await client.rest())
    assert [status for status, _, _ in got] == [200, 400]
    assert [path for _, path, _ in echo.seen] == ["/gate"]


async def test_nothing_is_served_after_a_request_that_closes() -> None:
    for closes in (
        HEAD + b"Connection: close\r\n\r\n",
        b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    ):
        echo = Echo()
        async with serving(echo) as served:
            got = await exchange(served, closes + BODY + b"\0 no http")
        assert [status for status, _, _ in got] == [200]
        assert [path for _, path, _ in echo.seen] == ["/a"]


async def test_answer_before_the_body_leaves_the_next_request_intact() -> None:
    early = sized(BODY * 1000, b"POST /early HTTP/1.1\r\nHost: x\r\n")
    echo, got = await ask(early[:60], early[60:] + LAST)
    assert [status for status, _, _ in got] == [413, 200]
    assert [path for _, path, _ in echo.seen] == ["/early", "/last"]


@pytest.mark.parametrize("closes", [b"", b"Connection: close\r\n"])
async def test_answer_before_a_large_body_arrives_whole(closes: bytes) -> None:
    """A close with unread bytes would reset the connection."""
    early = sized(b"x" * 2**23, b"POST /early HTTP/1.1\r\nHost: x\r\n" + closes)
    _, got = await ask(early, *([] if closes else [LAST]))
    assert got[0][0] == 413
    assert len(got) == (1 if closes else 2)


@pytest.mark.parametrize("closes", [b"", b"Connection: close\r\n"])
async def test_rest_of_a_body_has_a_time_limit(closes: bytes) -> None:
    head = b"POST /early HTTP/1.1\r\nHost: x\r\n" + closes + b"Content-Length: 1000000000\r\n\r\n"
    async with serving(Echo(), linger_s=0.1) as served, client_of(served) as client:
        await client.send(head)
        while served.connections:  # keeps sending while the connection is open
            await client.send(b"x")
            await asyncio.sleep(0.01)
        assert [status for status, _, _ in answers(await client.rest())] == [413]


async def test_unread_expected_body_closes_the_connection() -> None:
    """The client may send the body or not, so the next bytes are ambiguous."""
    echo = Echo()
    head = b"POST /early HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 500\r\n\r\n"
    async with serving(echo) as served, client_of(served) as client:
        await client.send(head)
        reply = await soon(client.reader.readuntil(b"early"))
        assert b"connection: close\r\n" in reply
        await client.send(LAST)
        assert await client.rest() == b""
    assert [path for _, path, _ in echo.seen] == ["/early"]


async def test_expected_body_gets_one_100_continue() -> None:
    echo = Echo()
    async with serving(echo) as served, client_of(served) as client:
        await client.send(HEAD + b"Expect: 100-continue \r\nContent-Length: 3\r\n\r\n")
        assert await soon(client.reader.readuntil(b"\r\n\r\n")) == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b"abc" + LAST)
        assert [status for status, _, _ in answers(await client.rest())] == [200, 200]


# --- HTTP/1.0


@pytest.mark.parametrize("more", [b"", b"Connection: keep-alive\r\n", b"Expect: 100-continue\r\n"])
async def test_http_1_0_stream_has_no_chunks_and_ends_with_it(more: bytes) -> None:
    echo = Echo()
    async with serving(echo) as served, client_of(served) as client:
        await client.send(b"GET /stream HTTP/1.0\r\n" + more + b"\r\n")
        ((status, headers, body),) = answers(await client.rest())
    assert (status, body) == (200, b"one two three")
    assert "transfer-encoding" not in headers
    assert headers["connection"] == "close"
    assert echo.wrote == [False]


async def test_http_1_0_answer_of_known_length_closes() -> None:
    _, ((status, headers, _),) = await ask(b"POST /a HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc")
    assert (status, headers["connection"]) == (200, "close")


async def test_http_1_1_stream_is_written_in_chunks() -> None:
    echo, got = await ask(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n" + LAST)
    assert got[0][2] == b"one two three"
    assert echo.wrote == [True]


# --- bounds in space

FILL = b"x" * 3000
LARGE = {
    "target": b"GET /" + FILL + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "value": HEAD + b"X: " + FILL + b"\r\n\r\n",
    "name": HEAD + FILL + b": x\r\n\r\n",
    "many headers": HEAD + b"a:b\r\n" * 20 + b"\r\n",
    "many bytes": HEAD + b"a: bcdefghijklmn\r\n" * 9 * 15 + b"\r\n",
}


@pytest.mark.parametrize("sent", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("split", [False, True])
async def test_large_head_is_refused_and_closes(sent: bytes, split: bool) -> None:
    echo = Echo()
    async with serving(echo, head_bytes=2048, headers=16) as served:
        parts = bytewise(sent) if split else [sent]
        ((status, headers, body),) = await exchange(served, *parts, LAST)
    assert (status, headers["connection"]) == (431, "close")
    assert code_of(body) == "headers_too_large"
    assert echo.seen == []


async def test_head_without_an_end_is_refused_where_it_is_too_large() -> None:
    """The parser keeps a value until its end."""
    _, ((status, _, _),) = await ask(HEAD + b"X: ", *[b"x" * 2**14] * 64)
    assert status == 431


async def test_head_of_the_limit_is_served_before_a_large_body() -> None:
    line = b"X: " + b"x" * (2048 - 100) + b"\r\n"
    echo = Echo()
    async with serving(echo, head_bytes=2048) as served:
        sent = sized(b"b" * 2**18, HEAD + line)
        got = await exchange(served, sent[:1000], sent[1000:] + LAST)
    assert [status for status, _, _ in got] == [200, 200]


ENDLESS = {"extension": b"3;", "quoted extension": b'3;a="', "trailer": b"0\r\nX: ", "size": b"0"}


@pytest.mark.parametrize("begin", ENDLESS.values(), ids=ENDLESS)
async def test_chunk_framing_without_an_end_is_refused(begin: bytes) -> None:
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n" + begin
    fill = b"0" if begin == b"0" else b"x"
    echo, ((status, _, body),) = await ask(head, *[fill * 512] * 12, head_bytes=2048)
    assert (status, code_of(body)) in {(431, "headers_too_large"), (400, "invalid_http")}
    assert echo.seen == []


async def test_many_trailers_are_refused() -> None:
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"
    _, ((status, _, _),) = await ask(head, *[b"X: " + b"y" * 99 + b"\r\n"] * 60, head_bytes=2048)
    assert status == 431


async def test_small_chunks_are_served() -> None:
    echo = Echo()
    body = b"abcdefgh" * 500
    pieces = [b"1;x=y\r\n%c\r\n" % byte for byte in body]
    async with serving(echo, head_bytes=2048) as served:
        head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
        await exchange(served, head, b"".join(pieces), b"0\r\n\r\n" + LAST)
    assert echo.seen[0][2] == body


async def test_requests_in_a_row_have_a_bound() -> None:
    """Those within it are answered, one more is refused, and nothing after it is read."""
    echo = Echo()
    gated = b"GET /gate HTTP/1.1\r\nHost: x\r\n\r\n"
    async with serving(echo, pipelined=3) as served, client_of(served) as client:
        await client.send(gated + BODY * 2000)
        await soon(echo.gate.reached.wait())
        assert len(next(iter(served.connections)).pipeline) == 3
        echo.gate.opened.set()
        got = answers(await client.rest())
    assert [status for status, _, _ in got] == [200] * 4 + [503]
    assert len(echo.seen) == 4


async def test_connections_have_a_bound() -> None:
    async with (
        serving(Echo(), connections=2) as served,
        client_of(served),
        client_of(served) as second,
    ):
        await until(lambda: len(served.connections) == 2)
        ((status, headers, body),) = await exchange(served)
        assert (status, code_of(body)) == (503, "overloaded")
        assert headers["retry-after"] == "1"
        await second.send(LAST)
        assert [status for status, _, _ in answers(await second.rest())] == [200]


# --- bounds in time


@pytest.mark.parametrize("begun", [b"PO", HEAD, HEAD + b"X: a", HEAD + b"X: a\r\n"])
async def test_incomplete_head_is_refused(begun: bytes) -> None:
    _, ((status, headers, body),) = await ask(begun, head_s=0.1)
    assert (status, headers["connection"], code_of(body)) == (408, "close", "request_timeout")


MESSAGES = b"POST /v1/messages?beta=true HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "kind"),
    [
        (MESSAGES, 408, "invalid_request_error"),
        (MESSAGES + b"Content-Length: 9\r\n\r\nabc", 408, "invalid_request_error"),
        (MESSAGES + b"X: " + b"x" * 4096 + b"\r\n\r\n", 431, "invalid_request_error"),
        (MESSAGES + b"Content-Length: x\r\n\r\n", 400, "invalid_request_error"),
    ],
    ids=["head", "body", "large head", "framing"],
)
async def test_refusal_has_the_shape_of_the_requested_api(
    sent: bytes, status: int, kind: str
) -> None:
    _, ((answered, headers, body),) = await ask(sent, head_s=0.1, body_idle_s=0.1, head_bytes=2048)
    answer = json.loads(body)
    assert (answered, answer["type"], answer["error"]["type"]) == (status, "error", kind)
    assert answer["request_id"] == headers["x-request-id"]


async def test_head_that_drips_is_refused() -> None:
    async with serving(Echo(), head_s=0.1, linger_s=0.1) as served, client_of(served) as client:
        await client.send(HEAD)
        while served.connections:
            await client.send(b"X: a\r\n")
            await asyncio.sleep(0.01)
        ((status, _, _),) = answers(await client.rest())
    assert status == 408


@pytest.mark.parametrize("sent", [b"", b"\r\n"])
async def test_connection_that_sends_nothing_is_closed(sent: bytes) -> None:
    async with serving(Echo(), head_s=0.1, keep_alive_s=60) as served, client_of(served) as client:
        await client.send(sent)
        assert await client.rest() == b""


async def test_connection_that_is_idle_is_closed() -> None:
    _, got = await ask(sized(b"x") + sized(b"y"), head_s=60, keep_alive_s=0.1)
    assert [status for status, _, _ in got] == [200, 200]


@pytest.mark.parametrize("framing", [b"Content-Length: 9", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("begun", [b"", b"3\r\nabc"])
async def test_incomplete_body_is_refused(framing: bytes, begun: bytes) -> None:
    echo = Echo()
    async with serving(echo, body_idle_s=0.1, keep_alive_s=0.05, head_s=0.05) as served:
        ((status, headers, body),) = await exchange(served, HEAD + framing + b"\r\n\r\n" + begun)
        await until(lambda: echo.left == 1)
    assert (status, headers["connection"], code_of(body)) == (408, "close", "request_timeout")


async def test_body_that_drips_has_a_bound() -> None:
    echo = Echo()
    async with serving(echo, body_s=0.2, linger_s=0.1) as served, client_of(served) as client:
        await client.send(HEAD + b"Content-Length: 100000\r\n\r\n")
        while served.connections:
            await client.send(b"x")
            await asyncio.sleep(0.01)
        ((status, _, _),) = answers(await client.rest())
    assert status == 408


async def test_waiting_for_an_answer_has_no_bound_here() -> None:
    """Deadlines are the model's."""
    echo = Echo()
    short = dict.fromkeys(["head_s", "body_idle_s", "body_s", "keep_alive_s", "linger_s"], 0.05)
    async with serving(echo, **short) as served, client_of(served) as client:
        await client.send(sized(b"x", b"POST /gate HTTP/1.1\r\nHost: x\r\n") + LAST)
        await soon(echo.gate.reached.wait())
        await asyncio.sleep(0.3)
        echo.gate.opened.set()
        assert [status for status, _, _ in answers(await client.rest())] == [200, 200]


# --- clients that do not read


async def deaf(served: Served, sent: bytes) -> socket.socket:
    """A client that has asked and reads nothing; its buffer is small."""
    loop = asyncio.get_running_loop()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    await loop.sock_connect(client, ("127.0.0.1", served.port))
    await loop.sock_sendall(client, sent)
    return client


@pytest.mark.parametrize("path", [b"/endless", b"/large"])
async def test_client_that_does_not_read_is_disconnected(path: bytes) -> None:
    echo = Echo()
    async with serving(echo, stuck_s=0.2) as served:
        client = await deaf(served, b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: len(echo.seen) == 1)
        await until(lambda: not served.connections, 60)
        assert echo.left == (path == b"/endless")
        client.close()


async def test_client_that_stops_reading_a_closing_answer_is_cut() -> None:
    """Its connection is closing already, and would wait for ever to be flushed."""
    async with serving(Echo(), stuck_s=0.2) as served:
        client = await deaf(served, b"GET /large HTTP/1.0\r\n\r\n")
        await until(lambda: len(served.connections) == 1)
        await until(lambda: not served.connections, 60)
        client.close()


async def test_client_that_reads_slowly_keeps_its_connection() -> None:
    loop = asyncio.get_running_loop()
    async with serving(Echo(), stuck_s=1.0, stuck_bytes=1, keep_alive_s=0.05) as served:
        client = await deaf(served, b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        end = loop.time() + 2.2  # longer than twice `stuck_s`
        while loop.time() < end:
            await asyncio.sleep(0.05)
            assert await soon(loop.sock_recv(client, 2**12))
        assert len(served.connections) == 1
        client.close()


# --- any bytes at all

PATHS = ["/a", "/early", "/stream"]


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, bool]:
    """Bytes, and whether they are one valid request that another may follow."""
    kind = draw(st.sampled_from(["valid"] * 5 + ["refused", "broken"]))
    if kind == "refused":
        return draw(st.sampled_from(list(REFUSED.values()))), False
    path = draw(st.sampled_from(PATHS)).encode()
    head = b"POST " + path + b" HTTP/1.1\r\nHost: x\r\n"
    head += draw(st.sampled_from([b"", *OFFERS.values()]))
    if kind == "broken":
        broken = draw(st.sampled_from(list(BROKEN_BODIES.values())))
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + broken, False
    body = draw(st.sampled_from([b"", b"abc", BODY, BODY * 3, chunked(BODY), b"0\r\n\r\n"]))
    return draw(st.sampled_from([sized, chunked]))(body, head), True


@settings(max_examples=60, deadline=None)
@given(
    sent=st.lists(requests(), min_size=1, max_size=6),
    cuts=st.lists(st.integers(0, 2000), max_size=8),
)
async def test_answers_match_requests_or_the_connection_closes(
    sent: list[tuple[bytes, bool]], cuts: list[int]
) -> None:
    """No request is read whose start is inside another's bytes."""
    whole = b"".join(each for each, _ in sent) + LAST
    at = sorted({cut for cut in cuts if 0 < cut < len(whole)})
    pieces = [whole[a:b] for a, b in zip([0, *at], [*at, len(whole)], strict=True)]
    echo, got = await ask(*pieces)
    valid = _until_invalid([ok for _, ok in sent])
    paths = [path for _, path, _ in echo.seen]
    assert "/inside" not in paths
    assert len(got) <= len(sent) + 1
    assert len(paths) <= valid + 2
    statuses = [status for status, _, _ in got]
    refused = [status for status in statuses if status not in {200, 413}]
    assert not refused or statuses[-1:] == refused, "nothing follows a refusal"
    if valid == len(sent) and not any(b"Expect" in each for each, _ in sent):
        assert paths == [each.split(b" ")[1].decode() for each, _ in sent] + ["/last"]


def _until_invalid(valid: Sequence[bool]) -> int:
    return valid.index(False) if False in valid else len(valid)


# --- uvicorn


class Transport:
    """A transport between two addresses."""

    def get_extra_info(self, name: str) -> tuple[str, int] | None:
        return {"sockname": ("127.0.0.1", 8000), "peername": ("127.0.0.1", 40_000)}.get(name)

    def write(self, data: bytes) -> None:
        raise AssertionError(data)


async def test_connection_begins_as_uvicorn_s_does() -> None:
    config = process._uvicorn_config(ServerSpec(), nothing)

    def made(kind: type[HttpToolsProtocol]) -> dict[str, Any]:
        protocol = kind(config=config, server_state=ServerState(), app_state={})
        protocol.connection_made(Transport())  # type: ignore[arg-type]  # all that it needs
        assert protocol.connections == {protocol}
        return vars(protocol)

    known, ours = made(HttpToolsProtocol), made(Connection)
    assert known.keys() <= ours.keys()
    differs = {name for name in known if type(known[name]) is not type(ours[name])}
    assert differs == {"server", "client", "transport"}
    assert ours["scheme"] == known["scheme"] == "http"


async def test_request_s_scope_is_as_uvicorn_s() -> None:
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)
        await _answer(send, 200, b"")

    sent = b"POST /v1/a%20b//c?d=%65 HTTP/1.1\r\nHost: x\r\nX: y\r\nContent-Length: 0\r\n\r\n"
    async with serving(app) as served:
        await exchange(served, sent + LAST)
    config = process._uvicorn_config(ServerSpec(), app)
    known = HttpToolsProtocol(config=config, server_state=ServerState(), app_state={})
    known.connection_made(Transport())  # type: ignore[arg-type]
    known.data_received(sent)
    theirs: dict[str, Any] = dict(known.scope)
    assert scopes[0].keys() - theirs.keys() == {"extensions"}
    for name in theirs.keys() - {"server", "client"}:
        assert scopes[0][name] == theirs[name], name


async def nothing(_: Any, __: Any, ___: Any) -> None:
    """An app that is not asked."""


def test_limits_leave_descriptors_for_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1000, 1000))
    assert Limits.from_process().connections == 750
