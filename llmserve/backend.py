"""Starts real engines for the pool; imports vLLM only when the first one starts."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from llmserve import checkpoint, garbage
from llmserve.child import log_file
from llmserve.errors import LLMServeError, StartupError
from llmserve.replica import State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager, AbstractContextManager

    from llmserve.config import Config, Download, ModelSpec
    from llmserve.replica import Running
    from llmserve.residency import Level, Takes
    from llmserve.space import Keep

logger = logging.getLogger(__name__)
_STARTS = 64  # at the same time
_LOOK_S = 0.5  # how often a start's log is read for progress


class _Modules(NamedTuple):
    """What imports vLLM, and so is imported late."""

    engine: Any
    serving: Any
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


class _Owner:
    """Of an engine that has started and that nothing serves yet."""

    def __init__(self, modules: _Modules, log: Path) -> None:
        self._modules = modules
        self._log = log
        self._engine: Any = None

    def own(self, engine: Any) -> None:
        self._engine = engine

    @contextlib.asynccontextmanager
    async def ends(self) -> AsyncIterator[None]:
        """Whatever goes wrong meanwhile ends the engine: a failure, a cancelled start."""
        try:
            yield
        except BaseException as error:
            engine, self._engine = self._engine, None
            if engine is None:
                raise
            await asyncio.to_thread(engine.stop)
            if not isinstance(error, Exception):
                raise
            raise StartupError(self._modules.engine.cause_of(error, self._log)) from error


def _unless_flawed(spec: ModelSpec) -> None:
    """Raises StartupError for files that vLLM would fail on later, and without their name."""
    folder = Path(spec.model)
    if folder.is_dir() and spec.engine.get("load_format", "auto") in ("auto", "safetensors"):
        try:
            flaw = checkpoint.Folder(folder).flaw()
        except LLMServeError:
            return  # vLLM may make something of it
        if flaw is not None:
            raise StartupError(f"{spec.model}: {flaw}")


class Memory(Protocol):
    """What engines hold, and who starts when."""

    @property
    def capacity(self) -> Takes: ...
    def holds(self, spec: ModelSpec, number: int) -> Mapping[Level, Takes]: ...
    def sleeps(self, spec: ModelSpec, number: int) -> bool: ...
    def start(
        self, spec: ModelSpec, number: int
    ) -> AbstractAsyncContextManager[tuple[ModelSpec, Keep]]:
        """Its entry with all said, while it may start, and where its report goes."""
        ...

    def expecting(self, spec: ModelSpec, number: int) -> AbstractContextManager[None]: ...
    def moves(
        self, spec: ModelSpec, number: int, wakes_from: Level | None
    ) -> AbstractAsyncContextManager[None]: ...
    def planned(self, config: Config, kept: Mapping[str, str]) -> Callable[[], None]: ...


class VllmBackend:
    """Engines of vLLM's, in the memory that there is: `space.Space` or `hostspace.HostSpace`."""

    def __init__(self, log_dir: Path, memory: Memory) -> None:
        self._log_dir = log_dir
        self.memory = memory
        # A thread for each: an engine's constructor blocks until it is ready.
        self._threads = ThreadPoolExecutor(_STARTS, thread_name_prefix="start")
        self._imported: _Modules | None = None
        self._importing = asyncio.Lock()
        # Replicas wait for one download, and need no other when started again.
        self._folders: dict[Download, str] = {}
        self._downloading: defaultdict[Download, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._killed = False

    async def start(
        self, spec: ModelSpec, number: int, report: Callable[[State, str], None]
    ) -> Running:
        try:
            return await self._started(spec, number, report)
        except Exception:
            garbage.look_soon()
            raise

    async def _started(
        self, spec: ModelSpec, number: int, report: Callable[[State, str], None]
    ) -> Running:
        clock = _Clock()
        spec = await self._downloaded(spec, report)
        clock.lap("download")
        report(State.LOADING, "")
        await asyncio.to_thread(_unless_flawed, spec)
        modules = await self._modules()
        clock.lap("server_imports")
        owner = _Owner(modules, modules.launcher.log_of(spec, number))
        async with owner.ends():
            async with self.memory.start(spec, number) as (placed, keep), owner.ends():
                clock.lap("gpu_wait")
                engine = await self._engine(modules, placed, number, report)
                owner.own(engine)
                reports = await engine.start_reports()
                keep(reports)
                clock.lap("engine", [each["seconds"] for each in reports])
            serving: Running = await modules.serving.Serving.build(placed, engine)
        clock.lap("serving")
        serving.took = clock.took
        return serving

    @property
    def capacity(self) -> Takes:
        return self.memory.capacity

    def holds(self, spec: ModelSpec, number: int) -> Mapping[Level, Takes]:
        return self.memory.holds(spec, number)

    def expecting(self, spec: ModelSpec, number: int) -> AbstractContextManager[None]:
        return self.memory.expecting(spec, number)

    def moves(
        self, spec: ModelSpec, number: int, wakes_from: Level | None = None
    ) -> AbstractAsyncContextManager[None]:
        return self.memory.moves(spec, number, wakes_from)

    def planned(self, config: Config, kept: Mapping[str, str]) -> Callable[[], None]:
        return self.memory.planned(config, kept)

    def log_of(self, spec: ModelSpec, number: int) -> Path:
        return log_file(self._log_dir, spec.name, number if spec.replicas > 1 else None)

    async def _engine(
        self,
        modules: _Modules,
        spec: ModelSpec,
        number: int,
        report: Callable[[State, str], None],
    ) -> Any:
        log = modules.launcher.log_of(spec, number)
        loop = asyncio.get_running_loop()
        start = loop.run_in_executor(
            self._threads,
            partial(modules.launcher.start, spec, number, sleeps=self.memory.sleeps(spec, number)),
        )
        try:
            while not start.done():
                await asyncio.wait({start}, timeout=_LOOK_S)
                await self._report_phase(modules, log, report)
            return start.result()
        except BaseException:
            start.add_done_callback(self._unwanted)
            raise

    async def _report_phase(
        self, modules: _Modules, log: Path, report: Callable[[State, str], None]
    ) -> None:
        """A start does not fail because nothing can be said of it."""
        try:
            if await asyncio.to_thread(modules.engine.phase_of, log) == "warming":
                report(State.WARMING, "")
        except Exception:
            logger.exception("%s could not be read", log)

    def _unwanted(self, start: asyncio.Future[Any]) -> None:
        """A start cannot be interrupted: its engine may come when nothing waits for it."""
        if not start.cancelled() and start.exception() is None:
            asyncio.get_running_loop().run_in_executor(self._threads, start.result().stop)

    async def _downloaded(self, spec: ModelSpec, report: Callable[[State, str], None]) -> ModelSpec:
        if not spec.hub_names:
            return spec
        report(State.DOWNLOADING, "")
        loop = asyncio.get_running_loop()

        def progress(done: int, total: int) -> None:
            note = f"{done / 2**30:.2f} of {total / 2**30:.2f} GiB"
            loop.call_soon_threadsafe(report, State.DOWNLOADING, note)

        hub = await loop.run_in_executor(self._threads, importlib.import_module, "llmserve.hub")
        folders: dict[str, str] = {}
        for wanted in spec.downloads:
            async with self._downloading[wanted]:
                if wanted not in self._folders:
                    self._folders[wanted] = await loop.run_in_executor(
                        self._threads, hub.download, wanted, progress
                    )
            folders[wanted.repo] = self._folders[wanted]
        # vLLM finds the model in that cache, but looks for adapters in another.
        loras = {name: folders.get(source, source) for name, source in spec.loras.items()}
        return spec.model_copy(update={"loras": loras})

    async def _modules(self) -> _Modules:
        """The importers of vLLM; the first import takes seconds."""
        async with self._importing:
            if self._imported is None:
                engine = await asyncio.to_thread(importlib.import_module, "llmserve.engine")
                serving = await asyncio.to_thread(importlib.import_module, "llmserve.serving")
                self._imported = _Modules(engine, serving, engine.Launcher(self._log_dir))
                garbage.keep()
                if self._killed:
                    self._imported.launcher.stop()
        return self._imported

    def kill(self) -> None:
        self._killed = True
        if self._imported is not None:
            self._imported.launcher.stop()
