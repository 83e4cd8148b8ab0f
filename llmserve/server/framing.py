"""The rules of RFC 9112 that httptools does not check, and answers for requests that break them."""

from __future__ import annotations

import http
import uuid
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import httptools

from llmserve.api.endpoints import error_response
from llmserve.errors import LLMServeError, RequestError, quoted

if TYPE_CHECKING:
    from collections.abc import Sequence


def check_head(headers: Sequence[tuple[bytes, bytes]], version: str) -> None:
    """Raise RequestError for a head that RFC 9112 forbids to serve."""
    if version not in {"1.1", "1.0"}:
        raise _unsupported(505, f"HTTP/{version} is not supported; use HTTP/1.1.")
    fields = dict(headers)
    if len(fields) == len(headers):
        hosts, coding = int(b"host" in fields), fields.get(b"transfer-encoding")
    else:
        hosts = sum(name == b"host" for name, _ in headers)
        codings = [value for name, value in headers if name == b"transfer-encoding"]
        coding = b",".join(codings) if codings else None
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        raise _invalid(f"it has {hosts} Host headers; send one")
    if coding is not None:
        _check_coding(coding, version)


def _check_coding(coding: bytes, version: str) -> None:
    """Raise RequestError unless a body's only transfer coding is `chunked`: RFC 9112, 6.1, 6.3."""
    if version == "1.0":
        raise _invalid("HTTP/1.0 has no Transfer-Encoding; send Content-Length or use HTTP/1.1")
    codings = [each.strip().lower() for each in coding.split(b",") if each.strip()]
    if codings != [b"chunked"]:
        got = quoted(coding.decode("latin-1"))
        raise _unsupported(501, f"The Transfer-Encoding is {got}; only `chunked` is supported.")


def set_target(scope: dict[str, Any], headers: list[tuple[bytes, bytes]], url: bytes) -> None:
    """Set the path and the query of a scope. Raises RequestError."""
    try:
        target = httptools.parse_url(url)
    except httptools.HttpParserInvalidURLError:
        got = quoted(url.decode("latin-1"))
        raise _invalid(f"its target is {got}; send a path that begins with /") from None
    if target.schema is not None:  # RFC 9112, 3.2.2: its host replaces the Host header
        port = b":%d" % target.port if target.port is not None else b""
        host = (b"[%b]" if b":" in target.host else b"%b") % target.host + port
        headers[:] = [field for field in headers if field[0] != b"host"]
        headers.append((b"host", host))
    scope["raw_path"] = raw = target.path or b"/"
    path = raw.decode("ascii")
    scope["path"] = unquote(path) if "%" in path else path
    scope["query_string"] = target.query or b""


def cause(error: httptools.HttpParserError) -> LLMServeError:
    """The error that a callback raised, or else the parser's own."""
    if isinstance(error.__context__, LLMServeError):
        return error.__context__
    return _invalid(str(error) or type(error).__name__)


def error_bytes(error: LLMServeError, target: bytes = b"") -> bytes:
    """An error response that closes the connection, for a request without an application.

    It has the shape of the API to which `target`, as received so far, belongs.
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


def _invalid(why: str) -> RequestError:
    return RequestError(f"The request is not valid HTTP: {why}.", code="invalid_http")


def _unsupported(status: int, message: str) -> RequestError:
    error = RequestError(message, code="invalid_http")
    error.status = status
    return error
