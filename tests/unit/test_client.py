from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import pytest

from llmserve.cli import client
from llmserve.cli.errors import CommandError, NoServer

if TYPE_CHECKING:
    from collections.abc import Mapping

PROXIES = {"http": "http://proxy.example:3128"}
NAMES = {
    "box.example": "127.0.0.1",  # as many systems have it for their own name
    "away.example": "203.0.113.7",
}


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver without a network."""
    real = socket.getaddrinfo

    def resolve(host: str, port: Any, **options: int) -> object:
        if host.endswith(".example") and host not in NAMES:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return real(NAMES.get(host, host), port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:8000",
        "http://LOCALHOST.",
        "http://a.localhost",
        "http://127.1.2.3:1",
        "http://127.1:1",
        "https://[::1]:8000",
        "http://[::ffff:127.0.0.1]",
        "http://0.0.0.0:8000",
        "http://box.example:8000",
    ],
)
def test_url_of_this_machine_is_local(url: str) -> None:
    assert client._is_local(url, PROXIES)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost.example",
        "http://away.example",
        "http://203.0.113.7",
        "http://[::1",
        "",
        "http://" + "a" * 70,
    ],
)
def test_url_of_another_machine_is_not_local(url: str) -> None:
    assert not client._is_local(url, PROXIES)


def test_every_address_of_this_machine_is_local() -> None:
    import psutil

    own = [
        f"[{each.address}]" if each.family is socket.AF_INET6 else each.address
        for addresses in psutil.net_if_addrs().values()
        for each in addresses
        if each.family in (socket.AF_INET, socket.AF_INET6)
    ]
    assert own
    assert all(client._is_local(f"http://{each}:8000", PROXIES) for each in own)


def test_name_is_not_looked_up_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_addresses", lambda _: pytest.fail("looked up"))
    assert not client._is_local("http://box.example", {})


UNUSABLE: list[Mapping[str, str]] = [
    {"ALL_PROXY": "gopher://proxy.example"},
    {"HTTP_PROXY": "http://proxy.example:port"},
    {"all_proxy": "http://[::1"},
]


def connect(url: str, key: str | None = None) -> client.Client:
    return client.Client(url, key, "LLMSERVE_KEY")


@pytest.mark.parametrize("environment", UNUSABLE)
def test_invalid_proxy_is_an_error_only_for_other_machines(
    environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NoServer, match=r"invalid proxy in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY"):
        connect("http://away.example")
    connect("http://127.0.0.1:8000", "k").close()


def test_missing_certificates_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/none")
    with pytest.raises(NoServer, match="cannot read SSL_CERT_FILE or SSL_CERT_DIR"):
        connect("https://away.example")


@pytest.mark.parametrize(
    ("given", "url"),
    [
        (" box:8000/v1/ ", "http://box:8000"),
        ("https://box/llm/", "https://box/llm"),
        ("[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_url_of_a_server_is_normalized(given: str, url: str) -> None:
    assert client.normalize_url(given) == url


@pytest.mark.parametrize("key", ["k\r\n", "\ufeffk", " k\t"])
def test_key_is_sent_without_what_a_file_adds(key: str) -> None:
    assert client._headers(key) == [(b"authorization", b"Bearer k")]


@pytest.mark.parametrize("key", ["k\nsecond", "k\x00", "\x1b[0mk"])
def test_key_with_control_characters_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(
        CommandError, match="invalid key: it contains control characters"
    ) as refused:
        connect("http://127.0.0.1:1", key)
    assert "k\n" not in str(refused.value)
