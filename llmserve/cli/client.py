"""HTTP from a command to one server: its URL, the key, proxies, event streams and errors."""

from __future__ import annotations

import json
import re
import socket
from itertools import starmap
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx

from llmserve.http import auth

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_LIMITS = httpx.Limits()
_LINE_END = re.compile(rb"\r\n|\r(?!\Z)|\n")  # a last \r may be half of \r\n: wait and see


class SettingError(Exception):
    """What an option or the environment gives a client, and it cannot use."""


def url_of(given: str) -> str:
    """The URL of a server as a user writes it: with or without a scheme, `/v1` or a last slash."""
    # In a locale without UTF-8 an argument's bytes come as lone surrogates.
    given = given.encode(errors="surrogateescape").decode(errors="replace")
    url = given.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    return url if "://" in url else f"http://{url}"


def connected(
    url: str,
    key: str | None,
    timeout: httpx.Timeout | None = None,
    limits: httpx.Limits = _LIMITS,
) -> httpx.Client:
    """A client of the server at `url` that sends `key`.

    A server on this machine is asked directly: HTTP_PROXY would send the request and its key to
    another machine. For any other server the environment's proxies hold, as for curl. Raises
    SettingError if one of them, or the key, cannot be used.
    """
    key = (key or "").strip("\ufeff \t\r\n")  # as it comes out of a file
    if any(ord(each) < 0x20 or each == "\x7f" for each in key):
        raise SettingError("the key holds control characters, which no header carries; correct it")
    bearer = b"Bearer " + key.encode(errors="surrogateescape")
    try:
        return httpx.Client(
            headers=[(b"authorization", bearer)] if key else None,
            timeout=timeout,
            limits=limits,
            transport=httpx.HTTPTransport(limits=limits) if _is_here(url, getproxies()) else None,
        )
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise SettingError(
            "a proxy of the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY) cannot be used: "
            f"{error}; correct it, or unset it for this command"
        ) from None


def sse_data(chunks: Iterable[bytes]) -> Iterator[str]:
    """Give the data of each event, wherever its bytes were cut: HTML standard, 9.2.6.

    httpx's iter_lines() would also end lines at U+2028 and the like, which JSON may hold.
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
    """Find the words in an error object: OpenAI's, FastAPI's or whatever came."""
    while isinstance(body, dict):
        known = (body[k] for k in ("error", "message", "detail") if body.get(k))
        body = next(known, None) or json.dumps(body)
    return str(body)


def _is_here(url: str, proxies: Mapping[str, str]) -> bool:
    """Whether a URL leads to this machine; its host is looked up only if there are proxies."""
    try:
        host = (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:  # httpx explains it
        return False
    if host == "localhost" or host.endswith(".localhost") or auth.is_loopback(host):
        return True
    return bool(proxies) and any(starmap(_is_own, _addresses(host)))


def _addresses(host: str) -> list[tuple[socket.AddressFamily, Any]]:
    """As `bind` takes them, with the scope of a link-local one."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM) if host else []
    except (OSError, UnicodeError):  # a proxy may know it
        return []
    return [(family, address) for family, *_, address in found]


def _is_own(family: socket.AddressFamily, address: Any) -> bool:
    """Whether an address is one of this machine's: these can be bound."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.bind(address)
    except OSError:
        return False
    return True
