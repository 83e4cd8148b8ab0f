"""Pages between engines: descriptors stand for them, as they do for CUDA."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import socket
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llmserve.gpus import page_exchange
from llmserve.gpus.page_exchange import ADDRESS, PAGE_BYTES, PageBroker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> PageBroker:
    monkeypatch.setenv(ADDRESS, "restored afterwards")
    return PageBroker()


def made(*contents: bytes) -> list[int]:
    """Pages: what is written there tells them apart."""
    pages = []
    for each in contents:
        page = os.memfd_create("page")
        os.write(page, each)
        pages.append(page)
    return pages


def read(pages: list[int]) -> list[bytes]:
    found = [os.pread(page, 100, 0) for page in pages]
    for page in pages:
        os.close(page)
    return found


def descriptors() -> int:
    gc.collect()  # what other tests have left open
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_exchange_passes_pages(server: PageBroker) -> None:
    before = descriptors()
    with server.expecting(["a"]):
        page_exchange.give("a", made(b"one", b"two"))
        assert server.bytes("a") == 2 * PAGE_BYTES
        taken = page_exchange.take("a", 2)
        assert server.bytes("a") == 0
    assert read(taken) == [b"one", b"two"]
    until(lambda: descriptors() == before)


def test_more_than_one_message_holds(server: PageBroker) -> None:
    contents = [str(number).encode() for number in range(600)]
    with server.expecting(["a"]):
        page_exchange.give("a", made(*contents))
        assert read(page_exchange.take("a", 600)) == contents


def test_exchange_without_expected_engine_keeps_nothing(server: PageBroker) -> None:
    before = descriptors()
    page_exchange.give("a", made(b"one"))
    assert server.bytes("a") == 0
    assert page_exchange.take("a", 1) == []
    until(lambda: descriptors() == before)


def test_gpus_have_their_own(server: PageBroker) -> None:
    with server.expecting(["a", "b"]):
        page_exchange.give("a", made(b"one"))
        page_exchange.give("b", made(b"two"))
        assert page_exchange.take("c", 1) == []
        assert read(page_exchange.take("b", 1)) == [b"two"]
        assert server.bytes("a") == PAGE_BYTES


@pytest.mark.parametrize("count", [0, 1])
def test_what_is_not_taken_goes_back_to_the_driver(server: PageBroker, count: int) -> None:
    before = descriptors()
    with server.expecting(["a"]):
        page_exchange.give("a", made(b"one", b"two"))
        assert read(page_exchange.take("a", count)) == [b"one", b"two"][:count]
        assert server.bytes("a") == 0
        until(lambda: descriptors() == before)


def test_exchange_drops_pages_after_the_wake(server: PageBroker) -> None:
    before = descriptors()
    with server.expecting(["a"]):
        page_exchange.give("a", made(b"one"))
    assert server.bytes("a") == 0
    until(lambda: descriptors() == before)


def test_exchange_with_two_expected_engines_keeps_pages(server: PageBroker) -> None:
    with server.expecting(["a"]):
        with server.expecting(["a"]):
            page_exchange.give("a", made(b"one"))
        server.drop(["b"])
        assert server.bytes("a") == PAGE_BYTES
        server.drop(["a"])
        assert server.bytes("a") == 0


def test_without_a_server_pages_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ADDRESS, raising=False)
    before = descriptors()
    page_exchange.give("a", made(b"one"))
    assert page_exchange.take("a", 1) == []
    assert not page_exchange.offered()
    assert descriptors() == before


def test_with_a_server_that_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADDRESS, "llmserve-nobody")
    before = descriptors()
    page_exchange.give("a", made(b"one"))
    assert page_exchange.take("a", 1) == []
    assert page_exchange.offered()
    assert descriptors() == before


@contextmanager
def connected() -> Iterator[tuple[socket.socket, str]]:
    """A connection of somebody else's, and the secret."""
    name, secret = os.environ[ADDRESS].split()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(5)
        connection.connect(f"\0{name}")
        yield connection, secret


NONSENSE = (
    "",
    "{",
    "[]",
    "1e999",
    "[" * 3000,
    '{"take": 1}',
    '{"secret": "SECRET"}',
    '{"secret": "SECRET", "gpu": "a", "take": "x"}',
    '{"secret": "SECRET", "gpu": "a", "take": Infinity}',
)


@pytest.mark.parametrize("word", NONSENSE)
def test_nonsense_does_not_end_it(server: PageBroker, word: str) -> None:
    with connected() as (connection, secret):
        connection.send(word.replace("SECRET", secret).encode())
    with server.expecting(["a"]):
        page_exchange.give("a", made(b"one"))
        assert read(page_exchange.take("a", 1)) == [b"one"]


@pytest.mark.parametrize("secret", ['"wrong"', '""', "null", "1"])
def test_exchange_with_wrong_secret_returns_nothing(server: PageBroker, secret: str) -> None:
    with server.expecting(["a"]):
        page_exchange.give("a", made(b"one"))
        with connected() as (connection, _):
            connection.send(b'{"secret": %b, "gpu": "a", "take": 1}' % secret.encode())
            assert connection.recv(100) == b""
        assert server.bytes("a") == PAGE_BYTES


def test_exchange_with_silent_connection_serves_others(
    server: PageBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_exchange, "_TIMEOUT_S", 600.0)
    with connected(), server.expecting(["a"]):
        began = time.monotonic()
        page_exchange.give("a", made(b"one"))
        assert read(page_exchange.take("a", 1)) == [b"one"]
        assert time.monotonic() - began < 60


def test_without_a_descriptor_for_a_connection_it_goes_on(
    server: PageBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_exchange, "_TIMEOUT_S", 3.0)
    name = os.environ[ADDRESS].split()[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # all that there may be are taken
        try:
            connection.connect(f"\0{name}")
            time.sleep(0.1)  # it cannot be accepted
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with server.expecting(["a"]):
            while not server.bytes("a"):
                page_exchange.give("a", made(b"one"))
            assert read(page_exchange.take("a", 1)) == [b"one"]


def test_a_page_is_not_passed_on_to_programs_that_are_started(server: PageBroker) -> None:
    with server.expecting(["a"]):
        page_exchange.give("a", made(b"one"))
        (page,) = page_exchange.take("a", 1)
    assert not os.get_inheritable(page)
    os.close(page)


def test_a_giver_that_ends_on_the_way_costs_nothing(
    server: PageBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_exchange, "_TIMEOUT_S", 0.1)
    before = descriptors()
    with server.expecting(["a"]):
        with connected() as (connection, secret):
            connection.send(b'{"secret": "%b", "gpu": "a"}' % secret.encode())
            assert connection.recv(100) == b"true"
            pages = made(b"one")
            socket.send_fds(connection, [b"pages"], pages)
            read(pages)
            time.sleep(0.3)  # no end comes
        assert server.bytes("a") == 0
        page_exchange.give("a", made(b"two"))
        assert read(page_exchange.take("a", 1)) == [b"two"]
    until(lambda: descriptors() == before)


def takes_from_elsewhere(found: Connection) -> None:
    found.send(read(page_exchange.take("a", 5)))


def test_from_process_to_process(server: PageBroker) -> None:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    with server.expecting(["a"]):
        page_exchange.give("a", made(b"one", b"two"))
        other = spawn.Process(target=takes_from_elsewhere, args=(theirs,))
        other.start()
        assert ours.poll(60)
        assert ours.recv() == [b"one", b"two"]
        other.join()
