"""Starts real engines for the pool; imports vLLM only when the first one starts."""

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

from llmserve.checkpoint import files as checkpoint
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
    from llmserve.lifecycle.gpu_memory import Keep
    from llmserve.lifecycle.placement import Placement
    from llmserve.lifecycle.replica import Running
    from llmserve.registry.spec import ModelSpec

log = logging.getLogger(__name__)

_STARTS = 64  # at the same time


class _Modules(NamedTuple):
    """What imports vLLM, and so is imported late."""

    handlers: Any
    launcher: Any


class _Clock:
    """The seconds of a start, step by step."""

    def __init__(self) -> None:
        self.took: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, step: str, inner: Sequence[Mapping[str, float]] = ()) -> None:
        """What has passed since the last one; `inner` are steps of it, of workers side by side."""
        now = time.monotonic()
        slowest = {name: max(each[name] for each in inner) for name in (inner[0] if inner else ())}
        self.took[step] = max(0.0, now - self._last - sum(slowest.values()))
        self.took |= slowest
        self._last = now


@dataclass(frozen=True)
class Patience:
    """How long a start may go on. Its download is not part of it."""

    look_s: float = 0.5  # between two looks at its log
    quiet_s: float = 600.0  # without a line of its log, and without work
    at_most_s: float = 7200.0


_STOP_S = 60.0  # what a killed engine gets to leave this process
_WORKS = 0.01  # of a core: pages of weights from a slow disk take that


class _Start:
    """A start in a thread of its own. What it has made ends with it, unless all goes well."""

    def __init__(self, modules: _Modules, threads: ThreadPoolExecutor, log: StartLog) -> None:
        self._launcher = modules.launcher
        self._threads = threads
        self._log = log
        self._tether = modules.launcher.tether()
        self._made: Future[Any] | None = None

    @contextlib.asynccontextmanager
    async def owned(self) -> AsyncIterator[None]:
        """Whatever goes wrong, a cancellation too, ends the engine that is made or being made."""
        try:
            yield
        except BaseException as error:
            self._tether.cut()
            made, self._made = self._made, None
            stopping = asyncio.wrap_future(self._threads.submit(self._stop, made))
            if not isinstance(error, Exception):
                raise  # the thread goes on
            await asyncio.wait({stopping}, timeout=_STOP_S)
            if isinstance(error, StartupError):
                raise
            raise StartupError(cause_of(error, self._log.path)) from error

    def _stop(self, made: Future[Any] | None) -> None:
        """End what of a killed engine is in this process, once its start has come to an end."""
        try:
            if made is not None and made.exception() is None:
                made.result().stop()
        except Exception:
            log.exception("%s: its engine did not stop cleanly", self._log.path)

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
        start = partial(self._launcher.start, spec, number, sleeps=sleeps, tether=self._tether)
        self._made = self._threads.submit(start)
        made = asyncio.wrap_future(self._made)
        made.add_done_callback(_retrieved)
        silence = HangDetector(
            time.monotonic(),
            lambda: cpu_s(self._tether.pids),
            quiet_s=patience.quiet_s,
            at_most_s=patience.at_most_s,
            share=_WORKS,
        )
        while not made.done():
            await asyncio.wait({made}, timeout=patience.look_s)
            hangs = await asyncio.to_thread(self._hangs, silence)
            if self._log.is_warming:
                report(State.WARMING, "")
            if hangs and not made.done():
                raise StartupError(
                    f"the engine did not start: nothing in its log and no work for "
                    f"{patience.quiet_s:g} s, or no end after {patience.at_most_s:g} s; "
                    f"it was killed; its log: {self._log.path}"
                )
        return await made

    def _hangs(self, silence: HangDetector) -> bool:
        return silence.is_hang(time.monotonic(), heard=self._log.grew())


def _retrieved(future: asyncio.Future[Any]) -> None:
    """Its exception is no surprise where a start is given up before."""
    if not future.cancelled():
        future.exception()


def _raise_if_flawed(spec: ModelSpec) -> None:
    """Raises StartupError for files that vLLM would fail on later, and without their name."""
    try:
        files = checkpoint.of(spec, hub=False)
        checkpoint.raise_if_flawed(spec, files)
        files.config()
    except ModelUnusable as error:
        raise StartupError(error.message) from error
    except ShapeUnknown:
        return  # vLLM may make something of it


def _with_folders(spec: ModelSpec, fetched: Mapping[str, HubFolder]) -> ModelSpec:
    """vLLM looks for adapters in another cache, and asks the hub again for a model by its name."""
    folders = {repo: each.folder for repo, each in fetched.items()}
    loras = {name: folders.get(source, source) for name, source in spec.loras.items()}
    own = fetched.get(spec.model)
    model = own.folder if own is not None and own.warning is not None else spec.model
    return spec.model_copy(update={"loras": loras, "model": model})


class Memory(MemoryBudget, Protocol):
    """A budget that starts wait for."""

    def start(
        self, spec: ModelSpec, placement: Placement
    ) -> AbstractAsyncContextManager[tuple[ModelSpec, Keep]]:
        """Its entry with all said, while it may start, and where its report goes."""
        ...


class VllmBackend:
    """Engines of vLLM's, in the memory that there is: `GpuMemory` or `HostMemory`."""

    def __init__(self, log_dir: Path, memory: Memory, patience: Patience | None = None) -> None:
        self._log_dir = log_dir
        self._patience = patience or Patience()
        self.memory = memory
        # A thread for each: an engine's constructor blocks until it is ready.
        self._threads = ThreadPoolExecutor(_STARTS, thread_name_prefix="start")
        self._imported: _Modules | None = None
        self._importing = asyncio.Lock()
        # Replicas wait for one download, and need no other when started again.
        self._there: dict[HubRevision, HubFolder] = {}
        self._downloading: defaultdict[HubRevision, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._killed = False

    async def start(
        self, spec: ModelSpec, placement: Placement, report: Callable[[State, str], None]
    ) -> Running:
        try:
            return await self._started(spec, placement, report)
        except Exception:
            gc_policy.look_soon()
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
                async with start.owned():  # its GPUs are given back once it has ended
                    engine = await start.engine(
                        placed, number, report, self._patience, sleeps=placement.sleeps
                    )
                    reports = await engine.start_reports()
                    keep(reports)
                clock.lap("engine", [each["seconds"] for each in reports])
            serving = await modules.handlers.ModelHandlers.build(placed, engine)
            serving.prepare_constraints()
        clock.lap("serving")
        serving.took = clock.took
        running: Running = serving
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
                there = self._there.get(wanted)
                if there is None or not await asyncio.to_thread(Path(there.folder).is_dir):
                    made: HubFolder = await loop.run_in_executor(
                        self._threads, hub.download, wanted, progress
                    )
                    there = self._there[wanted] = made
                    if made.warning is not None:
                        log.warning("model=%s %s", spec.name, made.warning)
                        report(State.DOWNLOADING, made.warning)
            fetched[wanted.repo] = there
        return _with_folders(spec, fetched)

    async def _modules(self) -> _Modules:
        """The importers of vLLM; the first import takes seconds."""
        async with self._importing:
            if self._imported is None:
                engine = await asyncio.to_thread(importlib.import_module, "llmserve.engine.engine")
                handlers = await asyncio.to_thread(
                    importlib.import_module, "llmserve.engine.handlers"
                )
                self._imported = _Modules(handlers, engine.Launcher(self._log_dir))
                gc_policy.keep()
                if self._killed:
                    self._imported.launcher.stop()
        return self._imported

    def kill(self) -> None:
        self._killed = True
        if self._imported is not None:
            self._imported.launcher.stop()
