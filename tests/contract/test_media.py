"""URLs of images, as vLLM has them fetched, on loopback sockets."""

from __future__ import annotations

import asyncio
import base64
from contextlib import asynccontextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pytest
import vllm.envs as envs
from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from llmserve.engine.environment import MEDIA_CONNECTOR
from llmserve.engine.media import PublicMedia, is_public

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def picture() -> bytes:
    written = BytesIO()
    Image.new("RGB", (2, 2)).save(written, "PNG")
    return written.getvalue()


class Site:
    """A server on loopback that counts who comes; it redirects from /to/ADDRESS."""

    def __init__(self) -> None:
        self.visits = 0
        self.port = 0

    async def visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.visits += 1
        path = unquote((await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode())
        if path.startswith("/to/"):
            head = f"302 Found\r\nlocation: http://{path[4:]}:{self.port}/inner.png"
            body = b""
        else:
            head, body = "200 OK\r\ncontent-type: image/png", picture()
        writer.write(f"HTTP/1.1 {head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()


@asynccontextmanager
async def site() -> AsyncIterator[Site]:
    made = Site()
    server = await asyncio.start_server(made.visit, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    async with server:
        yield made


def connector(domains: list[str] | None = None) -> Any:
    """As vLLM's parser of contents makes it."""
    return MEDIA_CONNECTOR_REGISTRY.load(
        envs.VLLM_MEDIA_CONNECTOR,
        media_io_kwargs=None,
        allowed_local_media_path="",
        allowed_media_domains=domains,
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "[::ffff:127.0.0.1]"])
async def test_media_of_private_address_is_refused(host: str) -> None:
    async with site() as visited:
        with pytest.raises(VLLMValidationError, match="not a public address"):
            await connector().fetch_image_async(f"http://{host}:{visited.port}/a.png")
        assert visited.visits == 0


@pytest.mark.parametrize("host", ["2130706433", "127.1", "0", "0x7f.1", "0177.0.0.1", "[::1%25lo]"])
async def test_media_of_address_in_disguise_is_refused(host: str) -> None:
    async with site() as visited:
        with pytest.raises(Exception):  # noqa: B017, PT011  # the resolver's or ours, by how the address is disguised
            await asyncio.wait_for(
                connector().fetch_image_async(f"http://{host}:{visited.port}/a.png"), 30
            )
        assert visited.visits == 0


async def test_media_of_allowed_domain_may_be_private() -> None:
    async with site() as visited:
        image = await connector(["localhost"]).fetch_image_async(
            f"http://localhost:{visited.port}/a.png"
        )
        assert image.size == (2, 2)
        with pytest.raises(ValueError, match="allowed domains"):
            await connector(["localhost"]).fetch_image_async(
                f"http://127.0.0.1:{visited.port}/a.png"
            )
        assert visited.visits == 1


@pytest.mark.parametrize("target", ["127.0.0.1", "[::ffff:127.0.0.1]"])
async def test_media_that_redirects_to_private_address_is_refused(target: str) -> None:
    async with site() as visited:
        with pytest.raises(VLLMValidationError, match="not a public address"):
            await connector(["localhost"]).fetch_image_async(
                f"http://localhost:{visited.port}/to/{target}"
            )
        assert visited.visits == 1  # the redirect itself


async def test_media_in_data_url_needs_no_address() -> None:
    url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    assert (await connector().fetch_image_async(url)).size == (2, 2)


async def test_media_connection_ignores_proxies_cookies_and_netrc() -> None:
    client = await connector().connection.get_async_client()
    assert not client.trust_env
    assert type(client.cookie_jar).__name__ == "DummyCookieJar"
    with pytest.raises(VLLMValidationError):
        connector().connection.get_sync_client()


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
        *("0.0.0.0", "255.255.255.255", "224.0.0.1", "::1", "::", "fe80::1", "fe80::1%eth0"),
        *("fd00:ec2::254", "::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "ff02::1"),
        *("2001:0:7f00:1::", "localhost", "", "1", "10.0.0"),
    ],
)
def test_address_that_is_special_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_address_on_the_internet_is_public(address: str) -> None:
    assert is_public(address)


def test_vllm_loads_its_fetcher_by_name() -> None:
    said = "llmserve/engine/media.py is loaded so; look at how this vLLM fetches a URL"
    assert envs.VLLM_MEDIA_CONNECTOR == MEDIA_CONNECTOR
    assert MEDIA_CONNECTOR_REGISTRY.name2class[MEDIA_CONNECTOR] is PublicMedia, said
