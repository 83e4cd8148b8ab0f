"""One vLLM engine: its calls, each with a time limit, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from typing import TYPE_CHECKING, Any

from vllm.v1.engine.exceptions import EngineDeadError

from llmserve.api.token_stream import FlushScheduler
from llmserve.engine.hang_detection import HangDetector, cpu_s
from llmserve.engine.startup_log import one_line
from llmserve.errors import EngineError
from llmserve.lifecycle.placement import Level

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from prometheus_client import CollectorRegistry
    from vllm.engine.arg_utils import AsyncEngineArgs

    from llmserve.engine.metrics import EngineMetrics
    from llmserve.engine.parent_watch import ParentWatch
    from llmserve.engine.structured_output.checked_client import CheckedLLM

log = logging.getLogger(__name__)

_VLLM_LEVELS = {Level.HOST: 1, Level.DISK: 2}
_STOP_S = 5.0  # for vLLM's own shutdown
_POLL_S = 0.1
_WORKING_SHARE = 0.05  # of a core; engines that share few cores use little each


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Time limits of an engine's calls. An engine that exceeds one is killed."""

    answer_s: float = 300.0  # vLLM's limit of a step (VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)
    silence_s: float = 600.0  # without an answer, although it works
    stop_s: float = 60.0
    copied_per_s: float = 128 << 20  # bytes between host and device, including the pinning
    read_per_s: float = 32 << 20  # bytes from a disk that other processes use too

    def copy_s(self, size: int) -> float:
        return self.answer_s + size / self.copied_per_s

    def read_s(self, size: int) -> float:
        return self.answer_s + size / self.read_per_s


class Engine:
    """A started `CheckedLLM` with its arguments and metrics.

    Each call returns or raises within its `bounds`. `log` is the file of the engine's output.
    """

    def __init__(
        self,
        client: CheckedLLM,
        arguments: AsyncEngineArgs,
        metrics: EngineMetrics,
        watch: ParentWatch,
        log: Path,
    ) -> None:
        self.client = client
        self.arguments = arguments
        self.log = log
        self.bounds = Bounds()
        self.level = Level.READY
        self._metrics = metrics
        self._watch = watch
        self._weight_bytes = 0  # on all its GPUs, from `start_reports`
        self.flow = FlushScheduler(metrics.stream_lag())

    @property
    def registry(self) -> CollectorRegistry:
        """The registry of its metrics, up to date."""
        self._metrics.record_pending()
        return self._metrics.registry

    @property
    def dead(self) -> bool:
        return self._watch.is_killed or bool(self.client.errored)

    async def start_reports(self) -> list[dict[str, Any]]:
        """Return `GpuWorker.start_report` of each worker. Raises EngineError."""
        async with self._requested("report its start", self.bounds.answer_s):
            reports: list[dict[str, Any]] = await self.client.collective_rpc("start_report")
        self._weight_bytes = sum(each.get("bytes", {}).get("weights", 0) for each in reports)
        return reports

    async def responds(self, within_s: float) -> bool:
        """Return False if the engine core neither answers within this time nor works.

        A core answers between two steps. A dead engine counts as one that responds.
        """
        answer = asyncio.ensure_future(self.client.engine_core.is_sleeping_async())
        detector = HangDetector(
            time.monotonic(),
            lambda: cpu_s(self._watch.pids),
            quiet_s=within_s,
            at_most_s=self.bounds.silence_s,
            working_share=_WORKING_SHARE,
        )
        try:
            while not (await asyncio.wait({answer}, timeout=within_s / 4))[0]:
                if await asyncio.to_thread(detector.is_hang, time.monotonic()):
                    return False
            answer.result()
        except EngineDeadError:
            pass
        finally:
            answer.cancel()
        return True

    @property
    def sleeps(self) -> bool:
        """Whether the engine was started with sleep mode."""
        return bool(self.arguments.enable_sleep_mode)

    async def prepare_sleep(self) -> None:
        """Copy the weights to host memory while the engine serves: its first sleep is shorter.

        At DISK an engine has no copy. Raises EngineError if the host has too little memory.
        """
        async with self._requested("prepare for sleep", self.bounds.copy_s(self._weight_bytes)):
            self._require_level(Level.READY)
            await self.client.collective_rpc("prepare_sleep")
            # Another process has no event to wait for.
            while not all(await self.client.collective_rpc("sleep_prepared")):  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)

    async def sleep(self, level: Level) -> None:
        """Lower the engine, on which no request runs, to KV_RELEASED, HOST or DISK.

        Raises EngineError; the contents of the engine's memory are then unknown.
        """
        limit_s = self.bounds.copy_s(self._weight_bytes)
        async with self._requested(f"sleep at level {level.name}", limit_s):
            self._require_level(*(each for each in Level if each > level))
            if level is Level.KV_RELEASED:
                # Not `pause_generation`, which waits for a short time.
                await self.client.engine_core.pause_scheduler_async("abort", clear_cache=False)
                await self.client.release_kv_cache_memory()
            elif (self.level, level) == (Level.HOST, Level.DISK):
                await self.client.collective_rpc("forget_copies")
            else:
                await self.client.sleep(_VLLM_LEVELS[level])
        self.level = level

    async def wake(self) -> None:
        """Raise the engine to READY.

        Raises EngineError; the contents of the engine's memory are then unknown.
        """
        limit_s = self.bounds.read_s if self.level is Level.DISK else self.bounds.copy_s
        async with self._requested("wake", limit_s(self._weight_bytes)):
            if self.level is Level.DISK:
                # Reading needs memory of its own, which is free only before the KV cache is back.
                await self.client.wake_up(["weights"])
            if self.level is not Level.READY:
                await self.client.wake_up()
        self.level = Level.READY

    def _require_level(self, *levels: Level) -> None:
        if not self.sleeps:
            raise EngineError(
                "the engine cannot sleep: it was started without sleep mode, or runs on a CPU"
            )
        if self.level not in levels:
            names = " or ".join(level.name for level in levels)
            raise EngineError(f"the engine is at level {self.level.name}; this needs {names}")

    @contextlib.asynccontextmanager
    async def _requested(self, action: str, limit_s: float) -> AsyncIterator[None]:
        """As `limited`, and every failure of `action` becomes an EngineError."""
        try:
            async with self.limited(action, limit_s):
                yield
        except EngineError:
            raise
        except Exception as error:
            cause = one_line(type(error).__name__, str(error))
            raise EngineError(f"the engine could not {action}: {cause}") from error

    @contextlib.asynccontextmanager
    async def limited(self, action: str, limit_s: float | None = None) -> AsyncIterator[None]:
        """Kill the engine and raise EngineError if `action` exceeds its time limit."""
        limit_s = self.bounds.answer_s if limit_s is None else limit_s
        try:
            async with asyncio.timeout(limit_s) as limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            self.kill()
            raise EngineError(
                f"the engine did not {action} within {limit_s:g} s and was killed; "
                f"its log: {self.log}"
            ) from None

    @property
    def defaults(self) -> dict[str, Any]:
        """The sampling defaults that vLLM's handlers read when they are created."""
        defaults: dict[str, Any] = self.client.model_config.override_generation_config
        return defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        of_vllm = {name: value for name, value in self.defaults.items() if value is None}
        self.client.model_config.override_generation_config = of_vllm | defaults

    @property
    def pid(self) -> int | None:
        """The process id of its engine core; None if this process did not start it."""
        manager = self.client.engine_core.resources.engine_manager
        return manager.processes[0].pid if manager is not None and manager.processes else None

    def kill(self) -> None:
        """End the engine's processes at once; vLLM notices."""
        self._watch.kill()

    async def end(self) -> None:
        """Stop the engine and its processes, within a bound."""
        stopping = asyncio.ensure_future(asyncio.to_thread(self.stop))
        try:
            await asyncio.wait_for(asyncio.shield(stopping), self.bounds.stop_s)
        except TimeoutError:
            log.error("%s: the engine did not stop within %g s", self.log, self.bounds.stop_s)  # noqa: TRY400
        finally:
            self.kill()

    def stop(self) -> None:
        """Stop the engine and its processes. Blocks for some seconds."""
        try:
            self.client.shutdown(timeout=_STOP_S)
        finally:
            self.kill()
