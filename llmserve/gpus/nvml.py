"""This machine's GPUs as the driver reports them (NVML), without a CUDA context."""

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
    bytes: int | None  # None: unknown to the driver (another container)


def visible(env: Mapping[str, str] = os.environ) -> Box:
    """Return the GPUs that CUDA programs see, in CUDA's order; none without a driver."""
    with _driver() as running:
        return tuple(_detected(env)) if running else ()


def used_bytes(gpu: Gpu) -> int:
    """Return the used bytes of a GPU, of all processes and the driver."""
    with _driver():
        memory = pynvml.nvmlDeviceGetMemoryInfo(_handle(gpu))
        return int(memory.total) - int(memory.free)


def holders(gpu: Gpu) -> list[Holder]:
    """Return the processes that hold memory of a GPU, the largest first."""
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


def _detected(env: Mapping[str, str]) -> Iterator[Gpu]:
    """Return the GPUs; NVML uses PCI order, as CUDA does with `environment`'s CUDA_DEVICE_ORDER."""
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
    """Return the GPUs of CUDA_VISIBLE_DEVICES.

    As in CUDA, the list ends at the first unknown GPU, and a GPU that occurs twice hides all.
    """
    if chosen is None:
        return list(range(len(uuids)))
    order: list[int] = []
    for term in (part.strip() for part in chosen.split(",")):
        by_uuid = [i for i, uuid in enumerate(uuids) if term and uuid.startswith(term)]
        if term.isdigit() and int(term) < len(uuids):
            order.append(int(term))
        elif len(by_uuid) == 1:
            order += by_uuid
        else:
            break
    return order if len(set(order)) == len(order) else []


def _islands(handles: list[Any]) -> list[int]:
    """Return a number for each GPU; GPUs that NVLink connects share one."""
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
