"""The zygote: a process that has imported vLLM and forks engine processes. `zygote` starts it.

A fork shares these imports, which take 20 seconds in a spawned process. The zygote has one thread
and no CUDA context. It calls nothing of vLLM, and refuses to fork if any of this changes.

A request is one message with open files: the payload (environment variables, then what
multiprocessing pickles for a spawned process), a pipe, the socket for the answer, the pipe of
multiprocessing's resource tracker, and files of the process itself. The fork waits for a byte in
the pipe. If the pipe closes first, the requester has given up, and the fork ends.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import socket
import sys
import traceback
from multiprocessing import forkserver, resource_tracker, spawn, util
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from llmserve.engine.parent_watch import join_group
from llmserve.engine.startup_log import keep_last
from llmserve.engine.worker.plugin import LOG_DIR, write_to
from llmserve.engine.zygote_guards import LATE, unfit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

MESSAGE_BYTES = 4096
FILES = 250  # in one message; the kernel's limit is 253
_THREADS = "OMP_NUM_THREADS"
_BLAS_THREADS = "OPENBLAS_NUM_THREADS"
_MODULES = (
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
)
# By whether the platform is a CPU: the import of one worker changes torch for the other.
_BACKENDS = {
    True: "vllm.v1.attention.backends.cpu_attn",
    False: "vllm.v1.attention.backends.flash_attn",
}


def serve(requests: socket.socket, context: Callable[[], Any]) -> None:
    """Import vLLM, then fork a process per request; cores fork their workers through `context`."""
    before = dict(os.environ)
    log = Path(os.environ[LOG_DIR]) / "zygote.log"
    keep_last(log)
    write_to(log)  # until a fork has its model's log file
    with _without_blas_threads():
        _import_engine()
    executor: Any = importlib.import_module("vllm.v1.executor.multiproc_executor")
    executor.get_mp_context = context
    gc.collect()
    gc.freeze()  # a collection in a fork would copy the pages of these objects
    ForkServer(requests, before, unfit).run()


@contextlib.contextmanager
def _without_blas_threads() -> Iterator[None]:
    """Have numpy's OpenBLAS start no threads at its import, unless the operator sets a number."""
    if _BLAS_THREADS in os.environ:
        yield
        return
    os.environ[_BLAS_THREADS] = "1"
    yield
    del os.environ[_BLAS_THREADS]


def _import_engine() -> None:
    for name in _MODULES:
        importlib.import_module(name)
    from vllm.platforms import current_platform  # noqa: PLC0415  # not in the server
    from vllm.utils.system_utils import set_process_title  # noqa: PLC0415  # as above

    from llmserve.engine.engine_arguments import worker_class  # noqa: PLC0415  # as above

    importlib.import_module(worker_class().rpartition(".")[0])
    importlib.import_module(_BACKENDS[current_platform.is_cpu()])
    # Also for the forks: the title's place is not found after their environment is replaced.
    set_process_title("zygote", prefix="llmserve")


class _Request(NamedTuple):
    """A request's message and files."""

    group: int | None  # the process group of a worker; an engine core leads its own
    environment: dict[str, str]
    payload: int
    parent: int
    answer: socket.socket
    tracker: int
    inherited: list[int]

    @classmethod
    def received(cls, message: bytes, files: list[int]) -> _Request:
        payload, parent, answer, tracker, *inherited = files
        group, length = json.loads(message)
        environment = json.loads(os.pread(payload, length, 0))
        os.lseek(payload, length, os.SEEK_SET)
        return cls(
            group, environment, payload, parent, socket.socket(fileno=answer), tracker, inherited
        )

    def close(self) -> None:
        for file in (self.payload, self.parent, self.tracker, *self.inherited):
            os.close(file)


class ForkServer:
    """Answers requests with the process id of a fork, or with a reason against it.

    An answer to a fork carries its pidfd. The fork's exit code follows when it ends.
    """

    def __init__(
        self,
        requests: socket.socket,
        before: Mapping[str, str],
        unfit: Callable[[], str | None],
    ) -> None:
        self._requests = requests
        self._of_imports = {n: v for n, v in os.environ.items() if n not in before}
        self._unfit = unfit
        self._poll = select.poll()
        self._poll.register(requests, select.POLLIN)
        self._running: dict[int, tuple[int, socket.socket]] = {}  # by pidfd

    def run(self) -> None:
        """Serve until the server's watch ends this process: no other end, so no time limit."""
        while True:
            for file, _ in self._poll.poll():
                if file in self._running:
                    self._reap(file)
                else:
                    message, files, _, _ = socket.recv_fds(
                        self._requests, MESSAGE_BYTES, FILES, socket.MSG_CMSG_CLOEXEC
                    )
                    request = _Request.received(message, files)
                    self._answer(request)
                    request.close()

    def _reap(self, pidfd: int) -> None:
        pid, answer = self._running.pop(pidfd)
        self._poll.unregister(pidfd)
        _, status = os.waitpid(pid, 0)
        _send(answer, str(os.waitstatus_to_exitcode(status)))
        answer.close()
        os.close(pidfd)

    def _answer(self, request: _Request) -> None:
        reason = self._unfit() or self._difference(request.environment)
        try:
            pid = 0 if reason else os.fork()
        except OSError as error:
            reason = f"the zygote cannot fork: {error.strerror}"
        if reason:
            _send(request.answer, reason)
            request.answer.close()
            return
        if not pid:
            self._become(request)
        pidfd = os.pidfd_open(pid)
        self._poll.register(pidfd, select.POLLIN)
        self._running[pidfd] = pid, request.answer
        _send(request.answer, str(pid), pidfd)

    def _difference(self, environment: dict[str, str]) -> str | None:
        """Return which variable has had its effect in the zygote with another value, if any."""
        wanted = self._of_imports | environment
        for name in sorted(wanted.keys() | os.environ.keys()):
            if wanted.get(name) == os.environ.get(name) or name in LATE:
                continue
            if name == _THREADS and wanted.get(name, "").isdecimal():
                continue  # set in the fork
            return f"{name} has changed since the server started"
        return None

    def _become(self, request: _Request) -> NoReturn:
        """Run the requested process in this fork."""
        code = 1
        try:
            self._requests.close()
            for pidfd, (_, answer) in self._running.items():
                os.close(pidfd)
                answer.close()
            request.answer.close()
            if os.read(request.parent, 1):
                _set_up(request, self._of_imports | request.environment)
                code = spawn._main(request.payload, request.parent)  # noqa: SLF001  # no public name
                atexit._run_exitfuncs()  # noqa: SLF001  # as at the end of a spawned process
        except BaseException:  # this process must not return to the zygote's loop
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)


def _set_up(request: _Request, environment: dict[str, str]) -> None:
    """Give a fork what a spawned process has of its own."""
    if request.group is not None:
        join_group(request.group, request.parent)
    threads = os.environ.get(_THREADS)
    os.environ.clear()
    os.environ.update(environment)
    if environment.get(_THREADS, threads) != threads:
        sys.modules["torch"].set_num_threads(int(environment[_THREADS]))
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    _reset_multiprocessing(request)


def _reset_multiprocessing(request: _Request) -> None:
    """As `spawn_main` and the main loop of the standard library's fork server do."""
    # None of the four names is public, or has a type.
    util._finalizer_registry.clear()  # type: ignore[attr-defined]  # noqa: SLF001  # as above
    util._run_after_forkers()  # type: ignore[attr-defined]  # noqa: SLF001  # as above
    resource_tracker._resource_tracker._fd = request.tracker  # type: ignore[attr-defined]  # noqa: SLF001  # as above
    forkserver._forkserver._inherited_fds = request.inherited  # type: ignore[attr-defined]  # noqa: SLF001  # as above


def _send(answer: socket.socket, text: str, *files: Any) -> None:
    with contextlib.suppress(OSError):  # the requester has ended, or given up
        socket.send_fds(answer, [text.encode()], files)
