"""A worker's requests from the server, and each answer made in a fork with limits.

The fork ends with its check, so a crash, a leak or a loop costs that check alone. The
worker ends when the server has ended, and takes a fork under way with it.
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
    """The server's end of the pipes: its requests in, answers out."""

    def __init__(self) -> None:
        self._requests: BinaryIO = os.fdopen(os.dup(0), "rb", buffering=0)
        self._answers = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)  # what compilers print is no answer

    def requests(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Each request and the engine config with it, until the server has ended."""
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
    """The answer of `check`, made in a fork within `limits`; else which of them it exceeded."""
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
        os._exit(0)  # whatever was raised: the worker goes on in its own process alone


def _limit(limits: dict[str, Any]) -> None:
    """For this process: what a check may take, and an end with its parent."""
    _end_with_parent()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    space = pages * resource.getpagesize() + limits["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_s"], limits["cpu_s"] + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with_server() -> None:
    """Before the imports of a worker, which take seconds and read no pipe."""
    _end_with_parent()
    poll = select.poll()
    poll.register(0, 0)
    if poll.poll(0):  # a hang-up: the server ended before that
        sys.exit()


def _read_until(pipe: int, deadline_s: float) -> bytes | None:
    """What a fork writes until it ends; None if it does not end in time or writes too much."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    poll.register(0, 0)  # only a hang-up is reported: the server has ended
    text = bytearray()
    while (left_s := deadline_s - time.monotonic()) > 0 and len(text) <= _ANSWER_BYTES:
        for descriptor, _ in poll.poll(left_s * 1000):
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
