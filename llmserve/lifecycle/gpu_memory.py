"""The memory budget of GPUs: the plan in force, and the order of starts, sleeps and wakes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil

from llmserve.errors import StartupError
from llmserve.gpus import nvml
from llmserve.gpus.claims import GpuClaims
from llmserve.gpus.device import gib, short_name
from llmserve.lifecycle.placement import Level, Place, Placement
from llmserve.lifecycle.timings import TIMINGS, LifecycleTimings
from llmserve.planning import survey
from llmserve.planning.measurements import Measured
from llmserve.planning.placement import capacity

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from contextlib import AbstractContextManager

    from llmserve.gpus.device import Gpu
    from llmserve.gpus.nvml import Holder
    from llmserve.gpus.page_exchange import PageBroker
    from llmserve.lifecycle.placement import Takes
    from llmserve.planning.plan import Plan, PlannedReplica
    from llmserve.registry.spec import Config, ModelSpec

log = logging.getLogger(__name__)
Keep = Callable[[Sequence[Mapping[str, Any]]], None]  # records what the workers report

_HOST_SHARE = 0.5  # of the host's memory, for weights of sleepers, by default


class GpuMemory:
    """Carries out a plan. No other class reads how full a GPU is."""

    def __init__(
        self,
        plan: Plan,
        kept: Measured | None = None,
        host_memory: int | None = None,
        handover: PageBroker | None = None,
        timings: LifecycleTimings = TIMINGS,
    ) -> None:
        self.apply_plan(plan, host_memory)
        self._kept = kept or Measured()
        self._handover = handover
        self._timings = timings
        self._locks = GpuClaims()
        self._seen: set[str] = set()  # fingerprints measured since the start
        self._fingerprints: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def apply_plan(self, plan: Plan, host_memory: int | None) -> None:
        """Use this plan from now on."""
        self.plan = plan
        share = int(psutil.virtual_memory().total * _HOST_SHARE)
        self._near = _kept_in_host_memory(plan, share if host_memory is None else host_memory)

    def planned(
        self, config: Config, kept: Mapping[str, Sequence[Placement]]
    ) -> Callable[[], None]:
        models = tuple(
            self._fixed(spec, kept[spec.name]) if spec.name in kept else spec
            for spec in config.models
        )
        fixed = config.model_copy(update={"models": models})
        plan = survey.plan(fixed, self.plan.box, self._kept).raise_if_infeasible(config)
        return partial(self.apply_plan, plan, config.server.host_memory)

    def _fixed(self, spec: ModelSpec, kept: Sequence[Placement]) -> ModelSpec:
        """The spec of running engines, with their placement and sizes as explicit values."""
        replicas = [_planned(placement) for placement in kept]
        explicit: dict[str, Any] = {
            "devices": tuple(index for replica in replicas for index in replica.devices),
            "tensor_parallel_size": replicas[0].tensor_parallel_size,
        }
        if replicas[0].known and replicas[0].kv:
            explicit |= {
                "kv_cache": min(replica.kv for replica in replicas),
                "memory": None,
                "gpu_memory_utilization": None,
            }
        return spec.model_copy(update=explicit)

    @property
    def capacity(self) -> Takes:
        """Bytes of each GPU that replicas may hold: at least the planned bytes."""
        return {
            Place(gpu.index): max(self.plan.peak(gpu.index), capacity(gpu, self.plan.headroom))
            for gpu in self.plan.box
        }

    def place(self, spec: ModelSpec, number: int) -> Placement:
        replica = self.plan.replica(spec.name, number)
        sizes = {Level.READY: replica.bytes}
        if replica.sleeps:
            asleep = Level.HOST if replica.name in self._near else Level.DISK
            sizes |= {Level.KV_RELEASED: replica.bytes - replica.kv, asleep: replica.asleep}
        places = [Place(index) for index in replica.devices]
        holds = {level: dict.fromkeys(places, size) for level, size in sizes.items()}
        return Placement(number, holds, replica)

    def expecting(self, placement: Placement) -> AbstractContextManager[None]:
        if self._handover is None:
            return contextlib.nullcontext()
        return self._handover.expecting(self._uuids(_planned(placement)))

    def _uuids(self, replica: PlannedReplica) -> list[str]:
        return [uuid for index in replica.devices if (uuid := self.plan.box[index].uuid)]

    @contextlib.asynccontextmanager
    async def moves(
        self, placement: Placement, wakes_from: Level | None = None
    ) -> AsyncIterator[None]:
        replica = _planned(placement)
        async with self._locks.hold(replica.devices, alone=False):
            if wakes_from is not None:
                held = placement.holds[wakes_from]
                needs = {
                    i: replica.bytes - held.get(Place(i), 0) - self._passing_bytes(i)
                    for i in replica.devices
                }
                await self._wait_for_memory(replica, needs)
            yield

    def _passing_bytes(self, index: int) -> int:
        """Bytes of a GPU that pass between engines, and so are not free."""
        uuid = self.plan.box[index].uuid
        return self._handover.bytes(uuid) if self._handover and uuid else 0

    def raise_if_taken(self) -> None:
        """Raises StartupError with the processes that hold memory of the plan."""
        needs = [(gpu, self.plan.used(gpu.index)) for gpu in self.plan.box]
        if short := _shortages("the plan", needs):
            raise StartupError("\n".join(short))

    async def _wait_for_memory(self, replica: PlannedReplica, wanted: Mapping[int, int]) -> None:
        """Wait for free memory: the driver frees that of a dead engine with a delay, without event.

        Raises StartupError if other processes hold it.
        """
        needs = [(self.plan.box[index], size) for index, size in wanted.items()]
        end = time.monotonic() + self._timings.release_s
        while short := await asyncio.to_thread(_shortages, replica.name, needs):
            if time.monotonic() >= end:
                raise StartupError("; ".join(short))
            await asyncio.sleep(self._timings.release_check_s)

    @contextlib.asynccontextmanager
    async def start(
        self, spec: ModelSpec, placement: Placement
    ) -> AsyncIterator[tuple[ModelSpec, Keep]]:
        """Wait for the replica's GPUs; return its spec with explicit sizes, and a recorder.

        A start that is measured excludes all others on its GPUs, so that the growth of the
        device's used memory is its own.
        """
        replica = _planned(placement)
        async with (
            self._measuring(replica) as alone,
            self._locks.hold(replica.devices, alone=alone),
        ):
            if self._handover is not None:
                self._handover.drop(self._uuids(replica))
            await self._wait_for_memory(replica, dict.fromkeys(replica.devices, replica.bytes))
            before = await asyncio.to_thread(self._used, replica)
            yield (
                self.plan.spec_of(spec, replica),
                lambda reports: self._keep(replica, before, reports) if alone else None,
            )

    @contextlib.asynccontextmanager
    async def _measuring(self, replica: PlannedReplica) -> AsyncIterator[bool]:
        """Whether this start is measured; others with the same fingerprint wait for it."""
        if not replica.measured:
            async with self._fingerprints[replica.fingerprint or replica.name]:
                if replica.fingerprint not in self._seen:
                    yield True
                    return
        yield False

    def _used(self, replica: PlannedReplica) -> list[int]:
        return [nvml.used_bytes(self.plan.box[index]) for index in replica.devices]

    def _keep(
        self, replica: PlannedReplica, before: Sequence[int], reports: Sequence[Mapping[str, Any]]
    ) -> None:
        if not replica.known:
            return
        grown = [now - then for now, then in zip(self._used(replica), before, strict=True)]
        # Of data parallel ranks, vLLM asks the first alone.
        overhead = max(
            overhead_bytes(each, report["bytes"], replica.weights + replica.kv)
            for each, report in zip(grown, reports, strict=False)
        )
        self._seen.add(replica.fingerprint)
        if any(
            each <= report["bytes"]["reserved"]
            for each, report in zip(grown, reports, strict=False)
        ):
            # A CUDA context takes memory, so another process freed some meanwhile.
            log.warning("model=%s was not measured: another process freed memory", replica.name)
            return
        log.info(
            "model=%s overhead planned=%s measured=%s grown=%s",
            replica.name,
            gib(replica.overhead),
            gib(overhead),
            ", ".join(gib(each) for each in grown),
        )
        about = {
            "replica": asdict(replica),
            "grown_bytes": grown,
            "workers": [dict(report["bytes"]) for report in reports],
        }
        self._kept.keep(replica.fingerprint, overhead, about)


def _planned(placement: Placement) -> PlannedReplica:
    assert placement.planned is not None  # noqa: S101  # `place` plans each
    return placement.planned


def _kept_in_host_memory(plan: Plan, host_memory: int) -> frozenset[str]:
    """The sleepers whose weights fit into host memory, in the order of the plan."""
    names: list[str] = []
    for replica in plan.replicas:
        if replica.sleeps and replica.host <= host_memory:
            host_memory -= replica.host
            names.append(replica.name)
    return frozenset(names)


def _shortages(name: str, needs: Iterable[tuple[Gpu, int]]) -> list[str]:
    """A line for each GPU that has too little free memory, with the processes that hold it."""
    lines: list[str] = []
    for gpu, needed in needs:
        free = gpu.memory - nvml.used_bytes(gpu) if needed else 0
        if needed > free:
            held = ", ".join(map(_described, nvml.holders(gpu)))
            lines.append(
                f"GPU {gpu.index} ({short_name(gpu.name)}): {name} needs {gib(needed)}, {gib(free)} "
                f"of {gib(gpu.memory)} are free; held by {held or 'processes unknown to the driver'}; "
                "end them, or reduce the memory of the models"
            )
    return lines


def _described(holder: Holder) -> str:
    size = "" if holder.bytes is None else f" {gib(holder.bytes)}"
    return f"pid {holder.pid} {holder.name}{size}"


def overhead_bytes(grown: int, worker: Mapping[str, int], planned: int) -> int:
    """The bytes that a worker needs on its device besides the planned weights and KV cache.

    `grown` is the growth of the device's used memory: what torch has reserved, and CUDA's
    context, modules and graphs beside it. A full step may need more than torch has reserved at
    the end of the start: the memory allocated then, and the activations.
    """
    beside = grown - worker["reserved"]
    at_most = max(worker["reserved"], worker["allocated"] + worker["activations"])
    return max(0, beside + at_most - planned)
