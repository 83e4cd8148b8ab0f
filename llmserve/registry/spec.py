"""The keys of `models.yaml`: type, default and effect of a changed value beside each other."""

from __future__ import annotations

import math
import os
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    NonNegativeFloat,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from llmserve.errors import nearest
from llmserve.registry import yaml_positions
from llmserve.registry.engine_args import REASONING_PARSERS, TOOL_PARSERS

if TYPE_CHECKING:
    from collections.abc import Mapping


class Effect(IntEnum):
    """What a changed value disturbs; higher values disturb more."""

    LIVE = 0  # only llmserve's own state: the new value applies at once
    REBUILT = 1  # the engine continues with new request handlers
    RESIZED = 2  # the first engines continue, others start or stop
    RESTARTED = 3  # a new engine; for a key of `server`, a new process


_T = TypeVar("_T")
Live = Annotated[_T, Effect.LIVE]
Rebuilt = Annotated[_T, Effect.REBUILT]
Resized = Annotated[_T, Effect.RESIZED]
Restarted = Annotated[_T, Effect.RESTARTED]

Fraction = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(strict=True, gt=0)]  # strict: YAML's `true` is not 1
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Size = Annotated[ByteSize, Field(gt=0)]
Dispatch = Literal["lottery", "shortest_queue", "prefix_affinity"]
Start = Literal["eager", "lazy", "sleeping"]

DEFAULTS = "defaults"  # the validation context of `defaults`, which is not a whole model
_UNITS: Mapping[str, float] = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _seconds(value: object) -> object:
    """Seconds of a text such as `30`, `90s`, `10m`, `1.5h` or `2d`."""
    if not isinstance(value, str):
        return value
    number, unit = value.strip()[:-1], value.strip()[-1:]
    try:
        return float(number) * _UNITS[unit] if unit in _UNITS else float(value)
    except ValueError:
        raise ValueError(f"must be a time such as 30, 90s, 10m or 2d; got {value!r}") from None


Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0, allow_inf_nan=False, strict=True)]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ServerSpec(_Spec):
    host: Restarted[str] = "127.0.0.1"
    port: Restarted[Annotated[int, Field(strict=True, ge=0, le=65535)]] = 8000  # 0: any free port
    api_keys: Live[tuple[SecretStr, ...]] = ()  # every route but /health needs one of them
    admin_key: Live[SecretStr | None] = None  # for /admin; omitted: only from this machine
    allowed_origins: Restarted[tuple[str, ...]] = ()  # CORS; empty: no page of another origin
    allowed_methods: Restarted[tuple[str, ...]] = ("*",)
    allowed_headers: Restarted[tuple[str, ...]] = ("*",)
    allow_credentials: Restarted[bool] = False
    ssl_certfile: Restarted[Path | None] = None
    ssl_keyfile: Restarted[Path | None] = None
    # Seconds for running requests when the server stops.
    drain_timeout: Live[Annotated[float, Field(ge=0, allow_inf_nan=False)]] = 30
    max_body: Live[Size] = ByteSize(64 * 2**20)  # of a request
    # Share of each GPU that stays free. The size of every running engine depends on it.
    gpu_headroom: Restarted[Annotated[float, Field(ge=0, lt=1)]] = 0.08
    host_memory: Live[Size | None] = None  # for sleeping models; without GPUs, for all models
    log_dir: Restarted[Path] = Path("~/.local/state/llmserve")  # has a folder per port

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("TLS needs both ssl_certfile and ssl_keyfile")
        return self


class SamplingSpec(_Spec):
    """Defaults of requests; a request's own value takes precedence."""

    temperature: NonNegativeFloat | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None  # -1 and 0: all
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    max_tokens: Count | None = None


class IdleSpec(_Spec):
    """The idle times after which a model sleeps or stops."""

    sleep_after: Seconds | None = None
    stop_after: Seconds | None = None

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.sleep_after and self.stop_after and self.stop_after <= self.sleep_after:
            raise ValueError("stop_after must be greater than sleep_after")
        return self


class ModelSpec(_Spec):
    """One entry of `models:`, merged with `defaults:`."""

    name: str
    model: Restarted[str]  # folder or hub name
    aliases: Rebuilt[tuple[str, ...]] = ()
    hidden: Live[bool] = False  # served, but not in GET /v1/models
    required: Live[bool] = False  # if it cannot start, the server ends with exit code 3
    devices: Restarted[tuple[int | str, ...] | None] = None  # GPU ids or UUIDs; omitted: placed
    tensor_parallel_size: Restarted[Count | None] = None  # GPUs that share each layer
    pipeline_parallel_size: Restarted[Count] = 1  # GPUs that divide the layers among them
    gpu_memory_utilization: Restarted[Fraction | None] = None  # share of each GPU, in total
    memory: Restarted[Size | None] = None  # the same as an amount
    kv_cache: Restarted[Size | None] = None  # exact KV cache per GPU
    concurrency: Restarted[Count] = 1  # full-length requests that the KV cache must hold
    replicas: Resized[Annotated[int, Field(strict=True, gt=0, le=64)]] = 1
    dispatch: Live[Dispatch] = "shortest_queue"  # the choice of a replica for a request
    weights: Live[tuple[Weight, ...] | None] = None  # of the replicas in the lottery
    max_in_flight: Live[Count] = 1024  # requests in its engines, queued and running
    max_queue: Live[Annotated[int, Field(strict=True, ge=0)]] = 1024  # further requests
    timeout: Live[Seconds | None] = None  # of a request, in total
    start: Live[Start] = "eager"  # lazy: by the first request; sleeping: at once, then asleep
    pinned: Live[bool] = False  # never evicted or idle
    priority: Live[Annotated[int, Field(strict=True)]] = 0  # lower values are evicted first
    idle: Live[IdleSpec] = IdleSpec()
    chat_template: Rebuilt[str | None] = None  # Jinja: a file or the text itself
    chat_template_kwargs: Rebuilt[dict[str, Any]] = {}
    tool_call_parser: Rebuilt[str | None] = None  # also enables `tool_choice: auto`
    # The engine core reads it too: where a grammar begins (vllm/v1/structured_output).
    reasoning_parser: Restarted[str | None] = None
    sampling: Rebuilt[SamplingSpec] = SamplingSpec()
    loras: Restarted[dict[str, str]] = {}  # name: adapter; their number and rank shape the engine
    engine: Restarted[dict[str, Any]] = {}  # vLLM's engine arguments under their own names

    @field_validator("devices")
    @classmethod
    def _check_devices(cls, devices: tuple[int | str, ...] | None) -> tuple[int | str, ...] | None:
        if devices is not None:
            if not devices or "" in devices:
                raise ValueError("is empty; list GPU ids or UUIDs, or remove the key")
            # Text of digits is an id, such as the value of ${GPU}.
            devices = tuple(int(d) if str(d).isdigit() else d for d in devices)
            if len(set(devices)) < len(devices):
                raise ValueError("lists a GPU twice")
            if len({type(d) for d in devices}) > 1:
                raise ValueError("mixes ids and UUIDs; use one kind")
        return devices

    @field_validator("tool_call_parser", "reasoning_parser")
    @classmethod
    def _check_parser(cls, name: str | None, info: ValidationInfo) -> str | None:
        known = TOOL_PARSERS if info.field_name == "tool_call_parser" else REASONING_PARSERS
        if name is None or name in known:
            return name
        near = nearest(name, known)
        choice = f"nearest: {near}" if near else f"known: {', '.join(sorted(known))}"
        raise ValueError(f"unknown parser {name}; {choice}")

    @model_validator(mode="after")
    def _check_combinations(self, info: ValidationInfo) -> Self:
        if self.memory is not None and self.gpu_memory_utilization is not None:
            raise ValueError("has both memory and gpu_memory_utilization; remove one of them")
        if info.context == DEFAULTS:  # a model may have the other key
            return self
        if self.start != "eager" and not self.max_queue:
            raise ValueError(
                f"max_queue must be greater than 0 with `start: {self.start}`: "
                "the first request waits for the model"
            )
        if self.pinned and self.idle != IdleSpec():
            raise ValueError("has both pinned and idle; remove one of them")
        if self.pinned and self.start == "sleeping":
            raise ValueError("has both pinned and `start: sleeping`; remove one of them")
        self._check_device_count()
        self._check_weights()
        return self

    def _check_device_count(self) -> None:
        sizes = self.parallel_sizes | ({"replicas": self.replicas} if self.replicas > 1 else {})
        needed = math.prod(sizes.values())
        if self.devices is not None and len(self.devices) != needed:
            product = " x ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(f"lists {len(self.devices)} devices, but {product} needs {needed}")

    def _check_weights(self) -> None:
        if self.weights is None:
            return
        if self.dispatch != "lottery":
            raise ValueError(f"weights need `dispatch: lottery`; it is {self.dispatch}")
        if len(self.weights) != self.replicas:
            raise ValueError(
                f"{self.replicas} replicas need as many weights; got {len(self.weights)}"
            )

    @property
    def parallel_sizes(self) -> dict[str, int]:
        """The sizes whose product is the number of GPUs, from keys and engine arguments."""
        sizes = {
            "tensor_parallel_size": self.tensor_parallel_size or 1,
            "pipeline_parallel_size": self.pipeline_parallel_size,
        }
        names = (*sizes, "data_parallel_size")
        return sizes | {name: self.engine[name] for name in names if self.engine.get(name)}

    @property
    def hub_names(self) -> tuple[str, ...]:
        """The sources on the hub: model and adapters."""
        sources = (self.model, *self.loras.values())
        return tuple(source for source in sources if not Path(source).is_absolute())

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def public_names(self) -> tuple[str, ...]:
        """All names that lead to this model: its own, its aliases and its adapters'."""
        return (*self.names, *self.loras)


class Config(_Spec):
    """A registry without mistakes."""

    file: Path
    server: ServerSpec = ServerSpec()
    models: tuple[ModelSpec, ...]
    lines: dict[tuple[int | str, ...], int] = {}  # line of each path of the file

    def problem(self, path: yaml_positions.Path, message: str) -> str:
        """A line for a problem of the file, with file, line and key."""
        line = yaml_positions.line(self.lines, path)
        found = yaml_positions.Problem(line, yaml_positions.dotted(path), message)
        return found.within(shown(self.file))


def effects(spec: type[BaseModel]) -> dict[str, Effect]:
    """The effect of each key."""
    return {
        name: effect
        for name, field in spec.model_fields.items()
        for effect in field.metadata
        if isinstance(effect, Effect)
    }


def shown(file: Path) -> str:
    """The file as a terminal can open it: relative to the working directory, or its name."""
    here, there = Path.cwd(), Path(os.path.realpath(file))  # realpath accepts a loop of links
    return str(there.relative_to(here)) if there.is_relative_to(here) else file.name
