"""One request and its response: uvicorn's cycle with direct writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from llmserve.server.transports import HoldingTransport

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from uvicorn._types import ASGISendEvent
    from uvicorn.protocols.http.flow_control import FlowControl


class PlainCycle(RequestResponseCycle):
    """A response to HTTP/1.0, which has no chunks, or to a request with `Expect: 100-continue`."""

    _until_close = False

    async def send(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start":
            if self.waiting_for_100_continue and self.more_body:
                self.keep_alive = False  # the body may or may not follow
            names = {name.lower() for name, _ in message.get("headers", ())}
            if self.scope["http_version"] == "1.0" and b"content-length" not in names:
                self.chunked_encoding, self._until_close = False, True
        elif self._until_close and message["type"] == "http.response.body":
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


def chunk_writer(
    cycle: RequestResponseCycle, flow: FlowControl, transport: asyncio.Transport
) -> Callable[[bytes], bool]:
    """A function that writes a chunk as `cycle.send` does; it returns False if it cannot."""
    has_begun = False

    def write(body: bytes) -> bool:
        nonlocal has_begun
        if flow.write_paused or transport.is_closing():
            return False
        chunk = b"%x\r\n%b\r\n" % (len(body), body)
        if has_begun:
            transport.write(chunk)
        elif cycle.disconnected or not cycle.chunked_encoding:
            return False
        else:
            has_begun = True
            cycle.transport.write(chunk)  # a HoldingTransport writes its headers first
        return True

    return write


def hold_headers(cycle: RequestResponseCycle) -> None:
    """Write the headers together with the first chunk, unless they are already written."""
    if not (cycle.response_started or cycle.disconnected):
        cycle.transport = cast("asyncio.Transport", HoldingTransport(cycle))


def break_references(cycle: RequestResponseCycle) -> None:
    """Let reference counting free the cycle: garbage collection would stall all streams."""
    cast("dict[str, Any]", cycle.scope)["extensions"] = {}
    transport: Any = cycle.transport
    if isinstance(transport, HoldingTransport):
        cycle.transport = transport.inner
