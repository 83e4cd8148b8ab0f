"""This machine's GPUs, as the driver tells of them (NVML). No CUDA context is made."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import pynvml

from llmserve.gpus.device import Box, Gpu

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True)
class Holder:
    """A process that holds memory of a GPU."""

    pid: int
    name: str
    bytes: int | None  # None: the driver does not say (a container of its own)


def visible(env: Mapping[str, str] = os.environ) -> Box:
    """The GPUs that CUDA programs see here, in CUDA's order; none without a driver."""
    with _driver() as running:
        return tuple(_seen(env)) if running else ()


def used_bytes(gpu: Gpu) -> int:
    """What is taken on a GPU, by whomever, the driver's own part included."""
    with _driver():
        memory = pynvml.nvmlDeviceGetMemoryInfo(_handle(gpu))
        return int(memory.total) - int(memory.free)


def holders(gpu: Gpu) -> list[Holder]:
    """Who holds memory of a GPU, most first, as far as the driver can see."""
    with _driver():
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(_handle(gpu))
    found = [Holder(p.pid, _name_of(p.pid), p.usedGpuMemory) for p in processes]
    return sorted(found, key=lambda holder: -(holder.bytes or 0))


@contextlib.contextmanager
def _driver() -> Iterator[bool]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield False
        return
    try:
        yield True
    finally:
        pynvml.nvmlShutdown()


def _handle(gpu: Gpu) -> Any:
    return pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid)


def _name_of(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "of another container"


def _seen(env: Mapping[str, str]) -> Iterator[Gpu]:
    """NVML counts in PCI order; CUDA too, by the CUDA_DEVICE_ORDER that `environment` sets."""
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    uuids = [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
    islands = _islands(handles)
    for index, at in enumerate(_order(env.get("CUDA_VISIBLE_DEVICES"), uuids)):
        handle = handles[at]
        yield Gpu(
            index=index,
            name=pynvml.nvmlDeviceGetName(handle),
            memory=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
            uuid=uuids[at],
            island=islands[at],
        )


def _order(chosen: str | None, uuids: list[str]) -> list[int]:
    """Which GPUs CUDA_VISIBLE_DEVICES leaves.

    As in CUDA, it ends at the first unknown one, and leaves none if one is named twice.
    """
    if chosen is None:
        return list(range(len(uuids)))
    left: list[int] = []
    for term in (part.strip() for part in chosen.split(",")):
        by_uuid = [i for i, uuid in enumerate(uuids) if term and uuid.startswith(term)]
        if term.isdigit() and int(term) < len(uuids):
            left.append(int(term))
        elif len(by_uuid) == 1:
            left += by_uuid
        else:
            break
    return left if len(set(left)) == len(left) else []


def _islands(handles: list[Any]) -> list[int]:
    """GPUs that reach each other by NVLink get one number; a GPU without link one of its own."""
    islands = list(range(len(handles)))
    for i, one in enumerate(handles):
        for j in range(i):
            if islands[i] != islands[j] and _linked(one, handles[j]):
                joined = {islands[i], islands[j]}
                islands = [min(joined) if island in joined else island for island in islands]
    return islands


def _linked(one: Any, other: Any) -> bool:
    try:
        status = pynvml.nvmlDeviceGetP2PStatus(one, other, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
    except pynvml.NVMLError:  # a driver or GPU without NVLink
        return False
    return bool(status == pynvml.NVML_P2P_STATUS_OK)
