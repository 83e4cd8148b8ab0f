"""Pages of a GPU's memory on a driver that is made up, handed over by a real server."""

from __future__ import annotations

import ctypes
import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from vllm.device_allocator import AllocationData, cumem

from llmserve.engine.worker.kv_pages import CudaMemory, Pages
from llmserve.gpus.page_exchange import ADDRESS, PAGE_BYTES, PageBroker
from tests.unit.test_page_exchange import until

if TYPE_CHECKING:
    from collections.abc import Mapping


GPU = "GPU-1"
ROOM = 20 * PAGE_BYTES


class Driver:
    """A GPU of ROOM bytes: memory is there as long as a handle, a mapping or a descriptor is.

    One page's descriptors all lead to one file, as CUDA's do.
    """

    shares = True

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}  # by what the memory is: its file's inode, or a number
        self.handles: dict[int, int] = {}  # handle: memory
        self.mapped: dict[int, tuple[int, int]] = {}  # address: size, memory
        self.exports: dict[int, int] = {}  # inode: memory
        self.open: dict[int, set[int]] = {}
        self.allowed: list[tuple[int, int]] = []
        self.fails: set[str] = set()
        self.refused: list[bool] = []  # of the imports to come, whether each fails
        self._numbers = itertools.count(1)

    def used(self) -> int:
        held = {*self.handles.values(), *(memory for _, memory in self.mapped.values())}
        held |= {
            self.exports[inode]
            for page in Path("/proc/self/fd").iterdir()
            if (inode := inode_of(int(page.name))) in self.exports
        }
        return sum(self.sizes[memory] for memory in held)

    def _unless(self, name: str) -> None:
        if name in self.fails:
            raise RuntimeError(f"CUDA: error 999 from {name}")

    def create(self, size: int, *, shared: bool) -> int:
        assert shared == (size == PAGE_BYTES)
        self._unless("create")
        if self.used() + size > ROOM:
            raise RuntimeError("CUDA: out of memory from cuMemCreate")
        handle, memory = next(self._numbers), next(self._numbers)
        self.sizes[memory] = size
        self.handles[handle] = memory
        return handle

    def descriptor(self, handle: int) -> int:
        self._unless("descriptor")
        page = os.memfd_create("page")
        self.exports[inode_of(page)] = self.handles[handle]
        return page

    def of(self, descriptor: int) -> int:
        self._unless("of")
        if self.refused and self.refused.pop(0):
            raise RuntimeError("CUDA: error 999 from of")
        handle = next(self._numbers)
        self.handles[handle] = self.exports[inode_of(descriptor)]
        return handle

    def map(self, address: int, size: int, handle: int) -> None:
        self._unless("map")
        assert address not in self.mapped
        self.mapped[address] = size, self.handles[handle]

    def allow(self, address: int, size: int) -> None:
        self._unless("allow")
        self.allowed.append((address, size))

    def unmap(self, address: int, size: int) -> None:
        """All that lies there, as cuMemUnmap does."""
        within = [at for at in self.mapped if address <= at < address + size]
        assert sum(self.mapped.pop(at)[0] for at in within) == size

    def release(self, handle: int) -> None:
        del self.handles[handle]

    # vLLM's two functions, csrc/cumem_allocator.cpp

    def create_and_map(self, handle: Any) -> None:
        _, size, address, pointer = handle
        if self.used() + size > ROOM:
            raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:120")
        memory, made = next(self._numbers), next(self._numbers)
        self.sizes[memory] = size
        self.handles[made] = memory
        ctypes.c_ulonglong.from_address(pointer).value = made
        self.map(address, size, made)
        self.allow(address, size)

    def unmap_and_release(self, handle: Any) -> None:
        _, size, address, pointer = handle
        self.unmap(address, size)
        self.release(ctypes.c_ulonglong.from_address(pointer).value)


def inode_of(descriptor: int) -> int:
    try:
        return os.fstat(descriptor).st_ino
    except OSError:
        return -1


class Allocation:
    """As vLLM's allocator hands them out: device, size, address, and where CUDA's handle is."""

    def __init__(self, size: int, address: int) -> None:
        self._place = ctypes.c_ulonglong()
        self.handle = (0, size, address, ctypes.addressof(self._place))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr("llmserve.engine.worker.kv_pages.Driver", lambda _: made)
    return made


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> PageBroker:
    monkeypatch.setenv(ADDRESS, "restored afterwards")
    return PageBroker()


def pages(driver: Driver) -> Pages:
    return Pages(0, GPU, driver.create_and_map, driver.unmap_and_release)


def anything(_: int) -> bool:
    """May change hands."""
    return True


KV = 3 * PAGE_BYTES + (6 << 20)
SMALL = 60 << 20


def test_pages_map_large_memory_and_vllm_unmaps_it(driver: Driver, server: PageBroker) -> None:
    kv, small = Allocation(KV, 1 << 40), Allocation(SMALL, 2 << 40)
    ours = pages(driver)
    assert ours.map([kv.handle, small.handle], anything) == []  # nobody left anything
    sizes = [size for size, _ in driver.mapped.values()]
    assert sizes == [PAGE_BYTES] * 3 + [6 << 20, SMALL]
    assert driver.used() == KV + SMALL
    assert (1 << 40, KV) in driver.allowed
    assert len(driver.handles) == 2  # what vLLM knows of each
    ours.unmap([kv.handle, small.handle])
    assert driver.used() == 0
    assert server.bytes(GPU) == 0


def test_pages_pass_to_an_expected_engine(driver: Driver, server: PageBroker) -> None:
    one, other = Allocation(KV, 1 << 40), Allocation(KV + PAGE_BYTES, 2 << 40)
    giver, taker = pages(driver), pages(driver)
    giver.map([one.handle], anything)
    memory = {each for size, each in driver.mapped.values() if size == PAGE_BYTES}
    with server.expecting([GPU]):
        giver.unmap([one.handle])
        assert driver.used() == server.bytes(GPU) == 3 * PAGE_BYTES
        # What another left is to be cleared.
        assert taker.map([other.handle], anything) == [(2 << 40, 3 * PAGE_BYTES)]
    assert memory < {each for _, each in driver.mapped.values()}
    assert driver.used() == KV + PAGE_BYTES
    taker.unmap([other.handle])
    assert driver.used() == 0


def test_more_than_it_can_use_goes_to_the_driver(driver: Driver, server: PageBroker) -> None:
    one, other = Allocation(16 * PAGE_BYTES, 1 << 40), Allocation(PAGE_BYTES, 2 << 40)
    rest = Allocation(SMALL, 3 << 40)
    giver, taker = pages(driver), pages(driver)
    giver.map([one.handle], anything)
    with server.expecting([GPU]):
        giver.unmap([one.handle])
        taker.map([other.handle, rest.handle], anything)
    until(lambda: driver.used() == PAGE_BYTES + SMALL)  # a page may be on its way yet


@pytest.mark.parametrize("size", [30 * PAGE_BYTES, 19 * PAGE_BYTES])
def test_pages_without_room_map_nothing_and_return_pages(
    driver: Driver, server: PageBroker, size: int
) -> None:
    """Also where the first of two has room."""
    one = Allocation(KV, 1 << 40)
    two = Allocation(size, 2 << 40), Allocation(2 * PAGE_BYTES, 3 << 40)
    giver, taker = pages(driver), pages(driver)
    giver.map([one.handle], anything)
    with server.expecting([GPU]):
        giver.unmap([one.handle])
        with pytest.raises(RuntimeError, match="out of memory"):
            taker.map([each.handle for each in two], anything)
        assert not driver.mapped
        assert not driver.handles
        assert driver.used() == server.bytes(GPU) >= 3 * PAGE_BYTES
        assert taker.map([one.handle], anything) == [(1 << 40, 3 * PAGE_BYTES)]
    assert driver.used() == KV


@pytest.mark.parametrize("fails", ["create", "map", "allow"])
def test_whatever_fails_leaves_nothing(driver: Driver, server: PageBroker, fails: str) -> None:
    driver.fails = {fails}
    with pytest.raises(RuntimeError, match=f"999 from {fails}"):
        pages(driver).map([Allocation(KV, 1 << 40).handle], anything)
    assert not driver.mapped
    assert not driver.handles
    assert driver.used() == server.bytes(GPU) == 0


@pytest.mark.parametrize("fails", ["of", "descriptor"])
def test_pages_that_cannot_pass_come_from_the_driver(
    driver: Driver, server: PageBroker, fails: str
) -> None:
    one, other = Allocation(KV, 1 << 40), Allocation(KV, 2 << 40)
    giver, taker = pages(driver), pages(driver)
    driver.fails = {fails}
    giver.map([one.handle], anything)
    with server.expecting([GPU]):
        giver.unmap([one.handle])
        taker.map([other.handle], anything)
    until(lambda: driver.used() == KV)
    taker.unmap([other.handle])
    assert driver.used() == 0


@pytest.mark.parametrize("refused", list(itertools.product([True, False], repeat=4)))
def test_pages_imported_are_cleared_and_no_others(
    driver: Driver, server: PageBroker, refused: tuple[bool, ...]
) -> None:
    """With two allocations, each reported range lies within its own, whatever import fails."""
    size = 2 * PAGE_BYTES + SMALL
    made = [Allocation(size, at << 40) for at in (1, 2)]
    ours = [each.handle for each in made]
    giver, taker = pages(driver), pages(driver)
    giver.map(ours, anything)
    before = {memory for _, memory in driver.mapped.values()}
    with server.expecting([GPU]):
        giver.unmap(ours)
        driver.refused = list(refused)
        ranges = taker.map(ours, anything)
    dirty = {at for at, (_, memory) in driver.mapped.items() if memory in before}
    assert len(dirty) == refused.count(False)
    assert {at for start, many in ranges for at in range(start, start + many, PAGE_BYTES)} == dirty


def test_what_may_not_pass_is_of_one_piece(driver: Driver, server: PageBroker) -> None:
    cache, weights = Allocation(KV, 1 << 40), Allocation(KV, 2 << 40)
    ours = pages(driver)
    ours.map([cache.handle, weights.handle], lambda address: address == 1 << 40)
    assert [size for size, _ in driver.mapped.values()] == [PAGE_BYTES] * 3 + [6 << 20, KV]
    with server.expecting([GPU]):
        ours.unmap([weights.handle, cache.handle])
        assert server.bytes(GPU) == driver.used() == 3 * PAGE_BYTES


def test_pages_failed_unmap_closes_descriptors(driver: Driver, server: PageBroker) -> None:
    one, other = Allocation(KV, 1 << 40), Allocation(KV, 2 << 40)
    ours = pages(driver)
    ours.map([one.handle], anything)
    with pytest.raises(AssertionError):
        ours.unmap([one.handle, other.handle])  # which is not mapped
    assert driver.used() == 0


@pytest.mark.parametrize("why", ["no server", "no support"])
def test_pages_without_exchange_are_one_piece(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setenv(ADDRESS, "llmserve-nobody")
    driver.shares = why != "no support"
    if why == "no server":
        monkeypatch.delenv(ADDRESS)
    one = Allocation(KV, 1 << 40)
    ours = pages(driver)
    assert ours.map([one.handle], anything) == []
    assert [size for size, _ in driver.mapped.values()] == [KV]
    ours.unmap([one.handle])
    assert driver.used() == 0


# --- what of a worker's memory may pass


class Cudart:
    """Notes what is cleared."""

    def __init__(self) -> None:
        self.cleared: list[tuple[int, int, int, int]] = []
        self.error = 0
        self.lib = SimpleNamespace(
            cudaMemcpyAsync=Function(), cudaMemsetAsync=Function(self._clear)
        )

    def _clear(self, *arguments: int) -> int:
        self.cleared.append(arguments)  # type: ignore[arg-type]
        return self.error

    def CUDART_CHECK(self, error: int) -> None:  # noqa: N802  # vLLM's name
        if error:
            raise RuntimeError(f"CUDART error: {error}")


class Function:
    """One of a library's, with a place for `argtypes`."""

    def __init__(self, does: Any = None) -> None:
        self._does = does

    def __call__(self, *arguments: int) -> Any:
        return self._does(*arguments)


@pytest.mark.parametrize("exchanges_pages", [True, False])
def test_the_kv_cache_alone_passes_and_is_cleared(
    driver: Driver, server: PageBroker, monkeypatch: pytest.MonkeyPatch, *, exchanges_pages: bool
) -> None:
    cache, weights = Allocation(KV, 1 << 40), Allocation(KV, 2 << 40)
    data = {
        cache.handle[2]: AllocationData(cache.handle, "kv_cache"),
        weights.handle[2]: AllocationData(weights.handle, "weights"),
    }
    cudart = Cudart()
    memory = memory_of(driver, cudart, data, monkeypatch, exchanges_pages=exchanges_pages)
    handles = [each.handle for each in data.values()]
    memory.map(handles)
    assert not cudart.cleared  # the driver's
    with server.expecting([GPU]):
        memory.unmap(handles)
        assert server.bytes(GPU) == (3 * PAGE_BYTES if exchanges_pages else 0)
        memory.map(handles)
    assert cudart.cleared == ([(1 << 40, 0, 3 * PAGE_BYTES, 7)] if exchanges_pages else [])


def test_memory_that_cannot_be_cleared_is_not_left_mapped(
    driver: Driver, server: PageBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, weights = Allocation(KV, 1 << 40), Allocation(KV, 2 << 40)
    data = {each.handle[2]: AllocationData(each.handle, "kv_cache") for each in (cache, weights)}
    cudart = Cudart()
    memory = memory_of(driver, cudart, data, monkeypatch, exchanges_pages=True)
    handles = [each.handle for each in data.values()]
    memory.map(handles)
    with server.expecting([GPU]):
        memory.unmap(handles)
        cudart.error = 700
        with pytest.raises(RuntimeError, match="700"):
            memory.map(handles)
        assert not driver.mapped
        cudart.error = 0
        memory.map(handles)  # which maps over nothing
    memory.unmap(handles)
    assert driver.used() == 0


def memory_of(
    driver: Driver,
    cudart: Cudart,
    data: Mapping[int, Any],
    monkeypatch: pytest.MonkeyPatch,
    *,
    exchanges_pages: bool,
) -> CudaMemory:
    allocator = SimpleNamespace(pointer_to_data=data)
    monkeypatch.setattr(
        cumem, "CuMemAllocator", SimpleNamespace(get_instance=lambda: allocator), raising=False
    )
    monkeypatch.setattr(cumem, "libcudart", cudart, raising=False)
    monkeypatch.setattr(cumem, "create_and_map", driver.create_and_map)
    monkeypatch.setattr(cumem, "unmap_and_release", driver.unmap_and_release)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    uuid = GPU.removeprefix("GPU-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=uuid))
    return CudaMemory(exchanges_pages=exchanges_pages)
