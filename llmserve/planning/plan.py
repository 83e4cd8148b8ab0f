"""The memory plan of a registry on a box: the GPUs and bytes of every replica."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmserve.errors import PlacementError

if TYPE_CHECKING:
    from llmserve.gpus.device import Box
    from llmserve.registry.spec import Config, ModelSpec

_LEAST_KV = 1 << 20  # bytes; vLLM reads 0 bytes of KV cache as "not set"


@dataclass(frozen=True)
class PlannedReplica:
    """One engine of the plan. Bytes are those on each of its GPUs."""

    model: str
    number: int  # of this model's replicas, from 0
    of: int  # replicas of this model
    devices: tuple[int, ...]  # indices of GPUs
    tensor_parallel_size: int
    pipeline_parallel_size: int
    weights: int
    overhead: int  # context, activations, CUDA graphs, communication buffers
    kv: int  # KV cache
    tokens: int  # that the KV cache holds, in all; 0: an encoder
    context: int  # max_model_len
    measured: bool  # False: `overhead` is an estimate
    approximate: bool = False  # `tokens` is a lower bound
    fingerprint: str = ""  # of what the overhead depends on
    known: bool = True  # False: only the share of the model is known
    on_demand: bool = False  # it is loaded later, or sleeps at first
    pinned: bool = False  # it never sleeps
    displaces: bool = False  # while it is awake, the others on its GPUs that can sleep do so
    sleeps: bool = False  # it may be put to sleep
    host: int = 0  # bytes of host memory for the weights of all its GPUs while it sleeps

    @property
    def name(self) -> str:
        return self.model if self.of == 1 else f"{self.model}/{self.number}"

    @property
    def bytes(self) -> int:
        return self.weights + self.overhead + self.kv

    @property
    def asleep(self) -> int:
        return self.overhead

    @property
    def resident(self) -> int:
        """Return the bytes at the start: asleep if it displaces others, else all."""
        return self.asleep if self.displaces else self.bytes

    @property
    def stays(self) -> bool:
        """Return whether it keeps its memory: it is pinned, or of unknown size."""
        return self.pinned or not self.known


@dataclass(frozen=True)
class Problem:
    """Why a model does not fit, and the cheapest change that makes it fit."""

    model: str
    message: str  # what it needs and what there is
    remedy: str | None = None  # "max_model_len: 8192"; None: no change was found
    key: str = ""  # of the model's entry that it is about

    def describe(self) -> str:
        return self.message + (f"; what would fit: {self.remedy}" if self.remedy else "")

    def within(self, config: Config) -> str:
        """Return the description with its line in the file."""
        return config.problem(
            ("models", self.model, *([self.key] if self.key else [])), self.describe()
        )


@dataclass(frozen=True)
class Plan:
    box: Box
    headroom: float  # share of each GPU that stays free
    replicas: tuple[PlannedReplica, ...]
    problems: tuple[Problem, ...] = ()

    def on(self, index: int) -> list[PlannedReplica]:
        """Return the replicas that use a GPU, in the order of the registry."""
        return [replica for replica in self.replicas if index in replica.devices]

    def used(self, index: int) -> int:
        """Return the bytes that are reserved at the start."""
        return sum(replica.resident for replica in self.on(index))

    def peak(self, index: int) -> int:
        """Return the largest use in bytes: at the start, or while one displaces others."""
        on = self.on(index)
        asleep = sum(replica.bytes if replica.stays else replica.asleep for replica in on)
        woken = max((one.bytes - one.asleep for one in on if one.displaces), default=0)
        return max(self.used(index), asleep + woken)

    def replica(self, model: str, number: int) -> PlannedReplica:
        return next(r for r in self.replicas if (r.model, r.number) == (model, number))

    def spec_of(self, spec: ModelSpec, replica: PlannedReplica) -> ModelSpec:
        """Return a replica's entry with explicit GPUs, parallelism and bytes of KV cache."""
        smallest = min(self.box[index].memory for index in replica.devices)
        explicit: dict[str, Any] = {
            "devices": replica.devices,
            "tensor_parallel_size": replica.tensor_parallel_size,
            "memory": None,
            # A lower bound: vLLM compares it with the free memory at its start.
            "gpu_memory_utilization": _floor((replica.weights + replica.kv) / smallest),
        }
        if replica.known:
            explicit["kv_cache"] = max(replica.kv, _LEAST_KV)
        else:
            explicit["gpu_memory_utilization"] = replica.bytes / smallest
        return spec.model_copy(update=explicit)

    def raise_if_infeasible(self, config: Config) -> Plan:
        """Raises PlacementError with all problems, each with its line in the file."""
        if self.problems:
            raise PlacementError([problem.within(config) for problem in self.problems])
        return self


def _floor(share: float) -> float:
    """Round down, so that vLLM does not request more than there is."""
    return max(0.001, math.floor(share * 1000) / 1000)
