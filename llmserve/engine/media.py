"""Fetches images, audio and video by URL, from public addresses only.

vLLM fetches any `http(s)` URL from the server's network: a client could read what only the server
can reach, such as a cloud's metadata service. Here each address is checked before a connection,
including those of DNS names and redirects. Hosts of `allowed_media_domains`, which the operator
sets, may have any address.

vLLM loads the class by name (vllm/renderers/chat_utils.py, `_connector`).
"""

from __future__ import annotations

import ipaddress
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

import aiohttp
from vllm.connections import HTTPConnection
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from llmserve.engine.environment import MEDIA_CONNECTOR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiohttp.abc import ResolveResult
    from aiohttp.tracing import Trace

_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: an IPv4 address in the last 32 bits


@MEDIA_CONNECTOR_REGISTRY.register(MEDIA_CONNECTOR)
class PublicMedia(MediaConnector):
    """vLLM's connector with a guarded connection."""

    def __init__(
        self,
        media_io_kwargs: dict[str, dict[str, Any]] | None = None,
        *,
        allowed_local_media_path: str = "",
        allowed_media_domains: list[str] | None = None,
    ) -> None:
        super().__init__(
            media_io_kwargs,
            _connection(frozenset(allowed_media_domains or ())),
            allowed_local_media_path=allowed_local_media_path,
            allowed_media_domains=allowed_media_domains,
        )


class GuardedConnection(HTTPConnection):
    """Connects to public addresses, and to any address of a host in `domains`."""

    def __init__(self, domains: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self._domains = domains
        self._async_client: aiohttp.ClientSession | None = None

    async def get_async_client(self) -> aiohttp.ClientSession:
        """Return a session without a proxy, whose connections would be out of sight.

        It has no cookies and no netrc: clients must not share them.
        """
        if self._async_client is None:
            self._async_client = aiohttp.ClientSession(
                connector=_Connector(self._domains),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
            )
        return self._async_client

    def get_sync_client(self) -> NoReturn:
        raise VLLMValidationError("Media can be fetched asynchronously only.")


@cache
def _connection(domains: frozenset[str]) -> GuardedConnection:
    """Return the connection of a set of hosts, which all requests share."""
    return GuardedConnection(domains)


class _Connector(aiohttp.TCPConnector):
    def __init__(self, domains: frozenset[str]) -> None:
        super().__init__()
        self._domains = domains

    async def _resolve_host(
        self, host: str, port: int, traces: Sequence[Trace] | None = None
    ) -> list[ResolveResult]:
        """Return the addresses to connect to. Called for names, addresses and redirects."""
        found: list[ResolveResult] = await super()._resolve_host(host, port, traces)
        if host not in self._domains and not all(is_public(each["host"]) for each in found):
            raise VLLMValidationError(
                f"The media URL leads to {host!r}, which is not a public address. Public addresses "
                "and data: URLs are allowed; the operator can add hosts to allowed_media_domains.",
                parameter="url",
            )
        return found


def is_public(address: str) -> bool:
    """Whether an address is on the internet: not private, loopback, link-local or special."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF))
        if not all(is_public(str(each)) for each in inner if each is not None):
            return False
        if ip.ipv4_mapped is not None:
            return True
    return ip.is_global and not ip.is_multicast
