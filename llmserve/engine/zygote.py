"""Forks engine processes from the zygote, a process that has imported vLLM (`zygote_process`).

A fork takes milliseconds where a spawned process imports vLLM for 20 seconds. vLLM creates its
processes through a multiprocessing context. `Zygote.context` returns one whose processes are
forked, or spawned as before if the zygote refuses, hangs or has ended.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from functools import partial
from multiprocessing import popen_forkserver, reduction, resource_tracker, spawn, util
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext, SpawnProcess, set_spawning_popen
from typing import TYPE_CHECKING, Any, NamedTuple

from llmserve.engine import zygote_process
from llmserve.engine.parent_watch import ParentWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

_EXIT_CODE_S = 1.0
_UNKNOWN = 255  # the exit code of a process whose zygote has ended, as in multiprocessing


class ZygoteError(Exception):
    """The zygote did not fork. The message is the reason."""


class _Fork(NamedTuple):
    pid: int
    pidfd: int
    answer: socket.socket  # carries the exit code
    parent: int  # the pipe whose end shows the fork that its requester has ended

    def close(self) -> None:
        os.close(self.pidfd)
        os.close(self.parent)
        self.answer.close()


class Zygote:
    """Requests forks from a zygote, which may still import.

    After a request without an answer in time there is no other: its fork may come late.
    """

    def __init__(
        self, requests: socket.socket, *, import_s: float, answer_s: float = 10.0, is_core: bool
    ) -> None:
        self._requests = requests
        self._answer_s = answer_s
        self._ready_s = time.monotonic() + import_s  # at the latest
        self._is_core = is_core
        self._watch: ParentWatch | None = None
        self._fault = ""

    @classmethod
    def start(
        cls,
        serve: Callable[..., None] = zygote_process.serve,
        *,
        import_s: float = 300.0,
        answer_s: float = 10.0,
    ) -> Zygote:
        """Start a zygote. Returns at once: it imports vLLM while this process does."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        zygote = cls(ours, import_s=import_s, answer_s=answer_s, is_core=False)
        zygote._watch = ParentWatch()
        with theirs, zygote._watch.watching():
            process = multiprocessing.get_context("spawn").Process(
                target=_serve, args=(serve, theirs, ours), name="zygote", daemon=True
            )
            try:
                process.start()
            except OSError as error:
                zygote._fault = f"the zygote could not be started: {error.strerror}"
        return zygote

    def context(self) -> SpawnContext:
        """Return a multiprocessing context whose processes the zygote forks."""
        return _Context(self)

    def kill(self) -> None:
        """End the zygote, but none of the processes that it has forked. Idempotent."""
        self._requests.close()
        if self._watch is not None:
            self._watch.kill()

    def fork(self, environment: bytes, pickled: memoryview, inherited: Sequence[int]) -> _Fork:
        """Fork a process that runs what is pickled. Raises ZygoteError."""
        if self._fault:
            raise ZygoteError(self._fault)
        if sys.platform != "linux":
            raise ZygoteError("a zygote needs Linux")
        if os.fsdecode(spawn.get_executable()) != sys.executable:
            raise ZygoteError("its program is replaced, as for NUMA binding")
        group = os.getpgrp() if self._is_core else None
        with contextlib.ExitStack() as opened:
            payload = opened.enter_context(os.fdopen(os.memfd_create("llmserve"), "wb"))
            payload.write(environment)
            payload.write(pickled)
            payload.flush()
            reads, parent = os.pipe()
            opened.callback(os.close, reads)
            answer, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            opened.enter_context(theirs)
            tracker: Any = resource_tracker.getfd()
            files = [payload.fileno(), reads, theirs.fileno(), tracker, *inherited]
            failed = opened.enter_context(contextlib.ExitStack())
            failed.callback(answer.close)
            failed.callback(os.close, parent)
            self._send(json.dumps([group, len(environment)]).encode(), files)
            theirs.close()
            pid, pidfd = self._receive(answer)
            with contextlib.suppress(BrokenPipeError):  # it was killed; its exit code follows
                os.write(parent, b"1")  # the fork begins
            failed.pop_all()
        return _Fork(pid, pidfd, answer, parent)

    def _send(self, message: bytes, files: list[int]) -> None:
        try:
            self._requests.settimeout(self._answer_s)
            socket.send_fds(self._requests, [message], files)
        except OSError as error:
            raise self._failed(error) from error

    def _receive(self, answer: socket.socket) -> tuple[int, int]:
        try:
            answer.settimeout(max(self._ready_s - time.monotonic(), self._answer_s))
            message, files, _, _ = socket.recv_fds(
                answer, zygote_process.MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            raise self._failed(error) from error
        if not message:
            raise self._failed(BrokenPipeError())
        self._ready_s = 0.0
        if not files:
            raise ZygoteError(message.decode())
        return int(message), files[0]

    def _failed(self, error: OSError) -> ZygoteError:
        """End the zygote's use and return the reason."""
        hangs = isinstance(error, TimeoutError)
        self._fault = "the zygote did not answer in time" if hangs else "the zygote has ended"
        self.kill()
        return ZygoteError(self._fault)


def _serve(serve: Callable[..., None], requests: socket.socket, of_cores: socket.socket) -> None:
    serve(requests, Zygote(of_cores, import_s=0.0, is_core=True).context)


class _Context(SpawnContext):
    def __init__(self, zygote: Zygote) -> None:
        # A class in typeshed; multiprocessing's own `ctx.Process` is called in the same way.
        self.Process = partial(_Process, zygote)  # type: ignore[misc, assignment]


class _Process(SpawnProcess):
    """A process that is forked if possible. In the new process it is a spawned one in any case."""

    def __init__(self, zygote: Zygote, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.zygote = zygote

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: value for name, value in vars(self).items() if name != "zygote"}
        return object.__new__, (SpawnProcess,), state

    # Multiprocessing's name; a static method there, which gets the process.
    def _Popen(self, _: Any) -> Any:  # type: ignore[override]  # noqa: N802
        try:
            return _Popen(self)
        except ZygoteError as error:
            log.warning("%s is spawned instead of forked: %s", self.name, error)
            return SpawnProcess._Popen(self)  # noqa: SLF001  # the method above replaces it


class _Popen(popen_forkserver.Popen):
    """A forked process, as multiprocessing handles it."""

    def _launch(self, process: _Process) -> None:
        self._fork = process.zygote.fork(
            json.dumps(dict(os.environ)).encode(),
            self._pickled(process),
            self._fds,  # type: ignore[attr-defined]  # of the base class
        )
        self.pid, self.sentinel = self._fork.pid, self._fork.pidfd
        self.finalizer = util.Finalize(self, self._fork.close)

    def _pickled(self, process: _Process) -> memoryview:
        preparation = spawn.get_preparation_data(process.name)
        # The main module of the server, which a spawned process would import.
        preparation = {k: v for k, v in preparation.items() if not k.startswith("init_main")}
        buffer = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(preparation, buffer)
            reduction.dump(process, buffer)
        finally:
            set_spawning_popen(None)
        return buffer.getbuffer()

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        if self.returncode is None and wait([self.sentinel], 0 if flag == os.WNOHANG else None):
            self.returncode = self._exit_code()
        return self.returncode

    def _exit_code(self) -> int:
        """Return what the zygote reports. Other threads may read it too, so it stays there."""
        self._fork.answer.settimeout(_EXIT_CODE_S)
        try:
            return int(self._fork.answer.recv(16, socket.MSG_PEEK))
        except (OSError, ValueError):
            return _UNKNOWN

    def _send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.sentinel, number)
