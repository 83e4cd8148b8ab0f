"""Starts engines for the pool. The first start imports vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from llmserve.checkpoint import files
from llmserve.engine import gc_policy
from llmserve.engine.hang_detection import HangDetector, cpu_s
from llmserve.engine.startup_log import StartLog, cause_of
from llmserve.engine.worker.plugin import log_file
from llmserve.errors import ModelUnusable, ShapeUnknown, StartupError
from llmserve.lifecycle.replica import MemoryBudget, State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from concurrent.futures import Future
    from contextlib import AbstractAsyncContextManager

    from llmserve.checkpoint.hub import HubFolder, HubRevision
    from llmserve.engine.zygote import Zygote
    from llmserve.lifecycle.gpu_memory import Keep
    from llmserve.lifecycle.placement import Placement
    from llmserve.lifecycle.replica import Running
    from llmserve.registry.spec import ModelSpec

log = logging.getLogger(__name__)

_STARTS = 64  # at the same time


class _Modules(NamedTuple):
    """The modules that import vLLM, imported with the first start."""

    handlers: Any
    launcher: Any


class _Clock:
    """Seconds of a start, by step."""

    def __init__(self) -> None:
        self.took: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, step: str, inner: Sequence[Mapping[str, float]] = ()) -> None:
        """Record the time since the last lap; `inner` are its steps in parallel workers."""
        now = time.monotonic()
        slowest = {name: max(each[name] for each in inner) for name in (inner[0] if inner else ())}
        self.took[step] = max(0.0, now - self._last - sum(slowest.values()))
        self.took |= slowest
        self._last = now


@dataclass(frozen=True)
class Patience:
    """Time limits of a start, without its download."""

    look_s: float = 0.5  # between two reads of the log
    quiet_s: float = 600.0  # without a log line and without work
    at_most_s: float = 7200.0


_STOP_S = 60.0  # for the threads of a killed engine
_WORKING_SHARE = 0.01  # of a core: reading weights from a slow disk uses that


class _Start:
    """A start in a thread of its own, with the engine that it owns until it succeeds."""

    def __init__(self, modules: _Modules, threads: ThreadPoolExecutor, log: StartLog) -> None:
        self._launcher = modules.launcher
        self._threads = threads
        self._log = log
        self._watch = modules.launcher.new_watch()
        self._made: Future[Any] | None = None

    @contextlib.asynccontextmanager
    async def owned(self) -> AsyncIterator[None]:
        """End the engine, started or starting, on any exception, including cancellation."""
        try:
            yield
        except BaseException as error:
            self._watch.kill()
            made, self._made = self._made, None
            stopping = asyncio.wrap_future(self._threads.submit(self._stop, made))
            if not isinstance(error, Exception):
                raise  # the thread continues
            await asyncio.wait({stopping}, timeout=_STOP_S)
            if isinstance(error, StartupError):
                raise
            raise StartupError(cause_of(error, self._log.path)) from error

    def _stop(self, made: Future[Any] | None) -> None:
        """Release what a killed engine has in this process, after its start has ended."""
        try:
            if made is not None and made.exception() is None:
                made.result().stop()
        except Exception:
            log.exception("%s: the engine did not stop cleanly", self._log.path)

    async def engine(
        self,
        spec: ModelSpec,
        number: int,
        report: Callable[[State, str], None],
        patience: Patience,
        *,
        sleeps: bool,
    ) -> Any:
        await asyncio.to_thread(self._log.begin)
        start = partial(self._launcher.start, spec, number, sleeps=sleeps, watch=self._watch)
        self._made = self._threads.submit(start)
        made = asyncio.wrap_future(self._made)
        made.add_done_callback(_retrieved)
        began = time.monotonic()
        detector = HangDetector(
            began,
            lambda: cpu_s(self._watch.pids),
            quiet_s=patience.quiet_s,
            at_most_s=patience.at_most_s,
            working_share=_WORKING_SHARE,
        )
        while not made.done():
            await asyncio.wait({made}, timeout=patience.look_s)
            hangs = await asyncio.to_thread(self._hangs, detector)
            if self._log.is_warming:
                report(State.WARMING, "")
            if hangs and not made.done():
                if time.monotonic() - began >= patience.at_most_s:
                    reason = f"not ready after {patience.at_most_s:g} s"
                else:
                    reason = f"hung, with no log line and no work for {patience.quiet_s:g} s"
                raise StartupError(
                    f"the engine was killed while it started: {reason}; its log: {self._log.path}"
                )
        return await made

    def _hangs(self, detector: HangDetector) -> bool:
        return detector.is_hang(time.monotonic(), has_output=self._log.read_new())


def _retrieved(future: asyncio.Future[Any]) -> None:
    """Mark the exception of an abandoned start as retrieved."""
    if not future.cancelled():
        future.exception()


def _raise_if_flawed(spec: ModelSpec) -> None:
    """Raises StartupError for files on which vLLM would fail later, without their names."""
    try:
        checkpoint = files.of(spec, hub=False)
        files.raise_if_flawed(spec, checkpoint)
        checkpoint.config()
    except ModelUnusable as error:
        raise StartupError(error.message) from error
    except ShapeUnknown:
        return  # vLLM may support it


def _with_folders(spec: ModelSpec, fetched: Mapping[str, HubFolder]) -> ModelSpec:
    """Return `spec` with folders: by names vLLM uses another cache, and contacts the hub again."""
    folders = {repo: each.folder for repo, each in fetched.items()}
    loras = {name: folders.get(source, source) for name, source in spec.loras.items()}
    own = fetched.get(spec.model)
    model = own.folder if own is not None and own.warning is not None else spec.model
    return spec.model_copy(update={"loras": loras, "model": model})


class Memory(MemoryBudget, Protocol):
    """A memory budget in which starts wait."""

    def start(
        self, spec: ModelSpec, placement: Placement
    ) -> AbstractAsyncContextManager[tuple[ModelSpec, Keep]]:
        """Yield the spec with its placement, while it may start, and a function for its reports."""
        ...


class VllmBackend:
    """Starts vLLM engines within a memory budget: `GpuMemory` or `HostMemory`."""

    def __init__(
        self,
        log_dir: Path,
        memory: Memory,
        patience: Patience | None = None,
        zygote: Zygote | None = None,
    ) -> None:
        self._log_dir = log_dir
        self._zygote = zygote
        self._patience = patience or Patience()
        self.memory = memory
        # A thread for each start: an engine's constructor blocks until it is ready.
        self._threads = ThreadPoolExecutor(_STARTS, thread_name_prefix="start")
        self._imported: _Modules | None = None
        self._importing = asyncio.Lock()
        # Replicas share a download, also when they start again.
        self._downloads: dict[HubRevision, HubFolder] = {}
        self._downloading: defaultdict[HubRevision, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._killed = False

    async def start(
        self, spec: ModelSpec, placement: Placement, report: Callable[[State, str], None]
    ) -> Running:
        try:
            return await self._started(spec, placement, report)
        except Exception:
            gc_policy.collect_soon()
            raise

    async def _started(
        self, spec: ModelSpec, placement: Placement, report: Callable[[State, str], None]
    ) -> Running:
        clock = _Clock()
        spec = await self._downloaded(spec, report)
        clock.lap("download")
        report(State.LOADING, "")
        await asyncio.to_thread(_raise_if_flawed, spec)
        modules = await self._modules()
        clock.lap("server_imports")
        number = placement.number
        start = _Start(modules, self._threads, StartLog(self.log_of(spec, number)))
        async with start.owned():
            async with self.memory.start(spec, placement) as (placed, keep):
                clock.lap("gpu_wait")
                async with start.owned():  # the engine ends before its GPUs are free
                    engine = await start.engine(
                        placed, number, report, self._patience, sleeps=placement.sleeps
                    )
                    reports = await engine.start_reports()
                    keep(reports)
                clock.lap("engine", [each["seconds"] for each in reports])
            handlers = await modules.handlers.ModelHandlers.build(placed, engine)
            handlers.prepare_constraints()
        clock.lap("serving")
        handlers.took = clock.took
        running: Running = handlers
        return running

    def log_of(self, spec: ModelSpec, number: int) -> Path:
        return log_file(self._log_dir, spec.name, number if spec.replicas > 1 else None)

    async def _downloaded(self, spec: ModelSpec, report: Callable[[State, str], None]) -> ModelSpec:
        if not spec.hub_names:
            return spec
        report(State.DOWNLOADING, "")
        loop = asyncio.get_running_loop()

        def progress(done: int, total: int) -> None:
            note = f"{done / 2**30:.2f} of {total / 2**30:.2f} GiB"
            loop.call_soon_threadsafe(report, State.DOWNLOADING, note)

        hub = await loop.run_in_executor(
            self._threads, importlib.import_module, "llmserve.checkpoint.hub"
        )
        fetched: dict[str, HubFolder] = {}
        for wanted in hub.HubRevision.of(spec):
            async with self._downloading[wanted]:
                found = self._downloads.get(wanted)
                if found is None or not await asyncio.to_thread(Path(found.folder).is_dir):
                    made: HubFolder = await loop.run_in_executor(
                        self._threads, hub.download, wanted, progress
                    )
                    found = self._downloads[wanted] = made
                    if made.warning is not None:
                        log.warning("model=%s %s", spec.name, made.warning)
                        report(State.DOWNLOADING, made.warning)
            fetched[wanted.repo] = found
        return _with_folders(spec, fetched)

    async def _modules(self) -> _Modules:
        """Import the modules that import vLLM; the first call takes seconds."""
        async with self._importing:
            if self._imported is None:
                launcher = await asyncio.to_thread(
                    importlib.import_module, "llmserve.engine.launcher"
                )
                handlers = await asyncio.to_thread(
                    importlib.import_module, "llmserve.engine.handlers"
                )
                self._imported = _Modules(
                    handlers, launcher.Launcher(self._log_dir, zygote=self._zygote)
                )
                gc_policy.freeze()
                if self._killed:
                    self._imported.launcher.stop()
        return self._imported

    def kill(self) -> None:
        self._killed = True
        if self._zygote is not None:
            self._zygote.kill()
        if self._imported is not None:
            self._imported.launcher.stop()
