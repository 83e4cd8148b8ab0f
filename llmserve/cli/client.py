"""HTTP from a command to one server: URL, key, proxies, event streams, errors."""

from __future__ import annotations

import json
import re
import socket
from contextlib import contextmanager
from itertools import starmap
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx

from llmserve.cli.errors import CommandError, InvalidRegistry, NoServer, Refused
from llmserve.http import auth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

_T = TypeVar("_T")
_CONNECT_S = 10
_LINE_END = re.compile(rb"\r\n|\r(?!\Z)|\n")  # a final \r may be the first half of \r\n


class Client:
    """HTTP to one server. Every failure is a CommandError.

    Requests to this machine use no proxy: HTTP_PROXY would send them and their key to another
    machine. For other servers the environment's proxies apply, as in curl.
    """

    def __init__(self, url: str, key: str | None, key_variable: str) -> None:
        self.url = normalize_url(url)
        self._key_variable = key_variable
        # A user can think for longer than a server keeps an idle connection.
        limits = httpx.Limits(max_keepalive_connections=0)
        is_local = _is_local(self.url, getproxies())
        try:
            self._http = httpx.Client(
                headers=_headers(key),
                limits=limits,
                transport=httpx.HTTPTransport(limits=limits) if is_local else None,
            )
        except OSError as error:
            raise NoServer(
                self.url,
                f"cannot read SSL_CERT_FILE or SSL_CERT_DIR ({error}); correct or unset it",
            ) from None
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise NoServer(
                self.url,
                "invalid proxy in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY "
                f"({error}); correct or unset the variable",
            ) from None

    def close(self) -> None:
        self._http.close()

    def fetch(
        self,
        method: str,
        path: str,
        read: Callable[[Any], _T],
        *,
        body: object = None,
        timeout_s: float | None = None,
    ) -> _T:
        """Return `read` of the JSON answer; a `read` that fails raises Refused."""
        with self.stream(method, path, body=body, timeout_s=timeout_s) as reply:
            reply.read()
        try:
            return read(reply.json())
        except (ValueError, TypeError, KeyError, AttributeError):
            raise Refused(f"{reply.url}: unexpected answer; check --url") from None

    @contextmanager
    def stream(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, int | bool] | None = None,
        body: object = None,
        timeout_s: float | None = None,
    ) -> Iterator[httpx.Response]:
        """Open a successful answer; `timeout_s` bounds each wait for a part of it."""
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s or _CONNECT_S, _CONNECT_S))
        # json.dumps escapes a lone surrogate; httpx's `json=` fails on it.
        content = None if body is None else json.dumps(body)
        headers = {} if body is None else {"content-type": "application/json"}
        try:
            with self._http.stream(
                method,
                f"{self.url}/{path}",
                params=query,
                content=content,
                headers=headers,
                timeout=timeout,
            ) as reply:
                self._check(reply)
                yield reply
        except httpx.TimeoutException:
            raise NoServer(self.url, "no answer in time") from None
        except httpx.ConnectError as error:
            raise NoServer(self.url, f"no connection ({error})") from None
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise NoServer(self.url, f"request failed ({error})") from None

    def _check(self, reply: httpx.Response) -> None:
        """Raise Refused or InvalidRegistry for an error answer."""
        if reply.is_success:
            return
        reply.read()
        try:
            body = reply.json()
        except ValueError:
            text = reply.text[:200] or reply.reason_phrase
            raise Refused(f"{reply.url}: {reply.status_code} {text}") from None
        message = error_message(body)
        if _code(body) == "invalid_registry":
            raise InvalidRegistry(message)
        if reply.status_code == httpx.codes.UNAUTHORIZED:
            message += f" Set the key with --key or {self._key_variable}."
        raise Refused(message)


def normalize_url(given: str) -> str:
    """The URL of a server as users write it: with or without a scheme, `/v1` or a final slash."""
    # In a locale without UTF-8 the bytes of an argument arrive as lone surrogates.
    given = given.encode(errors="surrogateescape").decode(errors="replace")
    url = given.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    return url if "://" in url else f"http://{url}"


def sse_data(chunks: Iterable[bytes]) -> Iterator[str]:
    """The data of each complete event: HTML standard, 9.2.6.

    httpx's iter_lines() also ends lines at U+2028 and similar characters, which JSON may contain.
    """
    data: list[bytes] = []
    rest = b""
    for chunk in chunks:
        *lines, rest = _LINE_END.split(rest + chunk)
        for line in lines:
            name, _, value = line.partition(b":")
            if name == b"data":
                data.append(value.removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data).decode(errors="replace")
                data = []


def error_message(body: Any) -> str:
    """The message of an error object: OpenAI's, FastAPI's, or any other JSON."""
    while isinstance(body, dict):
        known = (body[k] for k in ("error", "message", "detail") if body.get(k))
        body = next(known, None) or json.dumps(body)
    return str(body)


def _code(body: Any) -> object:
    error = body.get("error") if isinstance(body, dict) else None
    return error.get("code") if isinstance(error, dict) else None


def _headers(key: str | None) -> list[tuple[bytes, bytes]]:
    """The Authorization header of a key. Raises CommandError."""
    key = (key or "").strip("\ufeff \t\r\n")  # a file may add these
    if any(ord(each) < 0x20 or each == "\x7f" for each in key):
        raise CommandError("invalid key: it contains control characters; a key is one line of text")
    bearer = b"Bearer " + key.encode(errors="surrogateescape")
    return [(b"authorization", bearer)] if key else []


def _is_local(url: str, proxies: Mapping[str, str]) -> bool:
    """Whether a URL leads to this machine; looks its host up only if there are proxies."""
    try:
        host = (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:  # httpx raises the error that the user sees
        return False
    if host == "localhost" or host.endswith(".localhost") or auth.is_loopback(host):
        return True
    return bool(proxies) and any(starmap(_is_own, _addresses(host)))


def _addresses(host: str) -> list[tuple[socket.AddressFamily, Any]]:
    """The arguments of `bind`, with the scope of a link-local address."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM) if host else []
    except (OSError, UnicodeError):  # a proxy may know the name
        return []
    return [(family, address) for family, *_, address in found]


def _is_own(family: socket.AddressFamily, address: Any) -> bool:
    """Whether an address belongs to this machine: only such addresses can be bound."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.bind(address)
    except OSError:
        return False
    return True
