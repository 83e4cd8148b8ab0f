"""Transports between uvicorn's protocol and the socket."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

    from uvicorn.protocols.http.flow_control import FlowControl
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


class LingeringTransport:
    """The transport of a connection. In the middle of a request, `close` waits for the rest.

    A close with unread bytes resets the connection, and the client may lose the answer.
    """

    def __init__(self, transport: asyncio.Transport, flow: FlowControl) -> None:
        self.in_body = False  # between a request's headers and its end
        self.is_lingering = False
        self.write = transport.write
        self._transport = transport
        self._flow = flow

    def is_closing(self) -> bool:
        return self.is_lingering or self._transport.is_closing()

    def close(self) -> None:
        if self.in_body:
            self.linger()
        else:
            self._transport.close()

    def linger(self) -> None:
        """End the output. `Connection` discards the input until the client ends it."""
        if self.is_closing():
            return
        self.is_lingering = True
        self._flow.resume_reading()
        if self._transport.can_write_eof():
            self._transport.write_eof()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class HoldingTransport:
    """The transport of a response that holds its headers until the next write."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._headers: bytes | None = None
        self.inner = cycle.transport

    def write(self, data: bytes) -> None:
        if self._headers is None:
            self._headers = data
            return
        self._cycle.transport = self.inner
        self.inner.write(self._headers + data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
