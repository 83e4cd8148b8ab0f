"""What the driver tells, by a small fake of it at pynvml's functions."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import pynvml
import pytest

from llmserve.gpus import nvml
from llmserve.gpus.device import GIB

NAMES = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3", "NVIDIA L4", "NVIDIA L4")
UUIDS = ("GPU-aaaa1", "GPU-aaaa2", "GPU-bbbb1", "GPU-cccc1")
NOBODY = 2**22 + 1  # above every pid


@dataclass
class Driver:
    """Four GPUs, 0-1 and 2-3 with NVLink between them; a handle is the GPU's number."""

    linked: frozenset[frozenset[int]] = frozenset({frozenset({0, 1}), frozenset({2, 3})})
    running: bool = True
    knows_links: bool = True
    free: dict[int, int] = field(default_factory=dict)
    processes: dict[int, list[tuple[int, int | None]]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)

    def nvmlInit(self) -> None:  # noqa: N802  # the driver's names
        self.calls["init"] += 1
        if not self.running:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.calls["shutdown"] += 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(UUIDS)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        return UUIDS.index(uuid)

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return UUIDS[handle]

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return NAMES[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        total = (handle + 1) * 10 * GIB
        return SimpleNamespace(total=total, free=self.free.get(handle, total))

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> list[int]:  # noqa: N802
        return [9, 0] if handle < 2 else [8, 9]

    def nvmlDeviceGetP2PStatus(self, one: int, other: int, index: int) -> int:  # noqa: N802
        assert index == pynvml.NVML_P2P_CAPS_INDEX_NVLINK
        if not self.knows_links:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        ok = frozenset({one, other}) in self.linked
        return int(
            pynvml.NVML_P2P_STATUS_OK if ok else pynvml.NVML_P2P_STATUS_CHIPSET_NOT_SUPPORTED
        )

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:  # noqa: N802
        found = self.processes.get(handle, [])
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in found]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    for name in dir(fake):
        if name.startswith("nvml"):
            monkeypatch.setattr(pynvml, name, getattr(fake, name))
    return fake


def uuids(chosen: str | None) -> list[str | None]:
    env = {} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}
    return [gpu.uuid for gpu in nvml.visible(env)]


def test_visible_gpu_has_the_drivers_values(driver: Driver) -> None:
    box = nvml.visible({})
    assert [gpu.index for gpu in box] == [0, 1, 2, 3]
    assert tuple(gpu.name for gpu in box) == NAMES
    assert tuple(gpu.uuid for gpu in box) == UUIDS
    assert [gpu.memory // GIB for gpu in box] == [10, 20, 30, 40]
    assert [gpu.capability for gpu in box] == [(9, 0), (9, 0), (8, 9), (8, 9)]
    assert driver.calls == {"init": 1, "shutdown": 1}


@pytest.mark.parametrize(
    ("chosen", "left"),
    [
        (None, [0, 1, 2, 3]),
        ("0", [0]),
        ("3,1", [3, 1]),
        (" 2 , 0 ", [2, 0]),
        ("GPU-cccc1,GPU-aaaa2", [3, 1]),
        ("GPU-b,GPU-c", [2, 3]),  # as much as tells it apart
        ("1,GPU-b", [1, 2]),
        ("1,7,0", [1]),  # ends at the first unknown one
        ("1,-1,0", [1]),
        ("2,GPU-zz,0", [2]),
        ("3,GPU-aaaa,0", [3]),  # two begin so
        ("3,,0", [3]),
        ("", []),
        ("-1", []),
        ("none", []),
        ("0,1,0", []),  # named twice: none at all
        ("0,GPU-aaaa1", []),
    ],
)
def test_cuda_visible_devices_means_what_it_means_to_cuda(
    driver: Driver, chosen: str | None, left: list[int]
) -> None:
    assert uuids(chosen) == [UUIDS[index] for index in left]


def test_gpus_are_counted_within_what_is_visible(driver: Driver) -> None:
    three, one = nvml.visible({"CUDA_VISIBLE_DEVICES": "3,1"})
    assert (three.index, three.memory, one.index, one.memory) == (0, 40 * GIB, 1, 20 * GIB)


def test_the_process_s_own_environment_is_read(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "2")
    assert [gpu.uuid for gpu in nvml.visible()] == ["GPU-bbbb1"]


@pytest.mark.parametrize(
    ("linked", "groups"),
    [
        ([(0, 1), (2, 3)], [{0, 1}, {2, 3}]),
        ([(0, 2)], [{0, 2}, {1}, {3}]),
        ([(0, 1), (1, 2), (2, 3)], [{0, 1, 2, 3}]),
        ([(2, 3), (0, 1), (0, 3)], [{0, 1, 2, 3}]),
        ([], [{0}, {1}, {2}, {3}]),
    ],
)
def test_gpus_with_nvlink_between_them_are_an_island(
    driver: Driver, linked: list[tuple[int, int]], groups: list[set[int]]
) -> None:
    driver.linked = frozenset(frozenset(pair) for pair in linked)
    islands: dict[int, set[int]] = {}
    for gpu in nvml.visible({}):
        islands.setdefault(gpu.island, set()).add(gpu.index)
    assert sorted(islands.values(), key=min) == groups


def test_an_island_stays_one_when_half_of_it_is_hidden(driver: Driver) -> None:
    first, second, third = nvml.visible({"CUDA_VISIBLE_DEVICES": "2,0,3"})
    assert first.island == third.island != second.island


def test_a_driver_that_knows_no_links_has_gpus_without_any(driver: Driver) -> None:
    driver.knows_links = False
    assert len({gpu.island for gpu in nvml.visible({})}) == 4


def test_without_a_driver_there_are_no_gpus(driver: Driver) -> None:
    driver.running = False
    assert nvml.visible({}) == ()
    assert driver.calls == {"init": 1}  # what was not begun is not ended


def test_what_is_used_is_all_that_is_not_free(driver: Driver) -> None:
    box = nvml.visible({"CUDA_VISIBLE_DEVICES": "3,1"})
    driver.free = {3: 15 * GIB}
    assert [nvml.used_bytes(gpu) for gpu in box] == [25 * GIB, 0]
    assert driver.calls["init"] == driver.calls["shutdown"] == 3


def test_holders_come_with_their_names_most_first(driver: Driver) -> None:
    (gpu,) = nvml.visible({"CUDA_VISIBLE_DEVICES": "2"})
    me = os.getpid()
    driver.processes = {2: [(NOBODY, None), (me, 3 * GIB), (NOBODY + 1, 5 * GIB)]}
    other, mine, unknown = nvml.holders(gpu)
    assert other == nvml.Holder(NOBODY + 1, "of another container", 5 * GIB)
    assert (mine.pid, mine.bytes) == (me, 3 * GIB)
    assert mine.name.startswith(("python", "pytest", "[pytest-xdist"))
    assert unknown == nvml.Holder(NOBODY, "of another container", None)
