"""One vLLM engine: its arguments, start, sleep, end and figures."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import threading
import time
import typing
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.exceptions import EngineDeadError

from llmserve.api.token_stream import FlushScheduler
from llmserve.engine.fastpath.output_processor import StreamingOutputProcessor
from llmserve.engine.hang_detection import HangDetector, cpu_s
from llmserve.engine.metrics import EngineMetrics
from llmserve.engine.parent_watch import ParentWatch
from llmserve.engine.startup_log import cause_of, one_line
from llmserve.engine.structured_output.checked_client import CheckedLLM
from llmserve.engine.structured_output.compiler import ConstraintCompiler
from llmserve.engine.worker.plugin import instance_of, log_file
from llmserve.errors import EngineError, StartupError
from llmserve.lifecycle.placement import Level

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
    from multiprocessing.process import BaseProcess

    from prometheus_client import CollectorRegistry

    from llmserve.registry.spec import ModelSpec

log = logging.getLogger(__name__)

_CPU_KV_CACHE_BYTES = 1 << 30  # per engine, where a registry says nothing
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py, MaxLoRARanks
# By whether the platform is a CPU; named, since the class lives in the engine's own process.
_WORKERS = {
    True: "llmserve.engine.worker.cpu_worker.CpuWorker",
    False: "llmserve.engine.worker.gpu_worker.GpuWorker",
}
_VLLM_LEVELS = {Level.HOST: 1, Level.DISK: 2}
_STOP_S = 5.0  # what an engine gets to end by itself
_LOOK_S = 0.1
_WORKS = 0.05  # of a core; engines that share few cores take little each


@dataclasses.dataclass(frozen=True)
class Bounds:
    """How long an engine may take for what it is asked; after that it is killed."""

    answer_s: float = 300.0  # what vLLM gives a step (VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)
    silence_s: float = 600.0  # without an answer, although it works
    stop_s: float = 60.0
    copied_per_s: float = 128 << 20  # bytes between host and device, pinned meanwhile
    read_per_s: float = 32 << 20  # bytes from a disk that others use

    def copy_s(self, size: int) -> float:
        return self.answer_s + size / self.copied_per_s

    def read_s(self, size: int) -> float:
        return self.answer_s + size / self.read_per_s


class Engine:
    """A started `CheckedLLM`, the arguments it has, and its metrics.

    Whatever is asked of it returns or raises within its `bounds`. `log` is where it writes.
    """

    def __init__(
        self,
        client: CheckedLLM,
        arguments: AsyncEngineArgs,
        figures: EngineMetrics,
        tether: ParentWatch,
        log: Path,
    ) -> None:
        self.client = client
        self.arguments = arguments
        self.log = log
        self.bounds = Bounds()
        self.level = Level.READY
        self._figures = figures
        self._tether = tether
        self._weights = 0  # bytes on all its GPUs, as it has reported
        self.flow = FlushScheduler(figures.stream_lag())

    @property
    def registry(self) -> CollectorRegistry:
        """Its figures, up to now."""
        self._figures.enter()
        return self._figures.registry

    @property
    def dead(self) -> bool:
        return self._tether.is_cut or bool(self.client.errored)

    async def start_reports(self) -> list[dict[str, Any]]:
        """What the start took, by worker (`llmserve.engine.worker.gpu_worker`). Raises EngineError."""
        async with self._doing("report its start", self.bounds.answer_s):
            reports: list[dict[str, Any]] = await self.client.collective_rpc("start_report")
        self._weights = sum(each.get("bytes", {}).get("weights", 0) for each in reports)
        return reports

    async def responds(self, within_s: float) -> bool:
        """False if its core leaves a question unanswered for so long, and does not work either.

        A core answers between two steps. One that is dead has answered.
        """
        asked = asyncio.ensure_future(self.client.engine_core.is_sleeping_async())
        silence = HangDetector(
            time.monotonic(),
            lambda: cpu_s(self._tether.pids),
            quiet_s=within_s,
            at_most_s=self.bounds.silence_s,
            share=_WORKS,
        )
        try:
            while not (await asyncio.wait({asked}, timeout=within_s / 4))[0]:
                if await asyncio.to_thread(silence.is_hang, time.monotonic()):
                    return False
            asked.result()
        except EngineDeadError:
            pass
        finally:
            asked.cancel()
        return True

    @property
    def sleeps(self) -> bool:
        """Whether it was started so that it can."""
        return bool(self.arguments.enable_sleep_mode)

    async def prepare_sleep(self) -> None:
        """Copy the weights to the host, which then keeps them, while the engine serves.

        Only a shorter first sleep depends on it. An engine that was at DISK has no copy any
        more. Raises EngineError if the host has no room.
        """
        async with self._doing("prepare for sleep", self.bounds.copy_s(self._weights)):
            self._unless(Level.READY)
            await self.client.collective_rpc("prepare_sleep")
            # Another process has no event to wait for.
            while not all(await self.client.collective_rpc("sleep_prepared")):  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_S)

    async def sleep(self, level: Level) -> None:
        """Down to KV_RELEASED, HOST or DISK from any level above; nothing is running.

        Raises EngineError; what of the engine is in memory is then unknown.
        """
        async with self._doing(f"sleep at level {level.name}", self.bounds.copy_s(self._weights)):
            self._unless(*(each for each in Level if each > level))
            if level is Level.KV_RELEASED:
                # Not `pause_generation`, which waits for a little while.
                await self.client.engine_core.pause_scheduler_async("abort", clear_cache=False)
                await self.client.release_kv_cache_memory()
            elif (self.level, level) == (Level.HOST, Level.DISK):
                await self.client.collective_rpc("forget_copies")
            else:
                await self.client.sleep(_VLLM_LEVELS[level])
        self.level = level

    async def wake(self) -> None:
        """Up to READY. Raises EngineError; what of the engine is in memory is then unknown."""
        takes_s = self.bounds.read_s if self.level is Level.DISK else self.bounds.copy_s
        async with self._doing("wake", takes_s(self._weights)):
            if self.level is Level.DISK:
                # Reading takes memory of its own, which must come before the KV cache's.
                await self.client.wake_up(["weights"])
            if self.level is not Level.READY:
                await self.client.wake_up()
        self.level = Level.READY

    def _unless(self, *levels: Level) -> None:
        if not self.sleeps:
            raise EngineError(
                "the engine cannot sleep: it was not started with `sleeps`, or runs on a CPU"
            )
        if self.level not in levels:
            names = ", ".join(level.name for level in levels)
            raise EngineError(
                f"the engine is at {self.level.name}, and would have to be at {names}"
            )

    @contextlib.asynccontextmanager
    async def _doing(self, what: str, bound_s: float) -> AsyncIterator[None]:
        """As `within`; raises EngineError for all that fails."""
        try:
            async with self.within(what, bound_s):
                yield
        except EngineError:
            raise
        except Exception as error:
            cause = one_line(type(error).__name__, str(error))
            raise EngineError(f"the engine could not {what}: {cause}") from error

    @contextlib.asynccontextmanager
    async def within(self, what: str, bound_s: float | None = None) -> AsyncIterator[None]:
        """A bound for what it is asked; after that it is killed. Raises EngineError then."""
        bound_s = self.bounds.answer_s if bound_s is None else bound_s
        try:
            async with asyncio.timeout(bound_s) as bound:
                yield
        except TimeoutError:
            if not bound.expired():
                raise
            self.kill()
            raise EngineError(
                f"the engine did not {what} within {bound_s:g} s and was killed; "
                f"its log: {self.log}"
            ) from None

    @property
    def defaults(self) -> dict[str, Any]:
        """What vLLM's handlers take for a request that does not say, when they are built."""
        own: dict[str, Any] = self.client.model_config.override_generation_config
        return own

    @defaults.setter
    def defaults(self, said: dict[str, Any]) -> None:
        of_vllm = {name: value for name, value in self.defaults.items() if value is None}
        self.client.model_config.override_generation_config = of_vllm | said

    @property
    def pid(self) -> int | None:
        """Of its engine core; None if that was not started here."""
        return next((process.pid for process in self._processes), None)

    @property
    def _processes(self) -> Sequence[BaseProcess]:
        manager = self.client.engine_core.resources.engine_manager
        return () if manager is None else manager.processes

    def kill(self) -> None:
        """End the engine's processes at once; vLLM notices."""
        self._tether.cut()

    async def end(self) -> None:
        """End the engine and its processes, within a bound."""
        stopping = asyncio.ensure_future(asyncio.to_thread(self.stop))
        try:
            await asyncio.wait_for(asyncio.shield(stopping), self.bounds.stop_s)
        except TimeoutError:
            log.error("%s: the engine did not stop within %g s", self.log, self.bounds.stop_s)  # noqa: TRY400
        finally:
            self.kill()

    def stop(self) -> None:
        """End the engine and its processes. Blocks for some seconds."""
        try:
            self.client.shutdown(timeout=_STOP_S)
        finally:
            self.kill()


class Launcher:
    """Starts engines, several at once, each call in a thread of its own."""

    def __init__(self, log_dir: Path, bounds: Bounds | None = None) -> None:
        self._log_dir = log_dir
        self.grammars = ConstraintCompiler()
        self._bounds = bounds or Bounds()
        # Building a config can change os.environ (vllm/config/vllm.py): one at a time.
        self._configuring = threading.Lock()
        self._starting = 0
        self._tethering = threading.Lock()
        self._tethers: weakref.WeakSet[ParentWatch] = weakref.WeakSet()
        self._stopped = False

    def tether(self) -> ParentWatch:
        """Of an engine to be started. Raises StartupError if the server is stopping."""
        with self._tethering:
            if self._stopped:
                raise StartupError("the server is stopping")
            tether = ParentWatch()
            self._tethers.add(tether)
            return tether

    def start(
        self,
        spec: ModelSpec,
        number: int = 0,
        addresses: dict[str, str] | None = None,
        *,
        sleeps: bool = False,
        tether: ParentWatch | None = None,
    ) -> Engine:
        """Blocks until the engine is ready. Raises StartupError with the cause in one line.

        `number` is that of the model's replica. `addresses` lead to an engine core that
        runs already, as vLLM's own API server processes get them; without, one is started.
        `sleeps`: so that it can be put to sleep; on a CPU none can. A start whose `tether` is
        cut ends at once.
        """
        tether = tether or self.tether()
        try:
            with self._reading_environment():
                return self._start(spec, number, addresses, tether, sleeps=sleeps)
        except BaseException as error:
            tether.cut()
            if isinstance(error, StartupError) or not isinstance(error, Exception):
                raise
            raise StartupError(cause_of(error, self.log_of(spec, number))) from error

    def log_of(self, spec: ModelSpec, number: int) -> Path:
        """Where the engine of a model's replica writes."""
        return log_file(self._log_dir, spec.name, number if spec.replicas > 1 else None)

    def _start(
        self,
        spec: ModelSpec,
        number: int,
        addresses: dict[str, str] | None,
        tether: ParentWatch,
        *,
        sleeps: bool,
    ) -> Engine:
        figures = EngineMetrics(spec.name, number, spec.parallel_sizes.get("data_parallel_size", 1))
        with self._configuring:
            self._raise_if_cut(tether)
            arguments = engine_arguments(spec, sleeps=sleeps)
            _log_in_engine_only(arguments)
            config = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
        if spec.replicas > 1:
            config.instance_id = instance_of(number, config.instance_id)
        self._raise_if_cut(tether)
        with tether.tying():
            client = CheckedLLM.from_vllm_config(
                config, stat_loggers=[figures.logger_class], client_addresses=addresses
            )
        client.check_with(self.grammars)
        figures.take_over(client)
        StreamingOutputProcessor.take_over(client)
        # Asked for at every request, and found anew by transformers each time.
        client.renderer.get_eos_token_id = _constant(client.renderer.get_eos_token_id())
        engine = Engine(client, arguments, figures, tether, self.log_of(spec, number))
        engine.bounds = self._bounds
        return engine

    @contextlib.contextmanager
    def _reading_environment(self) -> Iterator[None]:
        """vLLM reads os.environ for settings, some at every token, unless it keeps them.

        It keeps them while no engine starts: a start can change them.
        """
        with self._configuring:
            self._starting += 1
            envs.disable_envs_cache()
        try:
            yield
        finally:
            with self._configuring:
                self._starting -= 1
                if not self._starting:
                    envs.enable_envs_cache()

    def stop(self) -> None:
        """Let no start begin, and end the processes of those under way and of all engines."""
        self.grammars.stop()
        with self._tethering:
            self._stopped = True
            tethers = list(self._tethers)
        for tether in tethers:
            tether.cut()

    def _raise_if_cut(self, tether: ParentWatch) -> None:
        if tether.is_cut:
            raise StartupError("the server is stopping" if self._stopped else "the start was ended")


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def engine_arguments(spec: ModelSpec, *, sleeps: bool = False) -> AsyncEngineArgs:
    """The registry's entry in vLLM's terms; `sleeps` as at a launcher's start."""
    said: dict[str, Any] = {
        "model": spec.model,
        "served_model_name": list(spec.names),
        **_placement(spec),
        **_loras(spec.loras),
    }
    if spec.kv_cache is not None:
        said["kv_cache_memory_bytes"] = int(spec.kv_cache)
    if spec.reasoning_parser is not None:
        said["reasoning_parser"] = spec.reasoning_parser
    if defaults := request_defaults(spec):
        said["override_generation_config"] = defaults
    said["worker_cls"] = _WORKERS[current_platform.is_cpu()]
    if sleeps and current_platform.is_cuda():
        said["enable_sleep_mode"] = True
    said |= _typed(spec.engine)
    if current_platform.is_cpu():
        said.setdefault("kv_cache_memory_bytes", _CPU_KV_CACHE_BYTES)
        # torch.compile takes a minute there and gives some 10 %.
        said.setdefault("enforce_eager", True)
    return AsyncEngineArgs(**said)


def request_defaults(spec: ModelSpec) -> dict[str, Any]:
    """What a request that does not say gets, as in generation_config.json."""
    renamed = {"max_tokens": "max_new_tokens"}
    said = spec.sampling.model_dump(exclude_none=True)
    own: dict[str, Any] = spec.engine.get("override_generation_config") or {}
    return own or {renamed.get(key, key): value for key, value in said.items()}


def _log_in_engine_only(arguments: AsyncEngineArgs) -> None:
    """Keep vLLM from taking this process's terminal; llmserve.engine.worker.plugin turns it on again."""
    logging_config = arguments.create_logging_config()
    if logging_config.pylogging_config_file is None:
        arguments.logging_config = dataclasses.replace(logging_config, configure_logging=False)


def _placement(spec: ModelSpec) -> dict[str, Any]:
    said: dict[str, Any] = {}
    if math.prod(spec.parallel_sizes.values()) > 1:
        said |= spec.parallel_sizes
        said["distributed_executor_backend"] = "mp"  # an installed Ray is not picked up
    if spec.devices is not None and not current_platform.is_cpu():
        said["device_ids"] = list(spec.devices)
    if spec.gpu_memory_utilization is not None:
        said["gpu_memory_utilization"] = spec.gpu_memory_utilization
    return said


def _loras(loras: Mapping[str, str]) -> dict[str, Any]:
    if not loras:
        return {}
    said: dict[str, Any] = {"enable_lora": True, "max_loras": len(loras)}
    ranks = [rank for source in loras.values() if (rank := _rank_of(source)) is not None]
    if ranks:
        said["max_lora_rank"] = next((r for r in _LORA_RANKS if r >= max(ranks)), max(ranks))
    return said


def _rank_of(source: str) -> int | None:
    config = Path(source) / "adapter_config.json"
    return json.loads(config.read_text(encoding="utf-8")).get("r") if config.is_file() else None


def _typed(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Engine arguments as given, mappings turned into vLLM's config classes."""
    types: dict[str, Any] = {
        field.name: field.type for field in dataclasses.fields(AsyncEngineArgs)
    }
    return {
        name: TypeAdapter(types[name]).validate_python(value)
        if isinstance(value, dict) and _holds_dataclass(types[name])
        else value
        for name, value in engine.items()
    }


def _holds_dataclass(hint: Any) -> bool:
    return any(dataclasses.is_dataclass(part) for part in (hint, *typing.get_args(hint)))
