"""What an engine's worker has on its GPU, under the addresses that vLLM's allocator reserved.

The KV cache consists of pages that can be handed over to another engine
(`llmserve.gpus.page_exchange`); vLLM makes each allocation of one piece (csrc/cumem_allocator.cpp).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from typing import TYPE_CHECKING, Any

import torch

from llmserve.gpus import page_exchange
from llmserve.gpus.cuda_driver import Driver
from llmserve.gpus.page_exchange import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vllm.device_allocator import AllocationData, HandleType


class Pinned:
    """Anonymous memory of the host that the device copies from and to by itself.

    torch's own pinned memory is rounded up to a power of two and never given back.
    """

    def __init__(self, cudart: Any, size: int) -> None:
        area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them; pinning takes longer there
            area.madvise(mmap.MADV_HUGEPAGE)
        self._first = ctypes.c_char.from_buffer(area)  # keeps the area
        self._cudart = cudart
        self.address = ctypes.addressof(self._first)
        if error := cudart.cudaHostRegister(self.address, size):
            cudart.cudaGetLastError()  # else the next kernel is blamed for it
            raise MemoryError(
                f"{size / 2**30:.2f}GiB more of host memory could not be pinned "
                f"({cudart.cudaGetErrorString(error)}); lower `host_memory`, or stop what else "
                "takes the host's memory"
            )

    def free(self) -> None:
        if error := self._cudart.cudaHostUnregister(self.address):
            self._cudart.cudaGetLastError()  # as above
            why = self._cudart.cudaGetErrorString(error)
            raise RuntimeError(f"host memory could not be unpinned ({why})")
        del self._first


class CudaMemory:
    """What the calling process has on its current CUDA device.

    `hands_over`: whether its KV cache may consist of pages.
    """

    def __init__(self, *, hands_over: bool) -> None:
        from vllm.device_allocator import cumem  # noqa: PLC0415  # looks for CUDA

        self.settle = torch.cuda.synchronize
        self._allocator = cumem.CuMemAllocator.get_instance()
        self._cudart = cumem.libcudart
        self._device = torch.cuda.current_device()
        self._stream = torch.cuda.Stream()
        pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        self._begin_copy = self._cudart.lib.cudaMemcpyAsync
        self._begin_copy.argtypes = [pointer, pointer, size, number, pointer]
        self._begin_to_clear = self._cudart.lib.cudaMemsetAsync
        self._begin_to_clear.argtypes = [pointer, number, size, pointer]
        gpu = f"GPU-{torch.cuda.get_device_properties(self._device).uuid}"
        self._pages = Pages(self._device, gpu, cumem.create_and_map, cumem.unmap_and_release)
        self._hands_over = hands_over

    @property
    def allocations(self) -> Mapping[int, AllocationData]:
        found: Mapping[int, AllocationData] = self._allocator.pointer_to_data
        return found

    def map(self, handles: Sequence[HandleType]) -> None:
        imported = self._pages.map(handles, self._may_pass)
        try:
            for start, size in imported:
                # Another model's cache could be NaN to this one.
                error = self._begin_to_clear(start, 0, size, self._stream.cuda_stream)
                self._cudart.CUDART_CHECK(error)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # what is being cleared stays mapped so long
                self.copied()
            self.unmap(handles)
            raise

    def unmap(self, handles: Sequence[HandleType]) -> None:
        self._pages.unmap(handles)

    def _may_pass(self, address: int) -> bool:
        """Nothing that vLLM frees while the engine lives: it knows of no descriptors."""
        return self._hands_over and self.allocations[address].tag == "kv_cache"

    def pin(self, size: int) -> Pinned:
        return Pinned(self._cudart, size)

    def copy(self, target: int, source: int, size: int) -> None:
        # cudaMemcpyDefault: which side is the host is told by the addresses.
        error = self._begin_copy(target, source, size, 4, self._stream.cuda_stream)
        self._cudart.CUDART_CHECK(error)

    def copied(self) -> None:
        self._stream.synchronize()

    def enter(self) -> None:
        torch.cuda.set_device(self._device)


class Pages:
    """Memory of a device, some of it mapped in pages of `handover.PAGE_BYTES`.

    `create_and_map` and `unmap_and_release` are vLLM's, for one piece. A handle's last entry
    points to CUDA's handle of the memory, here that of the first page, so that
    `unmap_and_release` is right for both. The pages' other handles are released at once: what
    is mapped stays.
    """

    def __init__(self, device: int, gpu: str, create_and_map: Any, unmap_and_release: Any) -> None:
        self._gpu = gpu
        self._map_whole = create_and_map
        self._unmap = unmap_and_release
        self._driver = Driver(device)
        self._in_pages = page_exchange.offered() and self._driver.shares
        self._mapped: dict[int, list[int]] = {}  # descriptors of pages, by address

    def map(
        self, handles: Sequence[HandleType], may_pass: Callable[[int], bool]
    ) -> list[tuple[int, int]]:
        """All of them, or none; where another's pages lie, and how many bytes of them.

        `may_pass` says of an address whether what lies there may go to another engine. Raises
        RuntimeError.
        """
        in_pages = {address for _, _, address, _ in handles if self._in_pages and may_pass(address)}
        wanted = sum(size // PAGE_BYTES for _, size, at, _ in handles if at in in_pages)
        taken = page_exchange.take(self._gpu, wanted)
        imported: list[tuple[int, int]] = []
        done: list[HandleType] = []
        try:
            for handle in handles:
                _, size, address, _ = handle
                if address in in_pages and size >= PAGE_BYTES:
                    imported.append((address, self._map_pages(handle, taken)))
                else:
                    self._map_whole(handle)
                done.append(handle)
        except BaseException:
            try:
                self.unmap(done)
            finally:
                page_exchange.give(self._gpu, taken)
            raise
        return [(start, size) for start, size in imported if size]

    def _map_pages(self, handle: HandleType, taken: list[int]) -> int:
        """How many bytes, from the first on, are in pages of another: those are used first."""
        _, size, address, pointer = handle
        pages: list[int] = []
        mapped = imported = 0
        first = ctypes.c_ulonglong.from_address(pointer)
        try:
            while mapped < size:
                length = min(PAGE_BYTES, size - mapped)
                page = self._imported(taken, pages) if length == PAGE_BYTES else None
                if page is not None:
                    imported += length
                else:
                    page = self._created(length, pages)
                try:
                    self._driver.map(address + mapped, length, page)
                except BaseException:
                    self._driver.release(page)
                    raise
                if mapped:
                    self._driver.release(page)
                else:
                    first.value = page
                mapped += length
            self._driver.allow(address, size)
        except BaseException:
            if mapped:
                self._driver.unmap(address, mapped)
                self._driver.release(first.value)
            taken += pages
            raise
        self._mapped[address] = pages
        return imported

    def _imported(self, taken: list[int], pages: list[int]) -> int | None:
        """A handle of one of the pages taken, whose descriptor goes to `pages`."""
        while taken:
            with contextlib.suppress(RuntimeError):  # it is not to be had any more
                page = self._driver.of(taken[-1])
                pages.append(taken.pop())
                return page
            os.close(taken.pop())
        return None

    def _created(self, length: int, pages: list[int]) -> int:
        """A handle of new memory; its descriptor goes to `pages` if it is a whole page."""
        if length < PAGE_BYTES:
            return self._driver.create(length, shared=False)
        page = self._driver.create(length, shared=True)
        with contextlib.suppress(RuntimeError):  # then it stays here
            pages.append(self._driver.descriptor(page))
        return page

    def unmap(self, handles: Sequence[HandleType]) -> None:
        pages: list[int] = []
        try:
            for handle in handles:
                self._unmap(handle)
                pages += self._mapped.pop(handle[2], ())
        finally:
            page_exchange.give(self._gpu, pages)


def trimmed_bytes() -> int:
    """What torch still counts as reserved, and vLLM's allocator has given back."""
    from vllm.device_allocator.cumem import CuMemAllocator  # noqa: PLC0415  # looks for CUDA

    allocator = CuMemAllocator.instance
    if allocator is None:
        return 0
    pools = [pool for entries in allocator.allocator_and_pools.values() for pool, _ in entries]
    return sum(
        int(segment["total_size"])
        for pool in pools
        for segment in pool.snapshot()
        if segment["address"] not in allocator.pointer_to_data
    )
