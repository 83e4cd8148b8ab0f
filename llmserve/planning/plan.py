"""The memory plan of a registry on a box: which GPUs each replica has, and what lies on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmserve.errors import PlacementError

if TYPE_CHECKING:
    from llmserve.gpus.device import Box
    from llmserve.registry.spec import Config, ModelSpec

_KEPT = 1 << 20  # bytes; vLLM takes 0 bytes of KV cache for "not said"


@dataclass(frozen=True)
class PlannedReplica:
    """One engine of the plan. Bytes are those on each of its GPUs."""

    model: str
    number: int  # of this model's replicas, from 0
    of: int  # so many replicas
    devices: tuple[int, ...]  # indices of GPUs
    tensor_parallel_size: int
    pipeline_parallel_size: int
    weights: int
    overhead: int  # context, activations, CUDA graphs, communication buffers
    kv: int  # KV cache
    tokens: int  # that the KV cache holds, in all; 0: an encoder
    context: int  # max_model_len
    measured: bool  # overhead as an earlier start left it, else an estimate
    approximate: bool = False  # `tokens` is a lower bound
    fingerprint: str = ""  # of what the overhead depends on
    known: bool = True  # False: nothing is known of the model but its share
    on_demand: bool = False  # it is loaded later, or sleeps at first
    pinned: bool = False  # it never sleeps
    displaces: bool = False  # while it is awake, those on its GPUs that sleep do so
    sleeps: bool = False  # it may be put to sleep
    host: int = 0  # bytes of host memory that its weights take asleep, of all its GPUs

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
        """At the start: asleep if it displaces others, else whole, be it loaded or not."""
        return self.asleep if self.displaces else self.bytes

    @property
    def stays(self) -> bool:
        """Whether it keeps its memory: pinned, or nobody knows what it would hold asleep."""
        return self.pinned or not self.known


@dataclass(frozen=True)
class Problem:
    """Why a model does not fit, and the cheapest change that makes it fit."""

    model: str
    message: str  # what it needs and what there is
    remedy: str | None = None  # "max_model_len: 8192"; None: none was found
    key: str = ""  # of the model's entry that it is about

    def describe(self) -> str:
        return self.message + (f"; what would fit: {self.remedy}" if self.remedy else "")

    def within(self, config: Config) -> str:
        """With its line in the file."""
        return config.problem(
            ("models", self.model, *([self.key] if self.key else [])), self.describe()
        )


@dataclass(frozen=True)
class Plan:
    box: Box
    headroom: float  # share of each GPU that is left free
    replicas: tuple[PlannedReplica, ...]
    problems: tuple[Problem, ...] = ()

    def on(self, index: int) -> list[PlannedReplica]:
        """The replicas that use a GPU, in the order of the registry."""
        return [replica for replica in self.replicas if index in replica.devices]

    def used(self, index: int) -> int:
        """Bytes that are taken or promised at the start."""
        return sum(replica.resident for replica in self.on(index))

    def peak(self, index: int) -> int:
        """Bytes that are taken at most: at the start, or while one displaces others."""
        on = self.on(index)
        asleep = sum(replica.bytes if replica.stays else replica.asleep for replica in on)
        woken = max((one.bytes - one.asleep for one in on if one.displaces), default=0)
        return max(self.used(index), asleep + woken)

    def replica(self, model: str, number: int) -> PlannedReplica:
        return next(r for r in self.replicas if (r.model, r.number) == (model, number))

    def spec_of(self, spec: ModelSpec, replica: PlannedReplica) -> ModelSpec:
        """A replica's entry with everything said: GPUs, parallelism, bytes of KV cache."""
        smallest = min(self.box[index].memory for index in replica.devices)
        said: dict[str, Any] = {
            "devices": replica.devices,
            "tensor_parallel_size": replica.tensor_parallel_size,
            "memory": None,
            # Only a lower bound for vLLM, which looks at the free memory as it starts.
            "gpu_memory_utilization": _floor((replica.weights + replica.kv) / smallest),
        }
        if replica.known:
            said["kv_cache"] = max(replica.kv, _KEPT)
        else:
            said["gpu_memory_utilization"] = replica.bytes / smallest
        return spec.model_copy(update=said)

    def raise_if_infeasible(self, config: Config) -> Plan:
        """Raises PlacementError with all problems, each with its line in the file."""
        if self.problems:
            raise PlacementError([problem.within(config) for problem in self.problems])
        return self


def _floor(share: float) -> float:
    """Rounded down, so that vLLM does not ask for more than there is."""
    return max(0.001, math.floor(share * 1000) / 1000)
