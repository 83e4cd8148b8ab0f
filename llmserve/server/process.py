"""The server's process: bind, serve, start models, drain, end."""

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
from functools import partial
from typing import TYPE_CHECKING, NoReturn, cast

import uvicorn
import uvloop
from rich.text import Text

from llmserve import terminal
from llmserve.engine import environment
from llmserve.engine.backend import VllmBackend
from llmserve.engine.run_folder import RunFolder
from llmserve.engine.zygote import Zygote
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
from llmserve.server import connection, startup_display
from llmserve.server import logs as serverlog
from llmserve.server.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rich.console import Console

    from llmserve.engine.backend import Memory
    from llmserve.lifecycle.replica import Backend
    from llmserve.registry.spec import Config, ServerSpec

log = logging.getLogger(__name__)

_BACKLOG = 2048
_LINGER_S = 2


def up(
    config: Config,
    console: Console,
    read: Callable[[], Config],
    backend: Backend | None = None,
) -> NoReturn:
    """Serve a registry until a signal, then end the process. SIGHUP calls `read` and reloads.

    `backend` starts the engines; the default is vLLM. Raises, before a model is loaded,
    StartupError for a port or GPU that cannot be used, and PlacementError for models
    that do not fit.
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
        # On a GPU host the imports create a CUDA context and threads, which no fork can have.
        zygote = Zygote.start() if environment.is_cpu_build() else None
        backend = VllmBackend(logs, memory, zygote=zygote)
    process = _Process(config, listener, console, backend, read)
    process.on_serving = partial(serverlog.mark_served, logs / serverlog.NAME)
    return runner.run(process.run())


def _memory(config: Config) -> Memory:
    """The plan of this machine's GPUs, or the host memory if vLLM runs on the CPU.

    Raises PlacementError if the models do not fit, StartupError if other processes use the memory.
    """
    if environment.is_cpu_build():
        return HostMemory.from_config(config)
    box = nvml.visible()
    if not box:
        raise StartupError(
            "no NVIDIA GPU is visible; check `nvidia-smi` and CUDA_VISIBLE_DEVICES, "
            "or install llmserve[cpu]"
        )
    plan = survey.plan(config, box).raise_if_infeasible(config)
    space = GpuMemory(plan, host_memory=config.server.host_memory, handover=PageBroker())
    space.raise_if_taken()
    return space


def _print_dtypes(memory: Memory, console: Console) -> None:
    """Print the data type of each model on a CPU."""
    if isinstance(memory, HostMemory) and memory.dtypes:
        listed = ", ".join(f"{name} in {dtype}" for name, dtype in memory.dtypes.items())
        console.print(f"On the CPU: {listed}.", markup=False, highlight=False, soft_wrap=True)


def bind(server: ServerSpec) -> socket.socket:
    """Open the listening socket. Raises StartupError."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
    except (OSError, UnicodeError) as error:
        raise StartupError(
            f"server.host {server.host} is not an address of this machine: "
            f"{getattr(error, 'strerror', error)}"
        ) from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise StartupError(
            f"port {server.port} on {server.host} cannot be bound: {error.strerror}; "
            "choose another port with --port or end the process that uses it"
        ) from None
    return listener


def _log_folder(server: ServerSpec, listener: socket.socket) -> Path:
    """Create the log folder of the port, which no other server shares. Raises StartupError."""
    try:
        folder = server.log_dir.expanduser() / str(listener.getsockname()[1])
        folder.mkdir(parents=True, exist_ok=True)
        serverlog.begin(folder / serverlog.NAME)
    except (OSError, RuntimeError) as error:
        raise StartupError(f"server.log_dir {server.log_dir} cannot be written: {error}") from None
    return folder


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: `_Process` ends it.

    Its date header changes once a second, not ten times. One timer checks all connections: a timer
    per connection would cost more than parsing a request's headers.
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
                except Exception:  # the other connections need their check
                    log.exception("check of a connection failed")

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
        self.on_serving: Callable[[], object] = lambda: None
        self._signalled = asyncio.Event()
        self._reloads: set[asyncio.Task[None]] = set()

    def _on_hangup(self) -> None:
        reload = asyncio.create_task(self._reload())
        self._reloads.add(reload)
        reload.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        """Reload as `POST /admin/reload` does, and print the result."""
        try:
            lines = (await self._control.reload(dry_run=False))["lines"]
        except LLMServeError as error:
            lines = [error.message, "nothing has changed"]
        except Exception:
            log.exception("reload")
            lines = ["the reload failed; see server.log for the reason"]
        for line in lines or ["the registry has not changed"]:
            log.info("reload: %s", line)
            self._print(f"reload: {line}")

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
            self._uvicorn.end()  # closes idle connections and accepts no new ones
            await self._pool.drain(self._server.drain_timeout)
            await self._end_serving(serving)
        finally:
            for watch in watches:
                watch.cancel()
            await self._pool.stop()
            self._pool.kill()  # engines without a model, and engines that did not stop
        return code

    @property
    def _server(self) -> ServerSpec:
        return self._control.server

    async def _end_serving(self, serving: asyncio.Task[None]) -> None:
        """End uvicorn. Streams of events and logs have no end of their own."""
        await asyncio.wait({serving}, timeout=_LINGER_S)
        self._uvicorn.force_exit = True
        await serving

    async def _until_signalled(self) -> int:
        """Return 0 after a signal, or the exit code of a failed start."""
        signalled = asyncio.create_task(self._signalled.wait())
        self._print(f"Listening on {self._url()}, starting {len(self._pool.models)} models.")
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
            self._print(error.message, style="bold red")
            return error.exit_code
        self.on_serving()
        self._announce()
        await signalled
        return 0

    def _announce(self) -> None:
        failed = sum(replica.state is State.FAILED for replica in self._pool.replicas)
        ready = ", ".join(entry.name for entry in self._pool.ready())
        asleep = [entry.name for entry in self._pool.models.values() if entry.is_idle_on_demand]
        notes = [f"{', '.join(asleep)} on demand"] if asleep else []
        notes += [f"{failed} failed"] if failed else []
        self._print(
            f"Serving {ready or 'no model yet'} on {self._url()}"
            + (f" ({'; '.join(notes)})" if notes else "")
        )

    def _url(self) -> str:
        server, port = self._server, self._listener.getsockname()[1]
        scheme = "https" if server.ssl_certfile else "http"
        host = f"[{server.host}]" if ":" in server.host else server.host
        return f"{scheme}://{host}:{port}"

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style), soft_wrap=True)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._signalled.is_set():
            self._pool.kill()
            leave(128 + number)
        self._signalled.set()
        in_flight = sum(entry.slots.in_flight for entry in self._pool.models.values())
        if in_flight:
            limit = self._server.drain_timeout
            self._print(
                f"Stopping: {in_flight} requests have up to {limit:g} s. "
                "Press Ctrl-C again to end now."
            )


def leave(code: int) -> NoReturn:
    """End the process now, without the interpreter's shutdown.

    The shutdown would wait for the thread of a cancelled start, and native modules of vLLM would
    print false reports of leaks.
    """
    terminal.finish()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a closed pipe
            stream.flush()
    os._exit(code)


def _graceful_s(server: ServerSpec) -> int:
    return math.ceil(server.drain_timeout) + _LINGER_S


def _uvicorn_config(
    server: ServerSpec, application: object, limits: Limits | None = None
) -> connection.ConnectionConfig:
    config = connection.ConnectionConfig(
        application,
        limits=limits or Limits.from_process(),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        # For connections without a model; the pool ends requests of models.
        timeout_graceful_shutdown=_graceful_s(server),
        ssl_certfile=server.ssl_certfile,
        ssl_keyfile=server.ssl_keyfile,
    )
    config.load()
    return config
