from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import pytest

from llmserve.cli import client, operate
from llmserve.cli.chat import ChatClient as Chat
from llmserve.cli.chat import ChatError, ChatOptions
from llmserve.cli.client import SettingError

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
def test_url_of_this_machine_is_asked_directly(url: str) -> None:
    assert client._is_here(url, PROXIES)


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
def test_url_of_another_machine_may_have_a_proxy(url: str) -> None:
    assert not client._is_here(url, PROXIES)


def test_every_address_of_this_machine_is_asked_directly() -> None:
    import psutil

    own = [
        f"[{each.address}]" if each.family is socket.AF_INET6 else each.address
        for addresses in psutil.net_if_addrs().values()
        for each in addresses
        if each.family in (socket.AF_INET, socket.AF_INET6)
    ]
    assert own
    assert all(client._is_here(f"http://{each}:8000", PROXIES) for each in own)


def test_name_is_not_looked_up_where_there_is_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_addresses", lambda _: pytest.fail("looked up"))
    assert not client._is_here("http://box.example", {})


UNUSABLE: list[Mapping[str, str]] = [
    {"ALL_PROXY": "gopher://proxy.example"},
    {"HTTP_PROXY": "http://proxy.example:port"},
    {"all_proxy": "http://[::1"},
]


@pytest.mark.parametrize("environment", UNUSABLE)
def test_unusable_proxy_is_told(
    environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingError, match=r"a proxy of the environment .* cannot be used: "):
        client.connected("http://away.example", None)
    with pytest.raises(operate.NoServer, match="cannot be used"):
        operate.AdminClient("http://away.example", None)
    with pytest.raises(ChatError, match="cannot be used"):
        Chat(ChatOptions(url="http://away.example"))


@pytest.mark.parametrize("environment", UNUSABLE)
def test_unusable_proxy_does_not_matter_to_a_server_here(
    environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    client.connected("http://127.0.0.1:8000", "k").close()


@pytest.mark.parametrize(
    ("given", "url"),
    [
        (" box:8000/v1/ ", "http://box:8000"),
        ("https://box/llm/", "https://box/llm"),
        ("[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_url_of_a_server_is_taken_as_users_write_it(given: str, url: str) -> None:
    assert client.url_of(given) == url


@pytest.mark.parametrize("key", ["k\r\n", "\ufeffk", " k\t"])
def test_key_is_sent_without_what_a_file_adds(key: str) -> None:
    with client.connected("http://127.0.0.1:1", key) as made:
        assert made.headers["authorization"] == "Bearer k"


@pytest.mark.parametrize("key", ["k\nsecond", "k\x00", "\x1b[0mk"])
def test_key_that_no_header_carries_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(SettingError, match="the key holds control characters") as refused:
        client.connected("http://127.0.0.1:1", key)
    assert "k\n" not in str(refused.value)
