"""One client connection: uvicorn's HTTP/1.1 protocol with strict framing and limits.

A request that cannot be framed gets our error object, after the answers to earlier requests, and
the connection closes. Bytes of unclear meaning are never read as a request.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import httptools
import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.utils import get_remote_addr, is_ssl

from llmserve.api import token_stream
from llmserve.errors import HeadTooLarge, LLMServeError, Overloaded, RequestError, RequestTimeout
from llmserve.http import auth
from llmserve.server import framing, response_cycle
from llmserve.server.timeouts import Timeouts, Wait
from llmserve.server.transports import LingeringTransport

if TYPE_CHECKING:
    from llmserve.server.limits import Limits

_OVERHEAD = 16  # bytes of chunk framing allowed per byte of data: "1\r\nx\r\n" has 5


class ConnectionConfig(uvicorn.Config):
    """uvicorn's configuration with the limits of a connection."""

    def __init__(self, application: Any, limits: Limits, **options: Any) -> None:
        super().__init__(application, http=Connection, ws="none", **options)
        self.limits = limits


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with direct writes, strict framing and limits."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Like uvicorn's, without its seven system calls for both addresses."""
        self._limits = cast("ConnectionConfig", self.config).limits
        self._raw = transport
        self.flow = FlowControl(transport)
        self._out = LingeringTransport(transport, self.flow)
        self.transport = cast("asyncio.Transport", self._out)
        self.scheme = "https" if is_ssl(transport) else "http"
        self._cycles: list[RequestResponseCycle] = []  # unanswered, in order
        self._in_head = False
        self._declines = False  # an upgrade: its head is parsed again
        self._last = False  # the client or HTTP/1.0 asks to close after this request
        self.url = b""  # target of the newest request, as received so far
        self._discards = False  # all further input
        self._refusal = b""  # the last answer, written after all others
        self._reads = self._messages = 0
        self._read_bytes = self._head_bytes = self._data_bytes = self._excess = 0
        self._timeouts = Timeouts(self._limits)
        self.connections.add(self)
        if len(self.connections) > self._limits.connections:
            self._refuse_connection()

    def connection_lost(self, exc: Exception | None) -> None:
        """End all requests; uvicorn ends only the newest, and an older one may be running."""
        super().connection_lost(exc)
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
            cycle.message_event.set()
            response_cycle.break_references(cycle)
        self._cycles = []

    # --- input

    def data_received(self, data: bytes) -> None:
        if self._discards:
            return
        self._reads += 1
        self._read_bytes = len(data)
        self._data_bytes = 0
        message, is_body = self._messages, self._out.in_body
        try:
            self._feed(data)
            if self._in_head:
                self._bound_head(self._messages - message, after_body=is_body)
            elif self._out.in_body and message == self._messages:
                self._bound_framing()
        except httptools.HttpParserError as error:
            if self._last and not (self._in_head or self._out.in_body):
                self._discards = True  # data after the last request
            else:
                self._refuse(framing.cause(error))
        except HeadTooLarge as error:
            self._refuse(error)

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                self._decline_upgrade()
                data = data[offer.args[0] :]
            else:
                return

    def _bound_head(self, begun: int, *, after_body: bool) -> None:
        """Raise HeadTooLarge for an incomplete head that is too large: the parser keeps all of it.

        A read that also ends another message is not counted: its share of the head is unknown.
        """
        if not begun:
            self._head_bytes += self._read_bytes
        elif begun == 1 and not after_body:
            self._head_bytes = self._read_bytes
        if self._head_bytes > self._limits.head_bytes or len(self.headers) > self._limits.headers:
            raise self._too_large()

    def _bound_framing(self) -> None:
        """Raise HeadTooLarge if chunk extensions or trailers, which the parser keeps, are large.

        Data allows for the framing around it, not for later framing.
        """
        allowed = (1 + _OVERHEAD) * self._data_bytes
        self._excess = max(0, self._excess + self._read_bytes - allowed)
        if self._excess > self._limits.head_bytes:
            raise self._too_large()

    def _too_large(self) -> HeadTooLarge:
        limits = self._limits
        return HeadTooLarge(
            "The request's line and headers, or its chunk extensions and trailers, are too large; "
            f"the limits are {limits.head_bytes} bytes and {limits.headers} headers. "
            "Send fewer or shorter ones."
        )

    def _decline_upgrade(self) -> None:
        """Read the body of a request that offers another protocol: RFC 9110, 7.8.

        The parser stops at the end of such a head and drops the body. A new parser continues with
        a head that has the same framing and no offer.
        """
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        fields = [
            b"%b: %b\r\n" % field
            for field in self.headers
            if field[0] in {b"content-length", b"transfer-encoding"}
        ]
        self._declines = True
        try:
            self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % b"".join(fields))
        finally:
            self._declines = False

    # --- the parser's callbacks

    def on_message_begin(self) -> None:
        if self._declines:
            return
        if self._last:
            raise RequestError("data after the last request")
        super().on_message_begin()
        self._in_head = True
        self._messages += 1
        self._head_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # a trailer, or a head that is parsed again
            return
        name, value = name.lower(), value.rstrip(b" \t")
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._declines:
            return
        scope = cast("dict[str, Any]", self.scope)
        version = self.parser.get_http_version()
        self._check_head(version)
        self._check_queue()
        scope["http_version"] = version
        scope["method"] = self.parser.get_method().decode("ascii")
        framing.set_target(scope, self.headers, self.url)
        self._in_head, self._out.in_body, self._excess = False, True, 0
        self._begin(scope, version)

    def _check_head(self, version: str) -> None:
        """Raise RequestError for a head that RFC 9112 forbids to serve."""
        limit = self._limits.head_bytes
        if self._head_bytes + self._read_bytes > limit and self._head_size() > limit:
            raise self._too_large()
        if len(self.headers) > self._limits.headers:
            raise self._too_large()
        framing.check_head(self.headers, version)

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _check_queue(self) -> None:
        self._drop_answered()
        limit = self._limits.pipelined
        if len(self._cycles) > limit:
            raise Overloaded(
                f"More than {limit} requests wait for an answer on this connection; "
                f"the limit is {limit}. Read the answers first.",
                retry_after_s=1,
            )

    def _begin(self, scope: dict[str, Any], version: str) -> None:
        """Start the request, or queue it behind earlier ones."""
        is_1_0 = version == "1.0"
        self._last = is_1_0 or not self.parser.should_keep_alive()
        expects = self.expect_100_continue and not is_1_0
        kind = response_cycle.PlainCycle if is_1_0 or expects else RequestResponseCycle
        self.cycle = cycle = kind(
            scope=cast("Any", scope),
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=expects,
            keep_alive=not self._last,
            on_response=self.on_response_complete,
        )
        scope["extensions"] = {
            token_stream.WRITE: response_cycle.chunk_writer(cycle, self.flow, self._raw),
            token_stream.ABORT: self._raw.abort,
            token_stream.HOLD: partial(response_cycle.hold_headers, cycle),
            auth.PEER: partial(_peer, self._raw),
        }
        self._cycles.append(cycle)
        if len(self._cycles) == 1:
            self._start_asgi_task(cycle, self.app)
        else:
            self.pipeline.appendleft((cycle, self.app))

    def _drop_answered(self) -> None:
        for cycle in self._cycles:
            if cycle.response_complete:
                response_cycle.break_references(cycle)
        self._cycles = [cycle for cycle in self._cycles if not cycle.response_complete]

    def on_body(self, body: bytes) -> None:
        self._data_bytes += len(body)
        cycle = self.cycle
        if cycle.response_complete:
            return
        cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():  # its body follows
            return
        self._out.in_body = False
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()
        elif self._out.is_lingering:
            self._raw.close()

    # --- output

    def on_response_complete(self) -> None:
        """Like uvicorn's, without a keep-alive timer: `end_overdue` closes idle connections."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._refusal:
            self._end()

    def _refuse(self, error: LLMServeError) -> None:
        """Write `error` after the earlier answers, and close."""
        self._discards = True
        self._drop_answered()
        if not self._out.in_body:
            self._write_last(error)
        elif self.cycle.response_complete:
            self._out.linger()
        else:
            self._end_newest(self.cycle, error)

    def _end_newest(self, cycle: RequestResponseCycle, error: LLMServeError) -> None:
        """End the newest request, whose body is broken, as if its client had disconnected."""
        cycle.disconnected = True
        cycle.message_event.set()
        if cycle.response_started:
            self._raw.close()
            return
        self._cycles.remove(cycle)
        if self._cycles:  # it was queued
            self.pipeline.popleft()
        self._write_last(error)

    def _write_last(self, error: LLMServeError) -> None:
        self._refusal = framing.error_bytes(error, self.url)
        if not self._cycles:
            self._end()

    def _end(self) -> None:
        self.transport.write(self._refusal)
        self._out.linger()

    def _refuse_connection(self) -> None:
        limit = self._limits.connections
        self._discards = True
        self._raw.write(
            framing.error_bytes(
                Overloaded(
                    f"{limit} connections are open, which is the limit. Close idle connections, or "
                    "try again later.",
                    retry_after_s=1,
                )
            )
        )
        self._raw.close()

    # --- time

    def end_overdue(self, now: float) -> None:
        """End a connection that waits for its client too long. Called each `sweep_s`."""
        if self._timeouts.is_stuck(now, self._raw):
            self._raw.abort()
            return
        try:
            if self._timeouts.is_over(now, self._waits_for(), self._messages, self._reads):
                self._raw.close()
        except RequestTimeout as error:
            self._refuse(error)

    def _waits_for(self) -> Wait:
        if self._raw.is_closing():
            return Wait.ANSWER  # already written; `is_stuck` bounds it
        if self.transport.is_closing():
            return Wait.END
        if self._discards:
            return Wait.ANSWER
        if self._in_head:
            return Wait.HEAD
        if self._out.in_body:
            return self._waits_in_body()
        idle = self.cycle is None or self.cycle.response_complete
        return Wait.REQUEST if idle and not self._raw.get_write_buffer_size() else Wait.ANSWER

    def _waits_in_body(self) -> Wait:
        if self.cycle.response_complete:
            return Wait.END
        # The server does not read, or has not requested the body yet.
        is_ours = self.flow.read_paused or self.cycle.waiting_for_100_continue
        return Wait.ANSWER if is_ours else Wait.BODY


def _peer(transport: asyncio.Transport) -> str | None:
    """The client's address."""
    address = get_remote_addr(transport)
    return address[0] if address else None
