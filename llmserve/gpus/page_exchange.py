"""GPU memory that passes from an engine that falls asleep to one that wakes.

By way of the driver that takes a quarter of a second for 36 GiB (docs/performance.md). Here
physical memory changes hands instead, in pages that are file descriptors (CUDA driver API,
cuMemExportToShareableHandle): a worker offers what it unmaps, the server keeps it while
somebody is expected on that GPU, and whoever wakes takes what it can use. A page that nobody maps, and to which no descriptor is left, is
the driver's again, so whatever goes wrong on the way costs time and no memory.
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

# A child of vLLM's logger: in an engine's process no other reaches the log.
log = logging.getLogger("vllm.llmserve.page_exchange")

PAGE_BYTES = 256 << 20
ADDRESS = "LLMSERVE_HANDOVER"  # in the environment: where the server listens, and what it asks
_PER_MESSAGE = 250  # descriptors; Linux takes 253 (SCM_MAX_FD)
_MESSAGE_BYTES = 4096
_PATIENCE_S = 5.0  # with the other end
_PAUSE_S = 0.1  # after a connection that could not be accepted


class PageBroker:
    """The server's end: the pages between two engines, by GPU (UUID)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._expected: Counter[str] = Counter()
        self._pages: defaultdict[str, list[int]] = defaultdict(list)
        # An abstract name: nothing is left when the server ends, however that happens.
        name = f"llmserve-{os.getpid()}-{secrets.token_hex(8)}"
        self._secret = secrets.token_hex()  # the name can be seen in /proc/net/unix
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listening.bind(f"\0{name}")
        self._listening.listen(64)
        os.environ[ADDRESS] = f"{name} {self._secret}"
        threading.Thread(target=self._listen, name="handover", daemon=True).start()

    @contextlib.contextmanager
    def expecting(self, gpus: Sequence[str]) -> Iterator[None]:
        """Keep what is offered on these GPUs for somebody who is about to wake there."""
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
        """Back to the driver, some moments later: that takes as long as it has to clear."""
        with self._lock:
            pages = [page for gpu in gpus for page in self._pages.pop(gpu, ())]
        if pages:
            threading.Thread(target=_close, args=(pages,), name="handover-drop").start()

    def bytes(self, gpu: str) -> int:
        """Between two engines at this moment."""
        with self._lock:
            return len(self._pages.get(gpu, ())) * PAGE_BYTES

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError as error:  # no descriptor is left
                log.warning("memory goes by way of the driver: %s", error)
                time.sleep(_PAUSE_S)
                continue
            threading.Thread(target=self._meet, args=(connection,), daemon=True).start()

    def _meet(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.settimeout(_PATIENCE_S)
                self._answer(connection, json.loads(connection.recv(_MESSAGE_BYTES)))
            except Exception as error:
                log.warning("a handover was broken off: %s: %s", type(error).__name__, error)

    def _answer(self, connection: socket.socket, asked: dict[str, Any]) -> None:
        """Raises whatever is wrong with what is asked."""
        if not hmac.compare_digest(asked["secret"], self._secret):
            raise PermissionError("by somebody who does not know the secret")
        gpu = str(asked["gpu"])
        if "take" in asked:
            _send(connection, self._taken(gpu, int(asked["take"])))
            return
        with self._lock:
            wanted = self._expected[gpu] > 0
        connection.send(json.dumps(wanted).encode())
        if not wanted:
            return
        pages = _received(connection)
        with self._lock:
            if self._expected[gpu] > 0:
                self._pages[gpu] += pages
                pages = []
        _close(pages)
        connection.send(b"true")  # so that the giver knows where its memory is

    def _taken(self, gpu: str, count: int) -> list[int]:
        """So many at the most; what is left goes back to the driver."""
        with self._lock:
            pages = self._pages.pop(gpu, [])
        _close(pages[count:])
        return pages[:count]


def give(gpu: str, pages: Sequence[int]) -> None:
    """Offer pages of a GPU, and close them."""
    try:
        if pages and (connection := _asking({"gpu": gpu})) is not None:
            with connection:
                if json.loads(connection.recv(_MESSAGE_BYTES)):
                    _send(connection, pages, close=False)
                    connection.recv(_MESSAGE_BYTES)
    except (OSError, ValueError) as error:
        log.warning("memory goes back to the driver: %s", error)
    finally:
        _close(pages)


def take(gpu: str, count: int) -> list[int]:
    """As many pages of a GPU as there are, `count` at the most. Nobody else gets the rest."""
    try:
        if (connection := _asking({"gpu": gpu, "take": count})) is None:
            return []
        with connection:
            return _received(connection)
    except OSError as error:
        log.warning("memory comes from the driver: %s", error)
        return []


def offered() -> bool:
    """Whether there is a server to hand pages over to."""
    return ADDRESS in os.environ


def _asking(asked: dict[str, Any]) -> socket.socket | None:
    """A connection to the server, on which this has been asked."""
    name, _, secret = os.environ.get(ADDRESS, "").partition(" ")
    if not name:
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(_PATIENCE_S)
    try:
        connection.connect(f"\0{name}")
        connection.send(json.dumps({"secret": secret, **asked}).encode())
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


def _received(connection: socket.socket) -> list[int]:
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
