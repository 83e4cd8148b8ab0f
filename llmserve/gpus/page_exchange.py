"""GPU memory that passes from an engine that falls asleep to an engine that wakes.

The driver needs a quarter of a second to free and allocate 36 GiB (docs/performance.md). Here
physical memory changes its owner instead, in pages that are file descriptors (CUDA driver API,
cuMemExportToShareableHandle). A worker offers the pages that it unmaps; the server keeps them while
another engine is about to wake on that GPU; the waking worker takes what it can use. A page without
a mapping and a descriptor returns to the driver, so a failure costs time and no memory.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

# A child of vLLM's logger: in an engine's process only that logger writes to the log.
log = logging.getLogger("vllm.llmserve.page_exchange")

PAGE_BYTES = 256 << 20
ADDRESS = "LLMSERVE_HANDOVER"  # environment variable: the name of the socket and the secret
_PER_MESSAGE = 250  # descriptors; Linux takes 253 (SCM_MAX_FD)
_MESSAGE_BYTES = 4096
_TIMEOUT_S = 5.0  # for the other end of a connection
_PAUSE_S = 0.1  # after a connection that cannot be accepted


class PageBroker:
    """The server's part: the pages between two engines, by GPU (UUID)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._expected: Counter[str] = Counter()
        self._pages: defaultdict[str, list[int]] = defaultdict(list)
        # An abstract name disappears with the server.
        name = f"llmserve-{os.getpid()}-{secrets.token_hex(8)}"
        self._secret = secrets.token_hex()  # the name can be seen in /proc/net/unix
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listening.bind(f"\0{name}")
        self._listening.listen(64)
        os.environ[ADDRESS] = f"{name} {self._secret}"
        threading.Thread(target=self._listen, name="handover", daemon=True).start()

    @contextlib.contextmanager
    def expecting(self, gpus: Sequence[str]) -> Iterator[None]:
        """Keep pages that are offered on these GPUs for an engine that wakes there."""
        with self._lock:
            self._expected.update(gpus)
        try:
            yield
        finally:
            with self._lock:
                self._expected.subtract(gpus)
                unexpected = [gpu for gpu in gpus if not self._expected[gpu]]
            self.drop(unexpected)

    def drop(self, gpus: Iterable[str]) -> None:
        """Return the pages to the driver in a thread, since the driver clears them."""
        with self._lock:
            pages = [page for gpu in gpus for page in self._pages.pop(gpu, ())]
        if pages:
            threading.Thread(target=_close, args=(pages,), name="handover-drop").start()

    def bytes(self, gpu: str) -> int:
        """Return the bytes of the pages that the server keeps now."""
        with self._lock:
            return len(self._pages.get(gpu, ())) * PAGE_BYTES

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError as error:  # out of file descriptors
                log.warning(
                    "cannot accept a page exchange; memory returns to the driver: %s", error
                )
                time.sleep(_PAUSE_S)
                continue
            threading.Thread(target=self._serve_connection, args=(connection,), daemon=True).start()

    def _serve_connection(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.settimeout(_TIMEOUT_S)
                self._answer(connection, json.loads(connection.recv(_MESSAGE_BYTES)))
            except Exception as error:
                log.warning("a page exchange failed: %s: %s", type(error).__name__, error)

    def _answer(self, connection: socket.socket, request: dict[str, Any]) -> None:
        """Serve one request. Raises an exception for an invalid one."""
        if not hmac.compare_digest(request["secret"], self._secret):
            raise PermissionError("wrong secret")
        gpu = str(request["gpu"])
        if "take" in request:
            _send(connection, self._take(gpu, int(request["take"])))
            return
        with self._lock:
            wanted = self._expected[gpu] > 0
        connection.send(json.dumps(wanted).encode())
        if not wanted:
            return
        pages = _receive(connection)
        with self._lock:
            if self._expected[gpu] > 0:
                self._pages[gpu] += pages
                pages = []
        _close(pages)
        connection.send(b"true")  # the giver waits until its memory has an owner

    def _take(self, gpu: str, count: int) -> list[int]:
        """Return at most `count` pages; the others return to the driver."""
        with self._lock:
            pages = self._pages.pop(gpu, [])
        _close(pages[count:])
        return pages[:count]


def give(gpu: str, pages: Sequence[int]) -> None:
    """Offer pages of a GPU, and close them."""
    try:
        if pages and (connection := _connect({"gpu": gpu})) is not None:
            with connection:
                if json.loads(connection.recv(_MESSAGE_BYTES)):
                    _send(connection, pages, close=False)
                    connection.recv(_MESSAGE_BYTES)
    except (OSError, ValueError) as error:
        log.warning("cannot offer pages; memory returns to the driver: %s", error)
    finally:
        _close(pages)


def take(gpu: str, count: int) -> list[int]:
    """Return at most `count` pages of a GPU; the server drops the others."""
    try:
        if (connection := _connect({"gpu": gpu, "take": count})) is None:
            return []
        with connection:
            return _receive(connection)
    except OSError as error:
        log.warning("cannot take pages; memory comes from the driver: %s", error)
        return []


def offered() -> bool:
    """Return whether a server accepts pages."""
    return ADDRESS in os.environ


def _connect(request: dict[str, Any]) -> socket.socket | None:
    """Return a connection to the server with a request sent on it; None without a server."""
    name, _, secret = os.environ.get(ADDRESS, "").partition(" ")
    if not name:
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(_TIMEOUT_S)
    try:
        connection.connect(f"\0{name}")
        connection.send(json.dumps({"secret": secret, **request}).encode())
    except OSError:
        connection.close()
        raise
    return connection


def _send(connection: socket.socket, pages: Sequence[int], *, close: bool = True) -> None:
    try:
        for first in range(0, len(pages), _PER_MESSAGE):
            socket.send_fds(connection, [b"pages"], pages[first : first + _PER_MESSAGE])
        connection.send(b"end")
    finally:
        if close:
            _close(pages)


def _receive(connection: socket.socket) -> list[int]:
    pages: list[int] = []
    try:
        while True:
            word, found, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, _PER_MESSAGE)
            pages += found
            for page in found:  # `recv_fds` leaves its flags out
                os.set_inheritable(page, False)
            if word != b"pages":
                return pages
    except OSError:
        _close(pages)
        raise


def _close(pages: Iterable[int]) -> None:
    for page in pages:
        os.close(page)
