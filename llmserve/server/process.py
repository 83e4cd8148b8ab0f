"""The process: bind, serve, start models, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, NoReturn, cast

import uvicorn
import uvloop
from rich.text import Text

from llmserve import terminal
from llmserve.engine import environment
from llmserve.engine.backend import VllmBackend
from llmserve.engine.run_folder import RunFolder
from llmserve.errors import LLMServeError, StartupError
from llmserve.gpus import nvml
from llmserve.gpus.page_exchange import PageBroker
from llmserve.http import app
from llmserve.http.services import Services
from llmserve.lifecycle.gpu_memory import GpuMemory
from llmserve.lifecycle.health import HealthMonitor
from llmserve.lifecycle.host_memory import HostMemory
from llmserve.lifecycle.operator import ModelOperator
from llmserve.lifecycle.pool import Pool
from llmserve.lifecycle.replica import State
from llmserve.metrics import Metrics
from llmserve.planning import survey
from llmserve.server import connection, startup_display, tls
from llmserve.server import logs as serverlog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rich.console import Console

    from llmserve.engine.backend import Memory
    from llmserve.lifecycle.replica import Backend
    from llmserve.registry.config import Config, ServerSpec

log = logging.getLogger(__name__)

_BACKLOG = 2048
_LINGER_S = 2


def up(
    config: Config,
    console: Console,
    read: Callable[[], Config],
    backend: Backend | None = None,
) -> NoReturn:
    """Serve a registry until a signal, then end the process; SIGHUP: `read` it again.

    `backend` starts the engines; without one it is vLLM. Raises StartupError before
    anything is loaded if the port is taken, the certificate cannot be used or others hold the
    GPUs, PlacementError if the models do not fit on them.
    """
    listener = bind(config.server)
    try:
        folder = RunFolder.make()
        try:
            code = _run(config, console, read, backend, listener)
        finally:
            folder.remove()
    finally:
        listener.close()
    leave(code)


def _run(
    config: Config,
    console: Console,
    read: Callable[[], Config],
    backend: Backend | None,
    listener: socket.socket,
) -> int:
    logs = _log_folder(config.server, listener)
    engines = sum(spec.replicas for spec in config.models)
    notices = environment.prepare(engines, logs)
    for notice in notices:
        console.print(Text(notice, "yellow"))
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    if backend is None:
        memory = _memory(config)
        _print_dtypes(memory, console)
        backend = VllmBackend(logs, memory)
    return runner.run(_Process(config, listener, console, backend, read).run())


def _memory(config: Config) -> Memory:
    """The plan of this machine's GPUs, or its host memory where vLLM runs on the CPU.

    Raises PlacementError if the models do not fit, StartupError if others hold the memory.
    """
    if environment.is_cpu_build():
        return HostMemory.from_config(config)
    box = nvml.visible()
    if not box:
        raise StartupError(
            "no NVIDIA GPU is visible: look at `nvidia-smi` and CUDA_VISIBLE_DEVICES, "
            "or install the variant for CPUs"
        )
    plan = survey.plan(config, box).raise_if_infeasible(config)
    space = GpuMemory(plan, host_memory=config.server.host_memory, handover=PageBroker())
    space.raise_if_taken()
    return space


def _print_dtypes(memory: Memory, console: Console) -> None:
    """The data type of each model on a CPU, where it may have been chosen."""
    if isinstance(memory, HostMemory) and memory.dtypes:
        listed = ", ".join(f"{name} in {dtype}" for name, dtype in memory.dtypes.items())
        console.print(f"On the CPU: {listed}.", markup=False, highlight=False, soft_wrap=True)


def bind(server: ServerSpec) -> socket.socket:
    """The listening port, taken before any model loads. Raises StartupError."""
    if not 0 <= server.port <= 65535:  # getaddrinfo would take it modulo 65536
        raise StartupError(f"port {server.port} is none; ports go from 0 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
    except (OSError, UnicodeError) as error:
        raise StartupError(
            f"server.host {server.host} is no address here: {getattr(error, 'strerror', error)}"
        ) from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise StartupError(
            f"port {server.port} on {server.host} cannot be bound: {error.strerror}; "
            "choose another with --port or end the process that has it"
        ) from None
    return listener


def _log_folder(server: ServerSpec, listener: socket.socket) -> Path:
    """A folder of the port's own: several servers do not share files. Raises StartupError."""
    try:
        folder = server.log_dir.expanduser() / str(listener.getsockname()[1])
        folder.mkdir(parents=True, exist_ok=True)
        serverlog.begin(folder / "server.log")
    except (OSError, RuntimeError) as error:
        raise StartupError(f"server.log_dir {server.log_dir} cannot be written: {error}") from None
    return folder


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: `_Process` decides when to end.

    It updates its date header once a second, not ten times, and one timer looks at all
    connections: a timer for each would cost more than a request's headers.
    """

    def __init__(self, config: connection.ConnectionConfig) -> None:
        super().__init__(config)
        self._limits = config.limits
        self._ending = asyncio.Event()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        sweeping = asyncio.create_task(self._sweep())
        try:
            await super().serve(sockets)
        finally:
            sweeping.cancel()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._limits.sweep_s)
            now = time.monotonic()
            for each in list(self.server_state.connections):
                try:
                    cast("connection.Connection", each).end_overdue(now)
                except Exception:  # this one's; the others go on
                    log.exception("a connection could not be looked at")

    def end(self) -> None:
        self.should_exit = True
        self._ending.set()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), 1)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Process:
    def __init__(
        self,
        config: Config,
        listener: socket.socket,
        console: Console,
        backend: Backend,
        read: Callable[[], Config],
    ) -> None:
        self._listener = listener
        self._console = console
        self._display = startup_display.display(console)
        self._metrics = Metrics()
        self._pool = Pool(config.models, backend, self._metrics, self._display.changed)
        self._display.add(self._pool.replicas)
        self._control = ModelOperator(config.server, self._pool, backend, read)
        services = Services(self._pool, self._metrics, self._control)
        self._uvicorn = _Uvicorn(_uvicorn_config(config.server, app.build(services)))
        self._signalled = asyncio.Event()
        self._reloads: set[asyncio.Task[None]] = set()

    def _on_hangup(self) -> None:
        reload = asyncio.create_task(self._reload())
        self._reloads.add(reload)
        reload.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        """As the operator's route does, told on the terminal."""
        try:
            lines = (await self._control.reload(dry_run=False))["lines"]
        except LLMServeError as error:
            lines = [error.message, "nothing has changed"]
        except Exception:
            log.exception("reload")
            lines = ["the reload failed; the server's log says why"]
        for line in lines or ["the registry has not changed"]:
            log.info("reload: %s", line)
            self._say(f"reload: {line}")

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        serving = asyncio.create_task(self._uvicorn.serve(sockets=[self._listener]))
        watches = [
            asyncio.create_task(self._metrics.watch_loop()),
            asyncio.create_task(HealthMonitor(self._pool).run()),
        ]
        try:
            code = await self._until_signalled()
            self._uvicorn.config.timeout_graceful_shutdown = _graceful_s(self._server)
            self._uvicorn.end()  # no new connections, and an end to idle ones
            await self._pool.drain(self._server.drain_timeout)
            await self._without_onlookers(serving)
        finally:
            for watch in watches:
                watch.cancel()
            await self._pool.stop()
            self._pool.kill()  # what belongs to no model, and ends that were given up
        return code

    @property
    def _server(self) -> ServerSpec:
        return self._control.server

    async def _without_onlookers(self, serving: asyncio.Task[None]) -> None:
        """What is still open now watches events or a log, and would not end by itself."""
        await asyncio.wait({serving}, timeout=_LINGER_S)
        self._uvicorn.force_exit = True
        await serving

    async def _until_signalled(self) -> int:
        """0 after a signal; the exit code of a start that failed."""
        signalled = asyncio.create_task(self._signalled.wait())
        self._say(f"Listening on {self._url()}, starting {len(self._pool.models)} models.")
        with self._display.live():
            starting = asyncio.create_task(self._pool.start())
            await asyncio.wait({starting, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            return 0
        try:
            await starting
        except StartupError as error:
            signalled.cancel()
            self._say(error.message, style="bold red")
            return error.exit_code
        self._announce()
        await signalled
        return 0

    def _announce(self) -> None:
        failed = sum(replica.state is State.FAILED for replica in self._pool.replicas)
        ready = ", ".join(entry.name for entry in self._pool.ready())
        asleep = [entry.name for entry in self._pool.models.values() if entry.is_idle_on_demand]
        notes = [f"{', '.join(asleep)} on demand"] if asleep else []
        notes += [f"{failed} failed"] if failed else []
        self._say(
            f"Serving {ready or 'nothing yet'} on {self._url()}"
            + (f" ({'; '.join(notes)})" if notes else "")
        )

    def _url(self) -> str:
        server, port = self._server, self._listener.getsockname()[1]
        scheme = "https" if server.ssl_certfile else "http"
        host = f"[{server.host}]" if ":" in server.host else server.host
        return f"{scheme}://{host}:{port}"

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style), soft_wrap=True)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._signalled.is_set():
            self._pool.kill()
            leave(128 + number)
        self._signalled.set()
        in_flight = sum(entry.slots.in_flight for entry in self._pool.models.values())
        if in_flight:
            limit = self._server.drain_timeout
            self._say(f"Stopping: {in_flight} requests get up to {limit:g} s; again to end now.")


def leave(code: int) -> NoReturn:
    """End the process now.

    Not through the interpreter's own end: it would wait for the thread of a start that
    was given up, and native modules of vLLM's print what they take for leaks.
    """
    terminal.finish()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # its reader has gone
            stream.flush()
    os._exit(code)


def _graceful_s(server: ServerSpec) -> int:
    return math.ceil(server.drain_timeout) + _LINGER_S


def _uvicorn_config(
    server: ServerSpec, application: object, limits: connection.Limits | None = None
) -> connection.ConnectionConfig:
    config = connection.ConnectionConfig(
        application,
        limits=limits or connection.Limits.of_process(),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        # The pool cuts off requests; this is for what holds a connection and no model.
        timeout_graceful_shutdown=_graceful_s(server),
        ssl_certfile=server.ssl_certfile,
        ssl_keyfile=server.ssl_keyfile,
    )
    if server.ssl_certfile is not None and server.ssl_keyfile is not None:
        tls.require_usable(server.ssl_certfile, server.ssl_keyfile)
    config.load()
    return config
