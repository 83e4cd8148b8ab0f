"""A worker process that answers the server's requests, each in a fork with limits.

A fork ends with its check, so a crash, a leak or a loop affects that check only. The worker and
its fork end when the server ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from llmserve.engine.structured_output.compiler import HEAD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ANSWER_BYTES = 16 << 20
_PR_SET_PDEATHSIG = 1


class SandboxServer:
    """The pipes to the server: its requests, and the answers."""

    def __init__(self) -> None:
        self._requests: BinaryIO = os.fdopen(os.dup(0), "rb", buffering=0)
        self._answers = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)  # compilers print to stdout

    def requests(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Yield each request with its engine config, until the server ends."""
        while (head := self._exactly(HEAD.size)) is not None:
            parts = [self._exactly(length) for length in HEAD.unpack(head)]
            if parts[0] is None or parts[1] is None:
                return
            yield json.loads(parts[0]), parts[1]

    def answer(self, answer: dict[str, Any]) -> None:
        text = json.dumps(answer).encode()
        self._answers.write(HEAD.pack(len(text), 0) + text)
        self._answers.flush()

    def _exactly(self, length: int) -> bytes | None:
        parts = []
        while length:
            part = self._requests.read(length)
            if not part:
                return None
            parts.append(part)
            length -= len(part)
        return b"".join(parts)


def sandboxed(check: Callable[[], dict[str, Any]], limits: dict[str, Any]) -> dict[str, Any]:
    """Return the answer of `check`, run in a fork, or the limit that it exceeded."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _check_in_fork(check, limits, writing)
    os.close(writing)
    text = _read_until(reading, time.monotonic() + limits["wall_s"])
    os.close(reading)
    if text is None:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    ended = os.waitstatus_to_exitcode(status)
    if text is None:
        return {"outcome": "wall"}
    if ended == -signal.SIGXCPU:
        return {"outcome": "cpu"}
    with contextlib.suppress(ValueError):
        answer: dict[str, Any] = json.loads(text)
        return answer
    return {"outcome": "crash"}


def _check_in_fork(
    check: Callable[[], dict[str, Any]], limits: dict[str, Any], writing: int
) -> None:
    try:
        _limit(limits)
        with os.fdopen(writing, "wb") as out:
            out.write(json.dumps(check()).encode())
    finally:
        os._exit(0)  # on any exception: only the parent continues as the worker


def _limit(limits: dict[str, Any]) -> None:
    """Set the limits of this process, which also ends with its parent."""
    _end_with_parent()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    address_space = pages * resource.getpagesize() + limits["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_s"], limits["cpu_s"] + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with_server() -> None:
    """Set up before the worker's imports, which take seconds without reading a pipe."""
    _end_with_parent()
    poll = select.poll()
    poll.register(0, 0)
    if poll.poll(0):  # a hang-up: the server has ended
        sys.exit()


def _read_until(pipe: int, deadline_s: float) -> bytes | None:
    """Return what a fork writes until its end; None if it takes too long or writes too much."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    poll.register(0, 0)  # reports only a hang-up: the server has ended
    text = bytearray()
    while (remaining_s := deadline_s - time.monotonic()) > 0 and len(text) <= _ANSWER_BYTES:
        for descriptor, _ in poll.poll(remaining_s * 1000):
            if descriptor == 0:
                sys.exit()
            part = os.read(pipe, 1 << 16)
            if not part:
                return bytes(text)
            text += part
    return None


if __name__ == "__main__":
    _end_with_server()
    importlib.import_module(sys.argv[1]).main()
