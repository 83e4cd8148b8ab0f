"""One client connection: uvicorn's HTTP/1.1 protocol with RFC 9112's framing and bounds.

A request that cannot be framed is answered with our error object, after the requests before
it, and the connection closes: bytes whose meaning is in doubt are never read as a request.
"""

from __future__ import annotations

import asyncio
import http
import resource
import socket
import struct
import uuid
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

import httptools
import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.utils import get_remote_addr, is_ssl

from llmserve.api import token_stream
from llmserve.api.endpoints import error_response
from llmserve.errors import (
    HeadTooLarge,
    LLMServeError,
    Overloaded,
    RequestError,
    RequestTimeout,
    quoted,
)
from llmserve.http import auth

if TYPE_CHECKING:
    from collections.abc import Callable

    from uvicorn._types import ASGISendEvent

_BYTES_ACKED = 120  # offset of tcpi_bytes_acked in struct tcp_info, linux/tcp.h
_OVERHEAD = 16  # bytes of chunk framing that a byte of data may have: "1\r\nx\r\n" has 5


@dataclass(frozen=True)
class Limits:
    """What one client may take: times in seconds, sizes in bytes."""

    head_bytes: int = 64 * 2**10  # of a request line and its headers; also of chunk extensions
    headers: int = 256
    head_s: float = 30.0  # from a request's first byte, or the connection's start, to its headers
    body_idle_s: float = 60.0  # without a byte of a body
    body_s: float = 3600.0  # for a whole body
    keep_alive_s: float = 5.0  # between requests
    linger_s: float = 10.0  # for the rest of a body that the answer did not wait for
    stuck_s: float = 60.0  # in which a client takes `stuck_bytes` of what waits for it
    stuck_bytes: int = 4096
    pipelined: int = 16  # requests that wait for the answer before theirs
    connections: int = 49_152
    sweep_s: float = 1.0  # between two looks at every connection

    @classmethod
    def of_process(cls) -> Limits:
        """Leave a quarter of the process's file descriptors to engines and files."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY:
            return cls()
        return cls(connections=min(cls.connections, soft * 3 // 4))


class ConnectionConfig(uvicorn.Config):
    """uvicorn's, with the limits of a connection."""

    def __init__(self, application: Any, limits: Limits, **options: Any) -> None:
        super().__init__(application, http=Connection, ws="none", **options)
        self.limits = limits


class Wait(Enum):
    """What a connection waits for."""

    HEAD = "head"
    REQUEST = "request"
    BODY = "body"
    END = "end"  # of what the client sends after its answer
    ANSWER = "answer"


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with a direct way to write, strict framing and bounds."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As uvicorn's, without its look-up of both addresses, seven system calls."""
        self._limits = cast("ConnectionConfig", self.config).limits
        self._raw = transport
        self.flow = FlowControl(transport)
        self._out = _Lingering(transport, self.flow)
        self.transport = cast("asyncio.Transport", self._out)
        self.scheme = "https" if is_ssl(transport) else "http"
        self._cycles: list[RequestResponseCycle] = []  # not answered, in order
        self._in_head = False
        self._declines = False  # an upgrade: its head is parsed again
        self._last = False  # the client or HTTP/1.0 asks to close after this request
        self.url = b""  # the target of the newest request, as far as it has come
        self._deaf = False  # what comes now is discarded
        self._refusal = b""  # the last answer, once those before it are out
        self._feeds = self._messages = 0
        self._fed = self._head_bytes = self._data_bytes = self._excess = 0
        self._wait = Wait.REQUEST, -1
        self._wait_s = self._feed_s = self._acked_s = 0.0
        self._seen_feeds = self._acked = -1
        self.connections.add(self)
        if len(self.connections) > self._limits.connections:
            self._turn_away()

    def connection_lost(self, exc: Exception | None) -> None:
        """End all requests; uvicorn ends the newest only, and the one that runs may be older."""
        super().connection_lost(exc)
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
            cycle.message_event.set()
            _untie(cycle)
        self._cycles = []

    # --- what comes

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._feeds += 1
        self._fed = len(data)
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
                self._deaf = True  # what follows the last request
            else:
                self._refuse(_cause(error))
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
        """Raise HeadTooLarge if a head that is not complete is: the parser keeps all of it.

        Of a piece that also ends another message, how much is the head's is not known.
        """
        if not begun:
            self._head_bytes += self._fed
        elif begun == 1 and not after_body:
            self._head_bytes = self._fed
        if self._head_bytes > self._limits.head_bytes or len(self.headers) > self._limits.headers:
            raise self._too_large()

    def _bound_framing(self) -> None:
        """Raise HeadTooLarge if chunk extensions or trailers, which the parser keeps, take much.

        Data pays for the framing around it, not for what comes later.
        """
        paid = (1 + _OVERHEAD) * self._data_bytes
        self._excess = max(0, self._excess + self._fed - paid)
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
        """Read the body of a request that offers another protocol, RFC 9110, 7.8.

        The parser stops at the end of such a head and drops the body. Another one takes over
        with a head that has the same framing and no offer.
        """
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        framing = [
            b"%b: %b\r\n" % field
            for field in self.headers
            if field[0] in {b"content-length", b"transfer-encoding"}
        ]
        self._declines = True
        try:
            self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % b"".join(framing))
        finally:
            self._declines = False

    # --- the parser's callbacks

    def on_message_begin(self) -> None:
        if self._declines:
            return
        if self._last:
            raise RequestError("nothing is read after the last request")
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
        self._set_target(scope)
        self._in_head, self._out.in_body, self._excess = False, True, 0
        self._begin(scope, version)

    def _check_head(self, version: str) -> None:
        """Raise RequestError for a head that RFC 9112 forbids to serve."""
        limit = self._limits.head_bytes
        if self._head_bytes + self._fed > limit and self._head_size() > limit:
            raise self._too_large()
        if len(self.headers) > self._limits.headers:
            raise self._too_large()
        if version not in {"1.1", "1.0"}:
            raise _unsupported(505, f"HTTP/{version} is not supported; use HTTP/1.1.")
        fields = dict(self.headers)
        if len(fields) == len(self.headers):
            hosts, coding = int(b"host" in fields), fields.get(b"transfer-encoding")
        else:
            hosts = sum(name == b"host" for name, _ in self.headers)
            codings = [value for name, value in self.headers if name == b"transfer-encoding"]
            coding = b",".join(codings) if codings else None
        if hosts > 1 or (hosts == 0 and version == "1.1"):
            raise _invalid(f"it has {hosts} Host headers; send one")
        if coding is not None:
            _check_coding(coding, version)

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _check_queue(self) -> None:
        self._drop_answered()
        limit = self._limits.pipelined
        if len(self._cycles) > limit:
            raise Overloaded(
                f"More than {limit} requests wait for an answer on this connection; "
                f"{limit} are allowed. Read the answers first.",
                retry_after_s=1,
            )

    def _set_target(self, scope: dict[str, Any]) -> None:
        try:
            target = httptools.parse_url(self.url)
        except httptools.HttpParserInvalidURLError:
            came = quoted(self.url.decode("latin-1"))
            raise _invalid(f"its target is {came}; send a path that begins with /") from None
        if target.schema is not None:  # RFC 9112, 3.2.2: its host counts, and no Host header
            port = b":%d" % target.port if target.port is not None else b""
            host = (b"[%b]" if b":" in target.host else b"%b") % target.host + port
            self.headers[:] = [field for field in self.headers if field[0] != b"host"]
            self.headers.append((b"host", host))
        scope["raw_path"] = raw = target.path or b"/"
        path = raw.decode("ascii")
        scope["path"] = unquote(path) if "%" in path else path
        scope["query_string"] = target.query or b""

    def _begin(self, scope: dict[str, Any], version: str) -> None:
        """Start the request, or queue it behind those that came before."""
        is_1_0 = version == "1.0"
        self._last = is_1_0 or not self.parser.should_keep_alive()
        expects = self.expect_100_continue and not is_1_0
        kind = _PlainCycle if is_1_0 or expects else RequestResponseCycle
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
            token_stream.WRITE: _writer(cycle, self.flow, self._raw),
            token_stream.ABORT: self._raw.abort,
            token_stream.HOLD: partial(_hold, cycle),
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
                _untie(cycle)
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
        if self.parser.should_upgrade():  # its body is still to come
            return
        self._out.in_body = False
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()
        elif self._out.ends:
            self._raw.close()

    # --- what goes

    def on_response_complete(self) -> None:
        """As uvicorn's; idle connections are for `look`, and a refusal is the last answer."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._refusal:
            self._end()

    def _refuse(self, error: LLMServeError) -> None:
        """Answer what cannot be read with `error`, after the answers before it, and close."""
        self._deaf = True
        self._drop_answered()
        if not self._out.in_body:
            self._say(error)
        elif self.cycle.response_complete:
            self._out.linger()
        else:
            self._give_up(self.cycle, error)

    def _give_up(self, cycle: RequestResponseCycle, error: LLMServeError) -> None:
        """End the newest request, whose body is broken: for its task the client has left."""
        cycle.disconnected = True
        cycle.message_event.set()
        if cycle.response_started:
            self._raw.close()
            return
        self._cycles.remove(cycle)
        if self._cycles:  # it was queued
            self.pipeline.popleft()
        self._say(error)

    def _say(self, error: LLMServeError) -> None:
        self._refusal = _bytes_of(error, self.url)
        if not self._cycles:
            self._end()

    def _end(self) -> None:
        self.transport.write(self._refusal)
        self._out.linger()

    def _turn_away(self) -> None:
        limit = self._limits.connections
        self._deaf = True
        self._raw.write(
            _bytes_of(
                Overloaded(
                    f"{limit} connections are open, which is the limit. Close idle ones, or try "
                    "again later.",
                    retry_after_s=1,
                )
            )
        )
        self._raw.close()

    # --- time

    def end_overdue(self, now: float) -> None:
        """End what has waited for the client too long. The server calls it each `sweep_s`.

        Hot paths take no time of day and set no timer: they count, and this compares.
        """
        if self._is_stuck(now):
            self._raw.abort()
            return
        wait = self._waits_for(), self._messages
        if wait != self._wait:
            self._wait, self._wait_s, self._feed_s = wait, now, now
        if self._feeds != self._seen_feeds:
            self._seen_feeds, self._feed_s = self._feeds, now
        self._end_wait(wait[0], now - self._wait_s, now - self._feed_s)

    def _waits_for(self) -> Wait:
        if self._raw.is_closing():
            return Wait.ANSWER  # on its way; `_is_stuck` bounds it
        if self.transport.is_closing():
            return Wait.END
        if self._deaf:
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
        # The server does not read, or has not asked for the body yet.
        is_ours = self.flow.read_paused or self.cycle.waiting_for_100_continue
        return Wait.ANSWER if is_ours else Wait.BODY

    def _end_wait(self, wait: Wait, total_s: float, quiet_s: float) -> None:
        limits = self._limits
        if wait is Wait.HEAD and total_s > limits.head_s:
            self._refuse(_timeout("headers", limits.head_s))
        elif wait is Wait.BODY and quiet_s > limits.body_idle_s:
            self._refuse(_timeout("next byte of the body", limits.body_idle_s))
        elif wait is Wait.BODY and total_s > limits.body_s:
            self._refuse(_timeout("body", limits.body_s))
        elif wait is Wait.END and total_s > limits.linger_s:
            self._raw.close()
        elif wait is Wait.REQUEST:
            limit_s = limits.keep_alive_s if self._messages else limits.head_s
            if total_s > limit_s:
                self._raw.close()

    def _is_stuck(self, now: float) -> bool:
        """Whether the client takes none of what waits for it, whichever answer wrote it."""
        if not self._raw.get_write_buffer_size():
            self._acked = -1
            return False
        acked = _acknowledged(self._raw)
        if self._acked < 0 or acked - self._acked >= self._limits.stuck_bytes:
            self._acked, self._acked_s = acked, now
        return now - self._acked_s > self._limits.stuck_s


class _Lingering:
    """A connection's transport. To close it in the middle of a request waits for the rest.

    A close with bytes unread resets the connection, and the client may lose the answer.
    """

    def __init__(self, transport: asyncio.Transport, flow: FlowControl) -> None:
        self.in_body = False  # the client has begun a request and not ended it
        self.ends = False
        self.write = transport.write
        self._transport = transport
        self._flow = flow

    def is_closing(self) -> bool:
        return self.ends or self._transport.is_closing()

    def close(self) -> None:
        if self.in_body:
            self.linger()
        else:
            self._transport.close()

    def linger(self) -> None:
        """Send no more, and let `Connection` discard what comes until the client ends it."""
        if self.is_closing():
            return
        self.ends = True
        self._flow.resume_reading()
        if self._transport.can_write_eof():
            self._transport.write_eof()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _PlainCycle(RequestResponseCycle):
    """uvicorn's for HTTP/1.0, which knows no chunks, and for clients that hold their body back."""

    _until_close = False

    async def send(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start":
            if self.waiting_for_100_continue and self.more_body:
                self.keep_alive = False  # whether the body still comes is not known
            names = {name.lower() for name, _ in message.get("headers", ())}
            if self.scope["http_version"] == "1.0" and b"content-length" not in names:
                self.chunked_encoding, self._until_close = False, True
        elif self._until_close and message["type"] == "http.response.body":
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


def _peer(transport: asyncio.Transport) -> str | None:
    """The address at the other end."""
    address = get_remote_addr(transport)
    return address[0] if address else None


def _writer(
    cycle: RequestResponseCycle, flow: FlowControl, transport: asyncio.Transport
) -> Callable[[bytes], bool]:
    """What `cycle.send` does for a chunk, when it would not wait."""
    begun = False

    def write(body: bytes) -> bool:
        nonlocal begun
        if flow.write_paused or transport.is_closing():
            return False
        chunk = b"%x\r\n%b\r\n" % (len(body), body)
        if begun:
            transport.write(chunk)
        elif cycle.disconnected or not cycle.chunked_encoding:
            return False
        else:
            begun = True
            cycle.transport.write(chunk)  # which may have held the headers back
        return True

    return write


def _hold(cycle: RequestResponseCycle) -> None:
    """Its headers are yet to come, and not there already with a comment."""
    if not (cycle.response_started or cycle.disconnected):
        cycle.transport = cast("asyncio.Transport", _Held(cycle))


class _Held:
    """A cycle's transport until it has written twice: its headers, and what comes next."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._headers: bytes | None = None
        self.behind = cycle.transport

    def write(self, data: bytes) -> None:
        if self._headers is None:
            self._headers = data
            return
        self._cycle.transport = self.behind
        self.behind.write(self._headers + data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.behind, name)


def _untie(cycle: RequestResponseCycle) -> None:
    """Let it be freed at once: collecting a cycle for each request stalls all streams."""
    cast("dict[str, Any]", cycle.scope)["extensions"] = {}
    transport: Any = cycle.transport
    if isinstance(transport, _Held):
        cycle.transport = transport.behind


# --- refusals


def _check_coding(coding: bytes, version: str) -> None:
    """Raise RequestError unless a body's only transfer coding is `chunked`: RFC 9112, 6.1, 6.3."""
    if version == "1.0":
        raise _invalid("HTTP/1.0 has no Transfer-Encoding; send Content-Length or use HTTP/1.1")
    codings = [each.strip().lower() for each in coding.split(b",") if each.strip()]
    if codings != [b"chunked"]:
        came = quoted(coding.decode("latin-1"))
        raise _unsupported(501, f"The Transfer-Encoding is {came}; only `chunked` is supported.")


def _invalid(why: str) -> RequestError:
    return RequestError(f"The request is not valid HTTP: {why}.", code="invalid_http")


def _unsupported(status: int, message: str) -> RequestError:
    error = RequestError(message, code="invalid_http")
    error.status = status
    return error


def _timeout(awaited: str, limit_s: float) -> RequestTimeout:
    return RequestTimeout(
        f"The {awaited} did not arrive within {limit_s:g} seconds. Send the request again."
    )


def _cause(error: httptools.HttpParserError) -> LLMServeError:
    """What a callback raised, or else what the parser says."""
    if isinstance(error.__context__, LLMServeError):
        return error.__context__
    return _invalid(str(error) or type(error).__name__)


def _bytes_of(error: LLMServeError, target: bytes = b"") -> bytes:
    """An answer that closes the connection, for a request that the application never sees.

    It has the shape of the API to which `target`, as far as it has come, belongs.
    """
    request_id = uuid.uuid4().hex
    path = target.partition(b"?")[0].decode("latin-1")
    body = bytes(error_response(error, path, request_id).body)
    status = http.HTTPStatus(error.status)
    fields = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "x-request-id": request_id,
        "connection": "close",
        **error.headers(),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status.value} {status.phrase}\r\n{head}\r\n".encode("ascii") + body


def _acknowledged(transport: asyncio.Transport) -> int:
    """Bytes that the client's machine has taken; 0 for a connection that is gone."""
    try:
        raw = transport.get_extra_info("socket")
        info = raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED + 8)
    except OSError:
        return 0
    (acked,) = struct.unpack_from("=Q", info, _BYTES_ACKED)
    return int(acked)
