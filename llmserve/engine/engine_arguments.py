"""A model's registry entry as vLLM's engine arguments."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmserve.registry.spec import ModelSpec

_CPU_KV_CACHE_BYTES = 1 << 30  # per engine, if the registry sets none
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py, MaxLoRARanks
# By whether the platform is a CPU.
_WORKERS = {
    True: "llmserve.engine.worker.cpu_worker.CpuWorker",
    False: "llmserve.engine.worker.gpu_worker.GpuWorker",
}


def engine_arguments(spec: ModelSpec, *, sleeps: bool = False) -> AsyncEngineArgs:
    """Return the arguments of an engine for `spec`; `sleeps` as for `Launcher.start`."""
    arguments: dict[str, Any] = {
        "model": spec.model,
        "served_model_name": list(spec.names),
        **_placement(spec),
        **_loras(spec.loras),
    }
    if spec.kv_cache is not None:
        arguments["kv_cache_memory_bytes"] = int(spec.kv_cache)
    if spec.reasoning_parser is not None:
        arguments["reasoning_parser"] = spec.reasoning_parser
    if defaults := request_defaults(spec):
        arguments["override_generation_config"] = defaults
    arguments["worker_cls"] = worker_class()
    if sleeps and current_platform.is_cuda():
        arguments["enable_sleep_mode"] = True
    arguments |= _typed(spec.engine)
    if current_platform.is_cpu():
        arguments.setdefault("kv_cache_memory_bytes", _CPU_KV_CACHE_BYTES)
        # On a CPU torch.compile takes a minute and saves some 10 %.
        arguments.setdefault("enforce_eager", True)
    return AsyncEngineArgs(**arguments)


def worker_class() -> str:
    """Return the name of the worker's class, which is loaded in the engine's process."""
    return _WORKERS[current_platform.is_cpu()]


def request_defaults(spec: ModelSpec) -> dict[str, Any]:
    """Return the defaults of requests, with the keys of generation_config.json."""
    renamed = {"max_tokens": "max_new_tokens"}
    sampling = spec.sampling.model_dump(exclude_none=True)
    explicit: dict[str, Any] = spec.engine.get("override_generation_config") or {}
    return explicit or {renamed.get(key, key): value for key, value in sampling.items()}


def disable_logging(arguments: AsyncEngineArgs) -> None:
    """Keep vLLM's log out of this process's terminal; `worker.plugin` turns it on in engines."""
    logging_config = arguments.create_logging_config()
    if logging_config.pylogging_config_file is None:
        arguments.logging_config = dataclasses.replace(logging_config, configure_logging=False)


def _placement(spec: ModelSpec) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if math.prod(spec.parallel_sizes.values()) > 1:
        arguments |= spec.parallel_sizes
        arguments["distributed_executor_backend"] = "mp"  # vLLM would choose an installed Ray
    if spec.devices is not None and not current_platform.is_cpu():
        arguments["device_ids"] = list(spec.devices)
    if spec.gpu_memory_utilization is not None:
        arguments["gpu_memory_utilization"] = spec.gpu_memory_utilization
    return arguments


def _loras(loras: Mapping[str, str]) -> dict[str, Any]:
    if not loras:
        return {}
    arguments: dict[str, Any] = {"enable_lora": True, "max_loras": len(loras)}
    ranks = [rank for source in loras.values() if (rank := _rank_of(source)) is not None]
    if ranks:
        arguments["max_lora_rank"] = next((r for r in _LORA_RANKS if r >= max(ranks)), max(ranks))
    return arguments


def _rank_of(source: str) -> int | None:
    config = Path(source) / "adapter_config.json"
    return json.loads(config.read_text(encoding="utf-8")).get("r") if config.is_file() else None


def _typed(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Return engine arguments with mappings converted to vLLM's config classes."""
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
