"""Starts real engines for the pool; imports vLLM only when the first one starts."""

from __future__ import annotations

import asyncio
import importlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from llmserve.child import log_file
from llmserve.errors import StartupError
from llmserve.pool import State

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from llmserve.config import ModelSpec
    from llmserve.pool import Running

_LOOK_S = 0.5  # how often a start's log is read for progress


class VllmBackend:
    def __init__(self, engines: int, log_dir: Path) -> None:
        self._log_dir = log_dir
        # A thread for each: an engine's constructor blocks until it is ready.
        self._threads = ThreadPoolExecutor(max_workers=max(1, engines), thread_name_prefix="start")
        self._launcher: Any = None
        self._importing = asyncio.Lock()
        self._killed = False

    async def start(self, spec: ModelSpec, report: Callable[[State, str], None]) -> Running:
        spec = await self._downloaded(spec, report)
        report(State.LOADING, "")
        engine_module, serving_module = await self._modules()
        log = log_file(self._log_dir, spec.name)
        loop = asyncio.get_running_loop()
        start = loop.run_in_executor(self._threads, self._launcher.start, spec)
        while not start.done():
            await asyncio.wait({start}, timeout=_LOOK_S)
            if await asyncio.to_thread(engine_module.phase_of, log) == "warming":
                report(State.WARMING, "")
        engine = await start
        try:
            serving: Running = await serving_module.Serving.build(spec, engine)
        except Exception as error:  # a template, adapter or parser that vLLM cannot use
            await asyncio.to_thread(engine.stop)
            raise StartupError(engine_module.cause_of(error, log)) from error
        return serving

    async def _downloaded(self, spec: ModelSpec, report: Callable[[State, str], None]) -> ModelSpec:
        if not spec.hub_names:
            return spec
        report(State.DOWNLOADING, "")
        loop = asyncio.get_running_loop()

        def progress(done: int, total: int) -> None:
            note = f"{done / 2**30:.2f} of {total / 2**30:.2f} GiB"
            loop.call_soon_threadsafe(report, State.DOWNLOADING, note)

        hub = await loop.run_in_executor(self._threads, importlib.import_module, "llmserve.hub")
        downloaded: ModelSpec = await loop.run_in_executor(
            self._threads, hub.download, spec, progress
        )
        return downloaded

    async def _modules(self) -> tuple[Any, Any]:
        """The importers of vLLM; the first import takes seconds."""
        async with self._importing:
            engine = await asyncio.to_thread(importlib.import_module, "llmserve.engine")
            serving = await asyncio.to_thread(importlib.import_module, "llmserve.serving")
            if self._launcher is None:
                self._launcher = engine.Launcher(self._log_dir)
                if self._killed:
                    self._launcher.stop()
        return engine, serving

    def kill(self) -> None:
        self._killed = True
        if self._launcher is not None:
            self._launcher.stop()
