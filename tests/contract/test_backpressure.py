"""Clients that read slowly or not at all, on a socket as `llmserve up` serves it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import pytest_asyncio

from llmserve.api.schedule import Schedule
from llmserve.lifecycle.admission import QueuedRequest
from llmserve.lifecycle.lease import Lease
from llmserve.registry.spec import ServerSpec
from llmserve.server import process, response_cycle
from llmserve.server.limits import Limits
from tests.contract.fake_core import SILENT
from tests.contract.fast_path_box import EMOJI, Box, boxed
from tests.contract.support import CHATS, COMPLETIONS, events
from tests.fakes import soon, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from llmserve.lifecycle.lease import ModelRequest

SMALL = 4096  # of the kernel's buffers; uvicorn's own is 64 KiB
LONG_ID = "i" * 128  # in every event, so that buffers are soon full
SHRUNK = [(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def box() -> AsyncIterator[Box]:
    """Its engine takes some seconds for a long answer."""
    async with boxed(0.003) as made:
        yield made


@asynccontextmanager
async def served(box: Box, stuck_s: float = 60.0) -> AsyncIterator[int]:
    """The port of a server with small buffers."""
    limits = Limits(stuck_s=stuck_s, sweep_s=0.1)
    spec = ServerSpec(port=0, drain_timeout=1)
    with process.bind(spec) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)  # accepted ones inherit it
        uvicorn = process._Uvicorn(process._uvicorn_config(spec, box.app, limits))
        serving = asyncio.create_task(uvicorn.serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            uvicorn.end()
            await soon(serving, 60)


def asking(prompt: str, max_tokens: int) -> dict[str, Any]:
    return {
        "model": "chat",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def connected(port: int, path: str, body: dict[str, Any]) -> socket.socket:
    """A client that has asked and reads nothing."""
    loop = asyncio.get_running_loop()
    client = socket.socket()
    client.setsockopt(*SHRUNK[0])
    client.setblocking(False)
    await loop.sock_connect(client, ("127.0.0.1", port))
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: test\r\nx-request-id: {LONG_ID}\r\n"
        "content-type: application/json\r\nconnection: close\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    await loop.sock_sendall(client, head.encode() + content)
    return client


async def rest_of(client: socket.socket) -> bytes:
    """All that still comes, until the server ends the connection."""
    loop = asyncio.get_running_loop()
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := await loop.sock_recv(client, 1 << 16):
            parts.append(part)
    return b"".join(parts)


def reply_of(received: bytes) -> httpx.Response:
    """An answer in chunks, as it came."""
    head, _, rest = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body, rest = body + rest[:length], rest[length + 2 :]
        if not length:
            break
    else:
        raise AssertionError("it was cut off")
    return httpx.Response(200, content=body)


def waiting(box: Box) -> int:
    """Streams whose client has to read before more can be written."""
    return sum(stream._sending is not None for stream in box.serving.engine.flow._streams)


async def whole(box: Box, body: dict[str, Any]) -> str:
    """The text of an answer that nobody waits for."""
    plain = {name: value for name, value in body.items() if "stream" not in name}
    text: str = (await box.ask(COMPLETIONS, plain)).json()["choices"][0]["text"]
    return text


def text_of(reply: httpx.Response) -> tuple[str, int]:
    """The text of a stream, and how many tokens it says it has."""
    *chunks, usage, done = events(reply.text)
    assert done == "[DONE]"
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    return "".join(pieces), usage["usage"]["completion_tokens"]


@pytest.mark.parametrize("path", [CHATS, COMPLETIONS])
@pytest.mark.parametrize("vllm_path", [False, True])
async def test_a_client_that_reads_nothing_is_cut_off_and_no_other(
    box: Box, path: str, vllm_path: bool
) -> None:
    before = await box.core("aborted")
    stuck = asking(EMOJI, 1900)
    if path == CHATS:
        stuck["messages"] = [{"role": "user", "content": stuck.pop("prompt")}]
    aborts = 1
    if vllm_path:  # vLLM's generators, through EventStream; a request for each choice
        stuck["n"] = aborts = 2
    reading = asking(EMOJI, 900)
    expected = await whole(box, reading)
    async with served(box, stuck_s=1.0) as port, httpx.AsyncClient(timeout=60) as client:
        with await connected(port, path, stuck) as never:
            url = f"http://127.0.0.1:{port}{COMPLETIONS}"
            reader = asyncio.create_task(client.post(url, json=reading))
            await box.until_core("aborted", differs_from=before)
            left = await soon(rest_of(never), 60)
        assert left.startswith(b"HTTP/1.1 200 ")
        assert b"[DONE]" not in left
        assert text_of(await soon(reader, 30)) == (expected, 900)
        await until(lambda: box.services.pool.models["chat"].slots.in_flight == 0)
    assert await box.core("aborted") == before + aborts
    assert not box.serving.engine.flow._streams


async def test_a_client_that_pauses_gets_all_of_its_text_in_order(box: Box) -> None:
    body = asking(EMOJI, 1200)
    expected = await whole(box, body)
    before = await box.core("aborted")
    async with served(box) as port:
        with await connected(port, COMPLETIONS, body) as client:
            await until(lambda: waiting(box) == 1, 60)
            await asyncio.sleep(0.3)
            received = await soon(rest_of(client), 300)
    reply = reply_of(received)
    assert text_of(reply) == (expected, 1200)
    assert len(events(reply.text)) < 1200, "what waited came in longer events"
    assert await box.core("aborted") == before


async def test_clients_of_many_speeds_all_get_their_own_text(box: Box) -> None:
    bodies = [asking(f"number {n}: {EMOJI}", 400) for n in range(8)]
    expected = [await whole(box, body) for body in bodies]

    async def read(client: httpx.AsyncClient, url: str, n: int) -> tuple[str, int]:
        headers = {"x-request-id": LONG_ID}
        parts = []
        async with client.stream("POST", url, json=bodies[n], headers=headers) as reply:
            async for part in reply.aiter_raw(SMALL):
                parts.append(part)
                await asyncio.sleep(n * 0.005)
        return text_of(httpx.Response(200, content=b"".join(parts)))

    transport = httpx.AsyncHTTPTransport(socket_options=SHRUNK)
    async with (
        served(box) as port,
        httpx.AsyncClient(transport=transport, timeout=60) as client,
    ):
        url = f"http://127.0.0.1:{port}{COMPLETIONS}"
        got = await asyncio.gather(*(read(client, url, n) for n in range(8)))
    assert got == [(text, 400) for text in expected]


async def test_a_stuck_client_that_leaves_has_its_request_aborted(box: Box) -> None:
    before = await box.core("aborted")
    async with served(box) as port:
        with await connected(port, COMPLETIONS, asking(EMOJI, 1900)):
            await until(lambda: waiting(box) == 1, 60)
        await box.until_core("aborted", differs_from=before)
        await until(lambda: box.services.pool.models["chat"].slots.in_flight == 0)
    assert await box.core("aborted") == before + 1


async def test_client_that_leaves_with_pipelined_request_is_aborted(box: Box) -> None:
    """uvicorn tells the newest request of a connection that the client has left."""
    before = await box.core("aborted")
    body = json.dumps(asking(EMOJI, 1900)).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: test\r\ncontent-length: {len(body)}\r\n\r\n"
    async with served(box) as port, httpx.AsyncClient(timeout=60) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + body)
        await soon(reader.readuntil(b'"text":'), 60)
        writer.write(head.encode() + body)  # while the first one runs
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.transport.abort()
        reading = asking("one two three", 200)
        reply = await client.post(f"http://127.0.0.1:{port}{COMPLETIONS}", json=reading)
        assert text_of(reply) == (await whole(box, reading), 200)
        await until(lambda: box.services.pool.models["chat"].slots.in_flight == 0)
    assert await box.core("aborted") > before
    assert not box.serving.engine.flow._streams


async def test_headers_alone_leave_a_stream_open(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box.serving.engine.flow, "schedule", Schedule(headers_s=0.01))
    for seed in (1, SILENT):  # the second one by template
        body = json.dumps(asking("one", 3) | {"seed": seed}).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: test\r\ncontent-length: {len(body)}\r\n\r\n"
        async with served(box) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head.encode() + body)
            headers = await soon(reader.readuntil(b"\r\n\r\n"), 60)
            assert headers.startswith(b"HTTP/1.1 200 OK\r\n")
            if seed == SILENT:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(reader.read(1), 0.5)
            else:
                assert b"[DONE]" in await soon(reader.readuntil(b"0\r\n\r\n"), 60)
            writer.transport.abort()
            await until(lambda: not box.serving.engine.flow._streams)


class Transport:
    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def is_closing(self) -> bool:
        return False


class Cycle:
    """Of uvicorn's, what holding headers back needs."""

    def __init__(self) -> None:
        self.transport = Transport()
        self.scope: dict[str, Any] = {}
        self.response_started = self.disconnected = False


@pytest.mark.parametrize("second", [b"event", b""])
def test_headers_and_first_event_are_one_write(second: bytes) -> None:
    cycle: Any = Cycle()
    transport = cycle.transport
    response_cycle.hold_headers(cycle)
    cycle.transport.write(b"head ")
    assert transport.written == []
    assert not cycle.transport.is_closing()
    cycle.transport.write(second)
    cycle.transport.write(b"more")
    assert transport.written == [b"head " + second, b"more"]


def test_headers_that_have_left_or_have_no_reader_are_not_held() -> None:
    for name in ("response_started", "disconnected"):
        cycle: Any = Cycle()
        setattr(cycle, name, True)
        response_cycle.hold_headers(cycle)
        assert isinstance(cycle.transport, Transport)
    cycle = Cycle()
    response_cycle.hold_headers(cycle)
    response_cycle.break_references(cycle)
    assert isinstance(cycle.transport, Transport)


async def test_an_answer_after_comments_comes_whole(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its headers went with the first comment; text and end are one event."""
    monkeypatch.setattr(box.services, "schedule", Schedule(comment_s=0.05))
    pool = box.services.pool
    lease = pool.lease

    def lease_later(request: ModelRequest) -> QueuedRequest[ModelRequest, Lease]:
        place: QueuedRequest[ModelRequest, Lease] = QueuedRequest(request.deadline, request)
        asyncio.get_running_loop().call_later(0.2, lambda: place.admit(lambda _: held(request)))
        return place

    def held(request: ModelRequest) -> Lease:
        given = lease(request)
        assert isinstance(given, Lease)
        return given

    monkeypatch.setattr(pool, "lease", lease_later)
    body = asking("one two three", 1)
    expected = await box.client.post(COMPLETIONS, json=body)
    async with served(box) as port, httpx.AsyncClient(timeout=5) as client:
        for _ in range(2):  # the second one by template, on the same connection
            reply = await client.post(f"http://127.0.0.1:{port}{COMPLETIONS}", json=body)
            assert reply.text.startswith(": chat is ")
            assert text_of(reply) == text_of(expected)
