from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.api import sse
from llmserve.errors import RequestError
from tests.fakes import Gate, failure, soon, until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.types import Message


class Source:
    """Frames, then a gate; knows whether it was closed."""

    def __init__(self, *frames: bytes, gate: Gate | None = None) -> None:
        self.frames, self.gate = frames, gate
        self.asked = self.closed = False

    async def run(self) -> AsyncGenerator[bytes, None]:
        self.asked = True
        try:
            for frame in self.frames:
                yield frame
            if self.gate is not None:
                await self.gate.wait()
        finally:
            self.closed = True


async def refusing() -> AsyncGenerator[bytes, None]:
    raise RequestError("too long")
    yield b""


class Client:
    """The far end of an ASGI answer; leaves after so many messages."""

    def __init__(self, *, leaves_after: int | None = None) -> None:
        self.sent: list[Message] = []
        self._left = asyncio.Event()
        self._leaves_after = leaves_after
        if leaves_after == 0:
            self._left.set()

    async def receive(self) -> Message:
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        if len(self.sent) == self._leaves_after:
            self._left.set()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def get(self, frames: sse.PeekableStream) -> None:
        scope = {"type": "http", "method": "POST", "asgi": {"spec_version": "2.3"}}
        await soon(sse.EventStream(frames)(scope, self.receive, self.send))


def test_an_event_s_bytes() -> None:
    assert sse.event({"a": "é\n"}) == b'data: {"a":"\xc3\xa9\\n"}\n\n'
    assert sse.event([], "error") == b"event: error\ndata: []\n\n"


@given(
    st.dictionaries(st.text(max_size=4), st.text(max_size=8), max_size=4),
    st.sampled_from([None, "error", "response.created"]),
)
def test_a_payload_goes_in_and_comes_out(data: dict[str, str], name: str | None) -> None:
    frame = sse.event(data, name)
    assert frame.count(b"\n\n") == 1
    assert sse.payload(frame) == data
    assert sse.with_payload(frame, {"n": 1}) == sse.event({"n": 1}, name)


@pytest.mark.parametrize("frame", [sse.DONE, b": ping\n\n", b"", b"data: {\n\n"])
def test_a_frame_without_json_has_no_payload(frame: bytes) -> None:
    assert sse.payload(frame) is None


async def test_frames_come_in_order_once_begun() -> None:
    frames = sse.PeekableStream(Source(b"1", b"2", b"3").run(), failure)
    await frames.begin(1)
    assert [frame async for frame in frames] == [b"1", b"2", b"3"]


async def test_frames_need_no_begin() -> None:
    assert [frame async for frame in sse.PeekableStream(Source(b"1", b"2").run(), failure)] == [
        b"1",
        b"2",
    ]


async def test_a_source_without_frames_is_an_empty_stream() -> None:
    frames = sse.PeekableStream(Source().run(), failure)
    await frames.begin(1)
    assert [frame async for frame in frames] == []


async def test_early_error_is_raised_by_begin() -> None:
    with pytest.raises(RequestError, match="too long"):
        await sse.PeekableStream(refusing(), failure).begin(1)


async def test_begin_that_times_out_loses_no_frame() -> None:
    gate = Gate()

    async def late() -> AsyncGenerator[bytes, None]:
        await gate.wait()
        yield b"1"

    frames = sse.PeekableStream(late(), failure)
    await soon(frames.begin(0.01))
    gate.opened.set()
    assert [frame async for frame in frames] == [b"1"]


async def test_a_begin_that_is_cancelled_closes_the_source() -> None:
    gate = Gate()
    source = Source(gate=gate)
    beginning = asyncio.ensure_future(sse.PeekableStream(source.run(), failure).begin(10))
    await soon(gate.reached.wait())
    beginning.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(beginning)
    assert gate.cancelled
    assert source.closed


async def test_closing_twice_and_closing_after_the_end_are_harmless() -> None:
    frames = sse.PeekableStream(Source(b"1").run(), failure)
    await frames.begin(1)
    await frames.aclose()
    await frames.aclose()
    done = sse.PeekableStream(Source(b"1").run(), failure)
    assert [frame async for frame in done] == [b"1"]
    await done.aclose()


async def test_stream_is_written_as_its_frames_without_caching() -> None:
    client, source = Client(), Source(sse.event({"n": 1}), sse.event({"n": 2}), sse.DONE)
    await client.get(sse.PeekableStream(source.run(), failure))
    assert client.body == b'data: {"n":1}\n\ndata: {"n":2}\n\ndata: [DONE]\n\n'
    assert source.closed
    headers = dict(client.sent[0]["headers"])
    assert headers[b"cache-control"] == b"no-cache"
    assert headers[b"x-accel-buffering"] == b"no"
    assert headers[b"content-type"].startswith(b"text/event-stream")


async def test_disconnect_in_mid_stream_closes_the_source() -> None:
    gate = Gate()
    source = Source(b"data: 1\n\n", gate=gate)
    await Client(leaves_after=2).get(sse.PeekableStream(source.run(), failure))
    assert source.closed
    assert gate.cancelled


async def test_disconnect_before_the_first_frame_closes_the_source() -> None:
    gate = Gate()
    source = Source(gate=gate)
    frames = sse.PeekableStream(source.run(), failure)
    await frames.begin(0.01)
    await Client(leaves_after=0).get(frames)
    await until(lambda: source.closed)
    assert gate.cancelled


async def test_answer_that_cannot_begin_closes_the_source() -> None:
    gate = Gate()
    source = Source(b"data: 1\n\n", gate=gate)
    frames = sse.PeekableStream(source.run(), failure)
    await frames.begin(1)

    async def broken(_: Message) -> None:
        raise OSError("connection lost")

    scope = {"type": "http", "method": "POST"}
    with pytest.raises(OSError, match="connection lost"):
        await soon(sse.EventStream(frames)(scope, Client().receive, broken))
    assert source.closed


@pytest.mark.parametrize("sent", [[], [b"1"]])
async def test_late_error_is_the_last_frame(sent: list[bytes]) -> None:
    gate = Gate()

    async def late() -> AsyncGenerator[bytes, None]:
        await gate.wait()
        for frame in sent:
            yield frame
        raise RequestError("no", code="late")

    frames = sse.PeekableStream(late(), failure)
    await frames.begin(0.01)
    gate.opened.set()
    assert [frame async for frame in frames] == [*sent, b"data: late\n\n"]


def test_a_text_that_looks_like_a_frame_is_text() -> None:
    frame = sse.event({"text": "data: {", "null": None})
    assert sse.payload(frame) == {"text": "data: {", "null": None}
    assert sse.payload(sse.with_payload(frame, {"text": "data: {"})) == {"text": "data: {"}
