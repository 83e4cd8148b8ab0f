"""A GPU's memory goes from one process to another and back, and none of it is lost.

`pytest -m gpu -s tests/gpu/test_handover.py`, where llmserve and vLLM for CUDA are installed.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from llmserve.gpus import nvml
from llmserve.gpus.page_exchange import PAGE_BYTES, PageBroker
from tests.gpu import MARKS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

pytestmark = MARKS

GPU = "GPU-under-test"  # of bare pages
CACHE = 16 * PAGE_BYTES + (10 << 20)
LARGER = 20 * PAGE_BYTES
SLACK = 64 << 20
WORD = 9  # what each process leaves everywhere
ZEROS = bytes(PAGE_BYTES)


class Device:
    """The first GPU in the calling process, with vLLM's two functions on it."""

    def __init__(self) -> None:
        import torch

        from llmserve.engine.worker.kv_pages import Pages
        from llmserve.gpus.cuda_driver import Driver

        torch.zeros(1, device="cuda:0")  # a context
        self.driver = Driver(0)
        self.library = self.driver._library
        self.pages = Pages(0, GPU, self.create_and_map, self.unmap_and_release)
        self.memory = self._worker_memory()
        self._handles: dict[int, tuple[int, int, int, int]] = {}
        self._places: list[ctypes.c_ulonglong] = []

    def _worker_memory(self) -> Any:
        """As an engine's worker has it, which clears; vLLM's part of it is this object's."""
        from llmserve.engine.worker.kv_pages import CudaMemory

        runtime = ctypes.CDLL(loaded("libcudart"))
        every = SimpleNamespace(tag="kv_cache")
        cumem = ModuleType("cumem")
        vars(cumem).update(
            CuMemAllocator=SimpleNamespace(
                get_instance=lambda: SimpleNamespace(pointer_to_data=defaultdict(lambda: every))
            ),
            libcudart=SimpleNamespace(lib=runtime, CUDART_CHECK=no_error),
            create_and_map=self.create_and_map,
            unmap_and_release=self.unmap_and_release,
        )
        allocator = ModuleType("vllm.device_allocator")
        vars(allocator).update(cumem=cumem)
        sys.modules |= {"vllm": ModuleType("vllm"), "vllm.device_allocator": allocator}
        return CudaMemory(exchanges_pages=True)

    def handle(self, size: int) -> tuple[int, int, int, int]:
        if size not in self._handles:
            address, place = ctypes.c_ulonglong(), ctypes.c_ulonglong()
            reserve = self.library.cuMemAddressReserve
            word = ctypes.c_ulonglong
            reserve.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, word, word]
            assert reserve(ctypes.byref(address), size, 0, 0, 0) == 0
            self._places.append(place)
            self._handles[size] = (0, size, address.value, ctypes.addressof(place))
        return self._handles[size]

    def create_and_map(self, handle: Any) -> None:
        _, size, address, pointer = handle
        made = self.driver.create(size, shared=False)
        ctypes.c_ulonglong.from_address(pointer).value = made
        self.driver.map(address, size, made)
        self.driver.allow(address, size)

    def unmap_and_release(self, handle: Any) -> None:
        _, size, address, pointer = handle
        self.driver.unmap(address, size)
        self.driver.release(ctypes.c_ulonglong.from_address(pointer).value)

    def dirty(self, handle: Any) -> int:
        """How many of its pages have a byte that is not zero; WORD everywhere from now on."""
        _, size, address, _ = handle
        found, host = 0, ctypes.create_string_buffer(PAGE_BYTES)
        copy = self.library.cuMemcpyDtoH_v2
        copy.argtypes = [ctypes.c_void_p, ctypes.c_ulonglong, ctypes.c_size_t]
        for start in range(0, size, PAGE_BYTES):
            length = min(PAGE_BYTES, size - start)
            assert copy(host, address + start, length) == 0
            found += host.raw[:length] != ZEROS[:length]
        self.filled(handle)
        return found

    def filled(self, handle: Any) -> tuple[int, int]:
        """Its first and its last word so far; WORD from now on."""
        _, size, address, _ = handle
        words = [ctypes.c_uint(), ctypes.c_uint()]
        copy, fill = self.library.cuMemcpyDtoH_v2, self.library.cuMemsetD32_v2
        copy.argtypes = [ctypes.c_void_p, ctypes.c_ulonglong, ctypes.c_size_t]
        fill.argtypes = [ctypes.c_ulonglong, ctypes.c_uint, ctypes.c_size_t]
        for word, at in zip(words, (address, address + size - 4), strict=True):
            assert copy(ctypes.byref(word), at, 4) == 0
        assert fill(address, WORD, size // 4) == 0
        assert self.library.cuCtxSynchronize() == 0
        return words[0].value, words[1].value


def no_error(error: int) -> None:
    assert error == 0


def loaded(name: str) -> str:
    """The path of a library of the calling process."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").split()
    return next(path for path in maps if name in path.rpartition("/")[2])


def work(orders: Connection) -> None:
    """Maps and unmaps as it is told."""
    device = Device()
    orders.send("here")
    while (order := orders.recv()) is not None:
        word, size = order
        handle = device.handle(size)
        try:
            if word == "wake":
                device.memory.map([handle])
                device.memory.copied()
                orders.send(device.dirty(handle))
            elif word == "sleep":
                device.memory.unmap([handle])
                orders.send(None)
            elif word == "map":
                left = device.pages.map([handle], lambda _: True)
                orders.send((sum(bytes_ for _, bytes_ in left), device.filled(handle)))
            else:
                device.pages.unmap([handle])
                orders.send(None)
        except RuntimeError as error:
            orders.send(str(error))


@dataclass
class Worker:
    process: Any
    orders: Connection

    def __call__(self, word: str, size: int) -> Any:
        self.orders.send((word, size))
        return self.orders.recv()


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[PageBroker, Worker, Worker]]:
    monkeypatch.setenv("LLMSERVE_HANDOVER", "restored afterwards")
    server = PageBroker()
    spawn = multiprocessing.get_context("spawn")
    made: list[Worker] = []
    for _ in range(2):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=work, args=(theirs,), daemon=True)
        process.start()
        made.append(Worker(process, ours))
    assert [each.orders.recv() for each in made] == ["here", "here"]
    yield server, made[0], made[1]
    for each in made:
        each.process.kill()
        each.process.join()


def used() -> int:
    return nvml.used_bytes(nvml.visible()[0])


def comes_back(to: int) -> bool:
    end = time.monotonic() + 15
    while used() > to + SLACK and time.monotonic() < end:
        time.sleep(0.05)
    return used() <= to + SLACK


def test_it_changes_hands_and_comes_back(workers: tuple[PageBroker, Worker, Worker]) -> None:
    server, one, other = workers
    before = used()
    assert one("map", CACHE) == (0, (0, 0))
    for _ in range(3):
        with server.expecting([GPU]):
            one("unmap", CACHE)
            assert server.bytes(GPU) == 16 * PAGE_BYTES
            taken, (first, _) = other("map", LARGER)
            assert (taken, first) == (16 * PAGE_BYTES, WORD)  # the other's: to be cleared
            assert used() <= before + LARGER + SLACK
        with server.expecting([GPU]):
            other("unmap", LARGER)
            assert one("map", CACHE)[0] == 16 * PAGE_BYTES
        assert used() <= before + CACHE + SLACK
    one("unmap", CACHE)
    assert comes_back(before)


def test_a_cache_taken_from_another_is_zero_everywhere(
    workers: tuple[PageBroker, Worker, Worker],
) -> None:
    """Pages of another engine, and those of the driver beside them."""
    server, one, other = workers
    gpu = nvml.visible()[0].uuid
    assert gpu is not None
    before = used()
    assert one("wake", CACHE) == 0
    for _ in range(3):
        with server.expecting([gpu]):
            one("sleep", CACHE)
            assert server.bytes(gpu) == 16 * PAGE_BYTES
            assert other("wake", LARGER) == 0
            assert server.bytes(gpu) == 0
            assert used() <= before + LARGER + SLACK  # the other's pages are among them
        with server.expecting([gpu]):
            other("sleep", LARGER)
            assert one("wake", CACHE) == 0
    one("sleep", CACHE)
    assert comes_back(before)


def test_what_nobody_takes_comes_back(workers: tuple[PageBroker, Worker, Worker]) -> None:
    server, one, _ = workers
    before = used()
    one("map", CACHE)
    with server.expecting([GPU]):
        one("unmap", CACHE)
        assert used() >= before + 16 * PAGE_BYTES - SLACK
    assert comes_back(before)


def test_without_room_what_was_taken_is_at_hand_again(
    workers: tuple[PageBroker, Worker, Worker],
) -> None:
    server, one, other = workers
    before = used()
    one("map", CACHE)
    with server.expecting([GPU]):
        one("unmap", CACHE)
        assert "out of memory" in other("map", 1 << 40)
        assert server.bytes(GPU) >= 16 * PAGE_BYTES
        assert other("map", CACHE)[0] == 16 * PAGE_BYTES
    other("unmap", CACHE)
    assert comes_back(before)


def test_one_that_is_killed_gives_all_back(workers: tuple[PageBroker, Worker, Worker]) -> None:
    _, one, _ = workers
    before = used()
    one("map", CACHE)
    one.process.kill()
    one.process.join()
    assert comes_back(before)
