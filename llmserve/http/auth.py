"""Who may use which route: holders of a key, this machine's own programs, web pages."""

from __future__ import annotations

import hmac
import re
import socket
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llmserve.errors import Forbidden, Unauthorized, quoted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pydantic import SecretStr
    from starlette.types import Scope

    from llmserve.registry.spec import ServerSpec

# ASGI extension of our server: look the client's address up, which few requests need.
PEER = "llmserve.peer"

_OPEN = frozenset({"/health"})  # a probe has no key
_READS = frozenset({"GET", "HEAD", "OPTIONS"})  # change nothing; a page cannot read the answer
# A browser and a proxy send these; X-Forwarded-... is matched by its beginning.
_FROM_ELSEWHERE = frozenset({b"origin", b"forwarded", b"via", b"x-real-ip"})
_HOST = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[^:\[\]@/]+))(?::\d+)?", re.IGNORECASE)
# Public DNS has no names below these: RFC 6761, 6762, 8375, and ICANN's .internal.
_PRIVATE = (".localhost", ".local", ".internal", ".home.arpa")
# Schemes of origins that a web page can have; programs with a browser inside have their own.
_OF_PAGES = ("http://", "https://", "file://")


def is_admin(path: str) -> bool:
    """Whether a path is the operator's."""
    return path == "/admin" or path.startswith("/admin/")


def is_loopback(host: str) -> bool:
    """Whether a text is an address of the machine itself."""
    try:
        address = ip_address(host)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


def check(scope: Scope, server: ServerSpec) -> bytes | None:
    """Let a request in, or raise Unauthorized or Forbidden; the API key that it came with.

    The admin key opens /admin and an API key the rest. Where no key is set, a request must not
    come from a web page of another origin, and for /admin it must come from this machine.
    """
    path = scope["path"]
    if path in _OPEN:
        return None
    headers = dict(reversed(scope["headers"]))  # of a repeated header, the first
    if is_admin(path):
        _check_operator(scope, headers, server)
    elif server.api_keys:
        return _check_key(
            headers,
            server.api_keys,
            "No API key came; send `Authorization: Bearer KEY`.",
            "The API key is not one of this server's.",
        )
    else:
        _check_host(scope, headers.get(b"host", b""), server)
        if scope["method"] not in _READS:
            _check_origin(headers, server)
    return None


def _check_operator(scope: Scope, headers: Mapping[bytes, bytes], server: ServerSpec) -> None:
    if server.admin_key is not None:
        _check_key(
            headers,
            [server.admin_key],
            "No admin key came; send `Authorization: Bearer KEY`.",
            "The key is not server.admin_key; API keys do not open /admin.",
        )
        return
    if why := _not_from_here(scope, headers):
        raise Forbidden(
            f"{why}. Without server.admin_key, /admin answers this machine's own clients alone; "
            "set that key in the registry and send it."
        )
    if server.api_keys:  # a proxy that adds no header makes every client local
        _check_key(
            headers,
            server.api_keys,
            "No key came. Without server.admin_key, /admin needs one of server.api_keys; "
            "send `Authorization: Bearer KEY`.",
            "The key is not one of server.api_keys, which open /admin without server.admin_key.",
        )


def _check_key(
    headers: Mapping[bytes, bytes], keys: Iterable[SecretStr], missing: str, wrong: str
) -> bytes:
    """The key of `Authorization: Bearer KEY`, or Anthropic's `x-api-key`, if it is one of these."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    given = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
    if not given:
        raise Unauthorized(missing)
    matches = [hmac.compare_digest(given, key.get_secret_value().encode()) for key in keys]
    if not any(matches):
        raise Unauthorized(wrong)
    return given


# --- this machine


def _not_from_here(scope: Scope, headers: Mapping[bytes, bytes]) -> str | None:
    """Why a request may come from elsewhere, through a page in a browser or a local proxy.

    A page reaches this machine's ports under its own origin, or, by a DNS name of its owner
    that leads here, under its own host.
    """
    address = _peer(scope)
    if not is_loopback(address):
        return f"The client's address, {address}, is not a loopback address"
    for name in headers:
        if name in _FROM_ELSEWHERE or name.startswith(b"x-forwarded-"):
            came = quoted(name.decode("latin-1"))
            return f"The request has the header {came}, which a web page or a proxy sends"
    if headers.get(b"sec-fetch-site", b"none") != b"none":
        return "A web page sent the request"
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    if not hosts or not all(map(_is_local_host, hosts)):
        return f"The Host header, {quoted(', '.join(hosts))}, is no name of a loopback address"
    return None


def _peer(scope: Scope) -> str:
    client = scope.get("client")
    look_up = (scope.get("extensions") or {}).get(PEER)
    address = client[0] if client else look_up() if look_up else None
    return address or "unknown"


def _is_local_host(header: str) -> bool:
    name = _name_of(header)
    return name == "localhost" or is_loopback(name)


def _name_of(header: str) -> str:
    """The host of a Host header, without its port; empty if it is not one."""
    found = _HOST.fullmatch(header.strip())
    return (found["v6"] or found["name"]).lower() if found else ""


# --- web pages


def _check_host(scope: Scope, host: bytes, server: ServerSpec) -> None:
    """Refuse a page that reaches this machine by a DNS name of its own: DNS rebinding."""
    if _is_own_host(host) or _is_allowed_host(host, server) or not is_loopback(_peer(scope)):
        return
    raise Forbidden(
        f"The Host header is {quoted(host.decode('latin-1'))}, which may be a web page's own "
        "name for this machine. Without server.api_keys, local clients may send localhost, an IP "
        "address, this machine's name, or the host of one of server.allowed_origins. Add its "
        "origin there and restart the server, or set server.api_keys.",
        code="host_refused",
    )


@lru_cache(maxsize=64)
def _is_own_host(header: bytes) -> bool:
    """Whether no web page can have this host: an address, or a name that cannot be registered."""
    if not header:
        return True  # every browser sends one
    name = _name_of(header.decode("latin-1")).rstrip(".")
    if not name:
        return False
    try:
        ip_address(name)
    except ValueError:
        return "." not in name or name.endswith(_PRIVATE) or name == socket.gethostname().lower()
    return True


def _is_allowed_host(header: bytes, server: ServerSpec) -> bool:
    name = _name_of(header.decode("latin-1"))
    return "*" in server.allowed_origins or name in {
        urlsplit(origin).hostname for origin in server.allowed_origins
    }


def _check_origin(headers: Mapping[bytes, bytes], server: ServerSpec) -> None:
    """Refuse what a page of another origin sends: browsers name it, pages cannot hide it."""
    if "*" in server.allowed_origins:
        return
    origin = headers.get(b"origin")
    if origin is None:
        if headers.get(b"sec-fetch-site") not in {b"cross-site", b"same-site"}:
            return
        came = "of another site, without an Origin"
    else:
        name = origin.decode("latin-1")
        if name in server.allowed_origins or _is_own_origin(name, headers.get(b"host", b"")):
            return
        came = f"of the origin {quoted(name)}"
    allowed = ", ".join(map(quoted, server.allowed_origins)) or "empty"
    raise Forbidden(
        f"A web page {came} sent the request. Without server.api_keys, pages of this server's own "
        f"origin and of server.allowed_origins may; that list is {allowed}. Add the origin there "
        "and restart the server, or set server.api_keys.",
        code="origin_refused",
    )


def _is_own_origin(origin: str, host: bytes) -> bool:
    """Whether a page of this host, or no page at all, sends an origin.

    A proxy may end TLS, so the scheme does not count.
    """
    origin = origin.lower()
    if origin != "null" and not origin.startswith(_OF_PAGES):
        return "://" in origin  # an extension or a program: app://, vscode-webview://
    return origin.partition("://")[2] == host.decode("latin-1").lower()
