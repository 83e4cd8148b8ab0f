"""The GPUs of a running server: what the plan gives each engine, and who starts when.

The one place that reads how full a GPU is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llmserve import nvml
from llmserve.errors import StartupError
from llmserve.gpulocks import GpuLocks
from llmserve.gpus import gib, short_name
from llmserve.measured import Measured

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from llmserve.config import ModelSpec
    from llmserve.gpus import Gpu
    from llmserve.nvml import Holder
    from llmserve.plan import Plan, Replica

log = logging.getLogger(__name__)
Keep = Callable[[Sequence[Mapping[str, Any]]], None]  # takes what the workers report

_RELEASE_S = 15.0  # what a dead engine's memory gets to come back
_LOOK_S = 0.2


class Space:
    """What the plan says, carried out."""

    def __init__(self, plan: Plan, kept: Measured | None = None) -> None:
        self.plan = plan
        self._kept = kept or Measured()
        self._locks = GpuLocks()
        self._seen: set[str] = set()  # fingerprints measured since the start
        self._kinds: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def unless_taken(self) -> None:
        """Raises StartupError if others hold memory that the plan needs, with their names."""
        needs = [(gpu, self.plan.used(gpu.index)) for gpu in self.plan.box]
        if short := _short("the plan", needs):
            raise StartupError("\n".join(short))

    async def _room(self, replica: Replica) -> None:
        """Wait for what a dead engine held, which the driver gives back some moments later.

        Raises StartupError if others hold it.
        """
        needs = [(self.plan.box[index], replica.bytes) for index in replica.devices]
        end = time.monotonic() + _RELEASE_S
        while short := await asyncio.to_thread(_short, replica.name, needs):
            if time.monotonic() >= end:
                raise StartupError("; ".join(short))
            await asyncio.sleep(_LOOK_S)

    @contextlib.asynccontextmanager
    async def start(self, spec: ModelSpec, number: int) -> AsyncIterator[tuple[ModelSpec, Keep]]:
        """Wait for the replica's GPUs; its entry with all said, and where its report goes.

        A replica whose overhead nobody has measured has its GPUs for itself, so that the
        difference of the device's memory is its own.
        """
        replica = self.plan.replica(spec.name, number)
        async with (
            self._measuring(replica) as alone,
            self._locks.hold(replica.devices, alone=alone),
        ):
            await self._room(replica)
            before = await asyncio.to_thread(self._used, replica)
            yield (
                self.plan.spec_of(spec, number),
                lambda reports: self._keep(replica, before, reports) if alone else None,
            )

    @contextlib.asynccontextmanager
    async def _measuring(self, replica: Replica) -> AsyncIterator[bool]:
        """Whether this start is measured: one of a kind is, and the others wait for it."""
        if not replica.measured:
            async with self._kinds[replica.fingerprint or replica.name]:
                if replica.fingerprint not in self._seen:
                    yield True
                    return
        yield False

    def _used(self, replica: Replica) -> list[int]:
        return [nvml.used_bytes(self.plan.box[index]) for index in replica.devices]

    def _keep(
        self, replica: Replica, before: Sequence[int], reports: Sequence[Mapping[str, Any]]
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
            # A CUDA context is never free: somebody else's memory came back meanwhile.
            log.warning("model=%s could not be measured: memory came back", replica.name)
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


def _short(who: str, needs: Iterable[tuple[Gpu, int]]) -> list[str]:
    """A line for each GPU that has too little free memory, with who holds it."""
    lines: list[str] = []
    for gpu, needed in needs:
        free = gpu.memory - nvml.used_bytes(gpu) if needed else 0
        if needed > free:
            held = ", ".join(map(_told, nvml.holders(gpu)))
            lines.append(
                f"GPU {gpu.index} ({short_name(gpu.name)}): {who} needs {gib(needed)}, {gib(free)} "
                f"of {gib(gpu.memory)} are free; held by {held or 'nobody whom the driver names'}; "
                "end them, or give the models less"
            )
    return lines


def _told(holder: Holder) -> str:
    size = "" if holder.bytes is None else f" {gib(holder.bytes)}"
    return f"pid {holder.pid} {holder.name}{size}"


def overhead_bytes(grown: int, worker: Mapping[str, int], planned: int) -> int:
    """What a worker needs on its device besides the weights and KV cache that were planned.

    `grown` is by how much the device's used memory grew: what torch has reserved, and CUDA's
    context, modules and graphs beside it. A step of full size may need more than what torch
    has reserved at the end of the start: all that is allocated then, and the activations.
    """
    beside = grown - worker["reserved"]
    at_most = max(worker["reserved"], worker["allocated"] + worker["activations"])
    return max(0, beside + at_most - planned)
