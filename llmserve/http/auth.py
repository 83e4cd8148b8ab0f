"""Access to routes: by key, from this machine, from web pages."""

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

# ASGI extension of our server: returns the client's address, which few requests need.
PEER = "llmserve.peer"

_OPEN = frozenset({"/health"})  # a probe has no key
_READS = frozenset({"GET", "HEAD", "OPTIONS"})  # no effect, and pages cannot read the answer
# Headers of browsers and proxies, besides X-Forwarded-*.
_REMOTE_HEADERS = frozenset({b"origin", b"forwarded", b"via", b"x-real-ip"})
_HOST = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[^:\[\]@/]+))(?::\d+)?", re.IGNORECASE)
# Domains outside public DNS: RFC 6761, 6762, 8375, and ICANN's .internal.
_PRIVATE = (".localhost", ".local", ".internal", ".home.arpa")
# Schemes of the origins of web pages; programs with an embedded browser have others.
_PAGE_SCHEMES = ("http://", "https://", "file://")


def is_admin(path: str) -> bool:
    """Return whether a path belongs to /admin."""
    return path == "/admin" or path.startswith("/admin/")


def is_loopback(host: str) -> bool:
    """Return whether a text is a loopback address."""
    try:
        address = ip_address(host)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


def check(scope: Scope, server: ServerSpec) -> bytes | None:
    """Return the API key of a request; None where no API key is needed.

    /admin needs the admin key, other routes an API key. Without a key in the registry, web
    pages of other origins have no access, and /admin is for clients on this machine.

    Raises Unauthorized for a missing or wrong key, else Forbidden.
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
            "The request has no API key; send `Authorization: Bearer KEY`.",
            "The API key is not one of server.api_keys.",
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
            "The request has no admin key; send `Authorization: Bearer KEY`.",
            "The key is not server.admin_key; API keys do not open /admin.",
        )
        return
    if reason := _remote_reason(scope, headers):
        raise Forbidden(
            f"{reason}. Without server.admin_key, only clients on this machine may use /admin. "
            "Set server.admin_key in the registry and send it."
        )
    if server.api_keys:  # a proxy that adds no header makes every client local
        _check_key(
            headers,
            server.api_keys,
            "The request has no key. Without server.admin_key, /admin needs one of "
            "server.api_keys; send `Authorization: Bearer KEY`.",
            "The key is not one of server.api_keys, which /admin needs without server.admin_key.",
        )


def _check_key(
    headers: Mapping[bytes, bytes], keys: Iterable[SecretStr], missing: str, wrong: str
) -> bytes:
    """Return the key of `Authorization: Bearer KEY` or of Anthropic's `x-api-key`.

    Raises Unauthorized if it is not one of `keys`.
    """
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    given = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
    if not given:
        raise Unauthorized(missing)
    matches = [hmac.compare_digest(given, key.get_secret_value().encode()) for key in keys]
    if not any(matches):
        raise Unauthorized(wrong)
    return given


# --- this machine


def _remote_reason(scope: Scope, headers: Mapping[bytes, bytes]) -> str | None:
    """Return why a request may be remote, from a web page or through a local proxy; else None.

    A page reaches this machine's ports with its own origin. With a DNS name that resolves to
    this machine, it sends its own host.
    """
    address = _peer(scope)
    if not is_loopback(address):
        return f"The client address {address} is not a loopback address"
    for name in headers:
        if name in _REMOTE_HEADERS or name.startswith(b"x-forwarded-"):
            came = quoted(name.decode("latin-1"))
            return f"The request has the header {came} of a web page or a proxy"
    if headers.get(b"sec-fetch-site", b"none") != b"none":
        return "A web page sent the request"
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    if not hosts or not all(map(_is_local_host, hosts)):
        return f"The Host header {quoted(', '.join(hosts))} is not a loopback address"
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
    """Return the host of a Host header without its port; empty if the header is malformed."""
    found = _HOST.fullmatch(header.strip())
    return (found["v6"] or found["name"]).lower() if found else ""


# --- web pages


def _check_host(scope: Scope, host: bytes, server: ServerSpec) -> None:
    """Raise Forbidden for a page on a DNS name of this machine: DNS rebinding."""
    if _is_own_host(host) or _is_allowed_host(host, server) or not is_loopback(_peer(scope)):
        return
    raise Forbidden(
        f"The Host header {quoted(host.decode('latin-1'))} may be the name of a web page. "
        "Without server.api_keys, local clients must send localhost, an IP address, the name of "
        "this machine, or the host of one of server.allowed_origins. "
        "Add the origin to that list and restart the server, or set server.api_keys.",
        code="host_refused",
    )


@lru_cache(maxsize=64)
def _is_own_host(header: bytes) -> bool:
    """Return whether no web page can have this host: an address or an unregistrable name."""
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
    """Raise Forbidden for a page of another origin, which pages cannot hide."""
    if "*" in server.allowed_origins:
        return
    origin = headers.get(b"origin")
    if origin is None:
        if headers.get(b"sec-fetch-site") not in {b"cross-site", b"same-site"}:
            return
        came = "of another site without an Origin header"
    else:
        name = origin.decode("latin-1")
        if name in server.allowed_origins or _is_own_origin(name, headers.get(b"host", b"")):
            return
        came = f"of the origin {quoted(name)}"
    allowed = ", ".join(map(quoted, server.allowed_origins)) or "empty"
    raise Forbidden(
        f"A web page {came} sent the request. Without server.api_keys, only pages of this server "
        f"and of server.allowed_origins have access; that list is {allowed}. "
        "Add the origin to the list and restart the server, or set server.api_keys.",
        code="origin_refused",
    )


def _is_own_origin(origin: str, host: bytes) -> bool:
    """Return whether an origin is of this host or of no web page.

    The scheme has no influence: a proxy may end TLS.
    """
    origin = origin.lower()
    if origin != "null" and not origin.startswith(_PAGE_SCHEMES):
        return "://" in origin  # an extension or a program: app://, vscode-webview://
    return origin.partition("://")[2] == host.decode("latin-1").lower()
