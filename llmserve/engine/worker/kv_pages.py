"""An engine worker's memory on its GPU, at the addresses that vLLM's allocator reserved.

The KV cache consists of pages that can pass to another engine (`llmserve.gpus.page_exchange`).
In vLLM each allocation is one piece (csrc/cumem_allocator.cpp).
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
    """Pinned anonymous memory of the host.

    torch rounds its pinned memory up to a power of two and never frees it.
    """

    def __init__(self, cudart: Any, size: int) -> None:
        area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages; pinning takes longer
            area.madvise(mmap.MADV_HUGEPAGE)
        self._first = ctypes.c_char.from_buffer(area)  # keeps the area alive
        self._cudart = cudart
        self.address = ctypes.addressof(self._first)
        if error := cudart.cudaHostRegister(self.address, size):
            cudart.cudaGetLastError()  # clears the error, which the next kernel would report
            raise MemoryError(
                f"pinning {size / 2**30:.2f}GiB of host memory failed "
                f"({cudart.cudaGetErrorString(error)}); lower `host_memory`, or stop other "
                "programs that use host memory"
            )

    def free(self) -> None:
        if error := self._cudart.cudaHostUnregister(self.address):
            self._cudart.cudaGetLastError()  # as above
            reason = self._cudart.cudaGetErrorString(error)
            raise RuntimeError(f"unpinning host memory failed ({reason})")
        del self._first


class CudaMemory:
    """The calling process's memory on its current CUDA device.

    `exchanges_pages`: whether its KV cache may consist of pages.
    """

    def __init__(self, *, exchanges_pages: bool) -> None:
        from vllm.device_allocator import cumem  # noqa: PLC0415  # needs CUDA

        self.settle = torch.cuda.synchronize
        self._allocator = cumem.CuMemAllocator.get_instance()
        self._cudart = cumem.libcudart
        self._device = torch.cuda.current_device()
        self._stream = torch.cuda.Stream()
        pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        self._begin_copy = self._cudart.lib.cudaMemcpyAsync
        self._begin_copy.argtypes = [pointer, pointer, size, number, pointer]
        self._begin_clear = self._cudart.lib.cudaMemsetAsync
        self._begin_clear.argtypes = [pointer, number, size, pointer]
        gpu = f"GPU-{torch.cuda.get_device_properties(self._device).uuid}"
        self._pages = Pages(self._device, gpu, cumem.create_and_map, cumem.unmap_and_release)
        self._exchanges_pages = exchanges_pages

    @property
    def allocations(self) -> Mapping[int, AllocationData]:
        found: Mapping[int, AllocationData] = self._allocator.pointer_to_data
        return found

    def map(self, handles: Sequence[HandleType]) -> None:
        """Map all of them, with any contents but NaN. Raises RuntimeError and maps none."""
        imported = self._pages.map(handles, self._may_pass)
        try:
            for start, size in imported:
                # Another model's cache can contain NaN for this one.
                error = self._begin_clear(start, 0, size, self._stream.cuda_stream)
                self._cudart.CUDART_CHECK(error)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # memory stays mapped while it is cleared
                self.copied()
            self.unmap(handles)
            raise

    def unmap(self, handles: Sequence[HandleType]) -> None:
        self._pages.unmap(handles)

    def _may_pass(self, address: int) -> bool:
        """Whether memory may pass to other engines: none that vLLM frees, without its descriptors."""
        return self._exchanges_pages and self.allocations[address].tag == "kv_cache"

    def pin(self, size: int) -> Pinned:
        """Raises MemoryError."""
        return Pinned(self._cudart, size)

    def copy(self, target: int, source: int, size: int) -> None:
        """Begin a copy. The host's bytes are in one pinned buffer."""
        # cudaMemcpyDefault: the addresses determine which side is the host.
        error = self._begin_copy(target, source, size, 4, self._stream.cuda_stream)
        self._cudart.CUDART_CHECK(error)

    def copied(self) -> None:
        """Wait for all copies."""
        self._stream.synchronize()

    def enter(self) -> None:
        """Let the calling thread use the device."""
        torch.cuda.set_device(self._device)


class Pages:
    """Memory of a device, some of it mapped in pages of `page_exchange.PAGE_BYTES`.

    `create_and_map` and `unmap_and_release` are vLLM's, for one piece. A handle's last entry
    points to CUDA's handle of the memory, here that of the first page, so `unmap_and_release` is
    correct for both. The other pages' handles are released at once: mapped memory stays.
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
        """Map all handles or none; return address and size of memory from other engines' pages.

        `may_pass` is called with an address: whether its memory may pass to another engine.
        Raises RuntimeError.
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
        """Map one handle; return how many of its first bytes are pages of other engines."""
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
        """Return a handle of one of the pages taken, and move its descriptor to `pages`."""
        while taken:
            with contextlib.suppress(RuntimeError):  # the page no longer exists
                page = self._driver.of(taken[-1])
                pages.append(taken.pop())
                return page
            os.close(taken.pop())
        return None

    def _created(self, length: int, pages: list[int]) -> int:
        """Return a handle of new memory; a whole page's descriptor is added to `pages`."""
        if length < PAGE_BYTES:
            return self._driver.create(length, shared=False)
        page = self._driver.create(length, shared=True)
        with contextlib.suppress(RuntimeError):  # then the page cannot pass to another engine
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
    """Return the bytes that torch counts as reserved and vLLM's allocator has freed."""
    from vllm.device_allocator.cumem import CuMemAllocator  # noqa: PLC0415  # needs CUDA

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
