"""One vLLM engine: its arguments, start, sleep, end, figures, and why it did not start."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import re
import signal
import threading
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import TypeAdapter
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from llmserve.child import guard, instance_of, log_file
from llmserve.errors import EngineError, StartupError
from llmserve.outputs import Outputs
from llmserve.residency import Level
from llmserve.stats import Figures
from llmserve.stream import Flow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from multiprocessing.process import BaseProcess

    from prometheus_client import CollectorRegistry

    from llmserve.config import ModelSpec

_CPU_KV_CACHE_BYTES = 1 << 30  # per engine, where a registry says nothing
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py, MaxLoRARanks
# By whether the platform is a CPU; named, since the class lives in the engine's own process.
_WORKERS = {True: "llmserve.cpuworker.CpuWorker", False: "llmserve.worker.GpuWorker"}
_VLLM_LEVELS = {Level.HOST: 1, Level.DISK: 2}
_STOP_S = 5.0  # what an engine gets to end by itself
_LOOK_S = 0.1


class Engine:
    """A started `AsyncLLM`, the arguments it has, and its metrics."""

    def __init__(self, client: AsyncLLM, arguments: AsyncEngineArgs, figures: Figures) -> None:
        self.client = client
        self.arguments = arguments
        self.level = Level.READY
        self._figures = figures
        self.flow = Flow(figures.stream_lag())

    @property
    def registry(self) -> CollectorRegistry:
        """Its figures, up to now."""
        self._figures.enter()
        return self._figures.registry

    async def start_reports(self) -> list[dict[str, Any]]:
        """What the start took, by worker (`llmserve.worker`)."""
        reports: list[dict[str, Any]] = await self.client.collective_rpc("start_report")
        return reports

    async def responds(self, within_s: float) -> bool:
        """False if the engine core leaves a question unanswered; one that is dead has answered."""
        try:
            await asyncio.wait_for(self.client.engine_core.is_sleeping_async(), within_s)
        except TimeoutError:
            return False
        except EngineDeadError:
            pass
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
        with self._doing("prepare for sleep"):
            self._unless(Level.READY)
            await self.client.collective_rpc("prepare_sleep")
            # Another process has no event to wait for.
            while not all(await self.client.collective_rpc("sleep_prepared")):  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_S)

    async def sleep(self, level: Level) -> None:
        """Down to KV_RELEASED, HOST or DISK from any level above; nothing is running.

        Raises EngineError; what of the engine is in memory is then unknown.
        """
        with self._doing(f"sleep at level {level.name}"):
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
        with self._doing("wake"):
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

    @contextlib.contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        try:
            yield
        except EngineError:
            raise
        except Exception as error:
            cause = _one_line(type(error).__name__, str(error))
            raise EngineError(f"the engine could not {what}: {cause}") from error

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
        for process in self._processes:
            _kill_group(process)

    def stop(self) -> None:
        """End the engine and its processes. Blocks for some seconds."""
        self.client.shutdown(timeout=_STOP_S)


class Launcher:
    """Starts engines, several at once, each call in a thread of its own."""

    def __init__(self, log_dir: Path) -> None:
        guard()
        self._log_dir = log_dir
        # Building a config can change os.environ (vllm/config/vllm.py): one at a time.
        self._configuring = threading.Lock()
        self._starting = 0
        self._stopped = threading.Event()

    def start(
        self,
        spec: ModelSpec,
        number: int = 0,
        addresses: dict[str, str] | None = None,
        *,
        sleeps: bool = False,
    ) -> Engine:
        """Blocks until the engine is ready. Raises StartupError with the cause in one line.

        `number` is that of the model's replica. `addresses` lead to an engine core that
        runs already, as vLLM's own API server processes get them; without, one is started.
        `sleeps`: so that it can be put to sleep; on a CPU none can.
        """
        try:
            with self._reading_environment():
                return self._start(spec, number, addresses, sleeps=sleeps)
        except StartupError:
            raise
        except Exception as error:
            raise StartupError(cause_of(error, self.log_of(spec, number))) from error

    def log_of(self, spec: ModelSpec, number: int) -> Path:
        """Where the engine of a model's replica writes."""
        return log_file(self._log_dir, spec.name, number if spec.replicas > 1 else None)

    def _start(
        self, spec: ModelSpec, number: int, addresses: dict[str, str] | None, *, sleeps: bool
    ) -> Engine:
        figures = Figures(spec.name, number, spec.parallel_sizes.get("data_parallel_size", 1))
        _keep_one(self.log_of(spec, number))
        with self._configuring:
            self._unless_stopped()
            arguments = engine_arguments(spec, sleeps=sleeps)
            _log_in_engine_only(arguments)
            config = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
        if spec.replicas > 1:
            config.instance_id = instance_of(number, config.instance_id)
        self._unless_stopped()
        client = AsyncLLM.from_vllm_config(
            config, stat_loggers=[figures.logger_class], client_addresses=addresses
        )
        figures.take_over(client)
        Outputs.take_over(client)
        # Asked for at every request, and found anew by transformers each time.
        client.renderer.get_eos_token_id = _constant(client.renderer.get_eos_token_id())
        return Engine(client, arguments, figures)

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
        self._stopped.set()
        for process in multiprocessing.active_children():
            _kill_group(process)

    def _unless_stopped(self) -> None:
        if self._stopped.is_set():
            raise StartupError("the server is stopping")


def _kill_group(process: BaseProcess) -> None:
    process.kill()
    # llmserve.child made it a group; if it did not come so far, it has no workers.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(cast("int", process.pid), signal.SIGKILL)


def _keep_one(log: Path) -> None:
    """The log of the engine before, which may have died, gets a `.1` at its end."""
    with contextlib.suppress(FileNotFoundError):
        log.replace(log.with_name(log.name + ".1"))


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
    """Keep vLLM from taking this process's terminal; llmserve.child turns it on again."""
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


# "(EngineCore pid=7) ERROR 11-22 10:00:00 [core.py:1] ValueError: To serve ..."
_RAISED = re.compile(
    r"^(?:\([^)]*\)\s*)?(?:ERROR \S+ \S+ \[[^\]]*\]\s)?(?:[\w.]+\.)?"
    r"(?P<kind>[A-Z]\w*(?:Error|Exception|Interrupt|Exit))(?:: (?P<text>.+))?$"
)
_ECHOES = ("initialization failed", "See stack trace", "See root cause")


def cause_of(error: BaseException, log: Path) -> str:
    """Why an engine did not start, in one line.

    vLLM raises "see root cause above" here; the cause itself is in the engine's log.
    """
    if not _echoes(str(error)) or not log.is_file():
        return _one_line(type(error).__name__, str(error))
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    causes = [found for line in lines if (found := _RAISED.match(line)) and not _echoes(line)]
    if not causes:
        return f"the engine's process ended without a word; its log: {log}"
    return _one_line(causes[-1]["kind"], causes[-1]["text"] or "")


def _echoes(text: str) -> bool:
    """Whether it only says that something failed elsewhere."""
    return any(echo in text for echo in _ECHOES)


def _one_line(kind: str, text: str, limit: int = 300) -> str:
    text = " ".join(text.split())
    # pydantic's frame around what a validator of vLLM's said
    text = re.sub(r"^\d+ validation errors? for \w+ (Value error, )?", "", text)
    text = re.sub(r" \[type=\w+, input_value=.*$", "", text)
    shown = text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " ..."
    return f"{kind}: {shown}" if shown else kind


_PHASES = (
    ("warming", re.compile(r"Model loading took|GPU KV cache size|# CPU blocks|Warming up")),
    ("loading", re.compile(r"Starting to load model|Initializing a V1 LLM engine")),
)


def phase_of(log: Path) -> str | None:
    """How far a start has come, by the engine's log: loading, then warming."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not there yet, or just renamed
        return None
    return next((phase for phase, sign in _PHASES if sign.search(text)), None)
