"""The memory plan of a registry on a box: which GPUs each replica has, and what lies on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmserve.errors import PlacementError

if TYPE_CHECKING:
    from llmserve.config import Config, ModelSpec
    from llmserve.gpus import Box

_KEPT = 1 << 20  # bytes; vLLM takes 0 bytes of KV cache for "not said"


@dataclass(frozen=True)
class Replica:
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

    @property
    def name(self) -> str:
        return self.model if self.of == 1 else f"{self.model}/{self.number}"

    @property
    def bytes(self) -> int:
        return self.weights + self.overhead + self.kv


@dataclass(frozen=True)
class Problem:
    """Why a model does not fit, and the cheapest change that makes it fit."""

    model: str
    message: str  # what it needs and what there is
    remedy: str | None = None  # "max_model_len: 8192"; None: none was found
    key: str = ""  # of the model's entry that it is about

    def told(self) -> str:
        return self.message + (f"; what would fit: {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Plan:
    box: Box
    headroom: float  # share of each GPU that is left free
    replicas: tuple[Replica, ...]
    problems: tuple[Problem, ...] = ()

    def on(self, index: int) -> list[Replica]:
        """The replicas that use a GPU, in the order of the registry."""
        return [replica for replica in self.replicas if index in replica.devices]

    def used(self, index: int) -> int:
        return sum(replica.bytes for replica in self.on(index))

    def replica(self, model: str, number: int) -> Replica:
        return next(r for r in self.replicas if (r.model, r.number) == (model, number))

    def spec_of(self, spec: ModelSpec, number: int) -> ModelSpec:
        """A replica's entry with everything said: GPUs, parallelism, bytes of KV cache."""
        replica = self.replica(spec.name, number)
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

    def unless_infeasible(self, config: Config) -> Plan:
        """Raises PlacementError with all problems, each with its line in the file."""
        if self.problems:
            raise PlacementError(
                [
                    config.told(("models", p.model, *([p.key] if p.key else [])), p.told())
                    for p in self.problems
                ]
            )
        return self


def _floor(share: float) -> float:
    """Rounded down, so that vLLM does not ask for more than there is."""
    return max(0.001, math.floor(share * 1000) / 1000)
