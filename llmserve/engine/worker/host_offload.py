"""Weights in pinned host memory, copied once: a sleep is an unmap, and a wake is one copy.

vLLM (vllm/device_allocator/cumem.py) pins and copies at each sleep. Here the parameters, which do
not change while a model serves, are copied while it serves, and the copy is kept. Other memory
that sleep must keep (buffers, counters of kernels, LoRA stacks, metadata of the KV cache) may
change at any step, so each sleep copies it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from bisect import bisect_left, bisect_right
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, NamedTuple

from vllm.device_allocator import DEFERRABLE_TAGS
from vllm.device_allocator.sleep_mode_backend import SleepModeBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future

    from vllm.device_allocator import AllocationData, HandleType

    from llmserve.engine.worker.kv_pages import CudaMemory, Pinned

# A child of vLLM's logger: only these reach the log of an engine's process.
log = logging.getLogger("vllm.llmserve.host_offload")

# Pinned at once, while streams stall (benchmarks/sleep.py).
BUFFER_BYTES = 64 << 20
_KEPT = ("weights", "runtime", "cudagraph")  # as in vLLM's own backend; the rest is scratch

Span = tuple[int, int]  # addresses: the first byte, and the one after the last


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return the spans sorted and disjoint."""
    united: list[Span] = []
    for start, stop in sorted(spans):
        if united and start <= united[-1][1]:
            united[-1] = (united[-1][0], max(stop, united[-1][1]))
        else:
            united.append((start, stop))
    return united


def without(spans: Iterable[Span], holes: Sequence[Span]) -> list[Span]:
    """Return the parts of the spans outside the holes, which are sorted and disjoint."""
    rest: list[Span] = []
    for first, stop in spans:
        start = first
        for i in range(bisect_right(holes, start, key=lambda hole: hole[1]), len(holes)):
            if holes[i][0] >= stop:
                break
            if holes[i][0] > start:
                rest.append((start, holes[i][0]))
            start = min(holes[i][1], stop)
        if start < stop:
            rest.append((start, stop))
    return rest


class Piece(NamedTuple):
    """Bytes that are contiguous on the device and in one host buffer."""

    device: int
    size: int
    buffer: int
    offset: int


def pieces(spans: Iterable[Span], buffer_bytes: int) -> Iterator[Piece]:
    """Yield the spans, one after another, as pieces of buffers of one size."""
    done = 0
    for first, stop in spans:
        start = first
        while start < stop:
            buffer, offset = divmod(done, buffer_bytes)
            size = min(stop - start, buffer_bytes - offset)
            yield Piece(start, size, buffer, offset)
            start += size
            done += size


class Copy:
    """Copies of spans of device memory on the host; the spans are sorted and disjoint."""

    def __init__(self, memory: CudaMemory, spans: Sequence[Span]) -> None:
        self.spans = spans
        self.size = sum(stop - start for start, stop in spans)
        self._memory = memory
        self._pieces = list(pieces(spans, BUFFER_BYTES))
        self._buffers: list[Pinned] = []

    def reserve(self) -> None:
        """Pin the host memory, which takes longer than the copy."""
        for piece in self._pieces:
            self._pin(piece)

    def _pin(self, piece: Piece) -> None:
        if piece.buffer == len(self._buffers):
            unpinned = self.size - piece.buffer * BUFFER_BYTES
            self._buffers.append(self._memory.pin(min(unpinned, BUFFER_BYTES)))

    def save(self) -> None:
        """Copy from the device. The first call pins buffer by buffer: steps run in between."""
        try:
            for piece in self._pieces:
                self._pin(piece)
                self._memory.copy(self._host(piece), piece.device, piece.size)
        finally:
            self._memory.copied()

    def restore(self, start: int, stop: int) -> None:
        """Begin to copy back all spans between two addresses, which are not inside a span."""
        at = bisect_left(self._pieces, start, key=lambda piece: piece.device)
        end = bisect_left(self._pieces, stop, key=lambda piece: piece.device)
        for piece in self._pieces[at:end]:
            self._memory.copy(piece.device, self._host(piece), piece.size)

    def _host(self, piece: Piece) -> int:
        return self._buffers[piece.buffer].address + piece.offset

    def free(self) -> None:
        while self._buffers:
            self._buffers.pop().free()


class HostCopies(SleepModeBackend):
    """Puts a worker to sleep and wakes it.

    `parameters` yields the spans that do not change while the model serves. If they are `lost`, a
    wake maps their memory, and the worker must reload them.
    """

    def __init__(self, memory: CudaMemory, parameters: Callable[[], Iterable[Span]]) -> None:
        super().__init__()
        self.lost = False
        self._memory = memory
        self._parameters = parameters
        self._parameter_copy: Future[Copy] | None = None
        self._changing_copy: Copy | None = None  # other memory that is kept
        self._thread = ThreadPoolExecutor(1, "host-copy")

    @classmethod
    def preserves_communicators(cls) -> bool:
        return True

    # --- ahead of time

    def remap(self, tag: str) -> None:
        """Map memory without contents again, as pages that other engines can receive."""
        self._memory.settle()  # the device may still be zeroing it
        found = [data.handle for data in self._memory.allocations.values() if data.tag == tag]
        self._memory.unmap(found)
        self._memory.map(found)
        self._memory.copied()

    def prepare(self) -> None:
        """Begin to copy the parameters, which are on the device, while the model serves."""
        self._start_copy()

    def _start_copy(self) -> Future[Copy]:
        copy = self._parameter_copy
        if copy is None or (copy.done() and copy.exception()):
            self._memory.settle()
            parameters = self._parameter_spans()
            changing = self._changing_copy_of(without(self._kept(), parameters))
            copy = self._parameter_copy = self._thread.submit(self._copied, parameters, changing)
        return copy

    def _changing_copy_of(self, spans: Sequence[Span]) -> Copy:
        """Return the copy for changing memory; its buffers are reused while the spans are equal."""
        if self._changing_copy is None or self._changing_copy.spans != spans:
            if self._changing_copy is not None:
                self._changing_copy.free()
            self._changing_copy = Copy(self._memory, spans)
        return self._changing_copy

    def prepared(self) -> bool:
        """Whether the copy of the parameters is complete. Raises the exception of its thread."""
        if self._parameter_copy is None or not self._parameter_copy.done():
            return False
        self._parameter_copy.result()
        return True

    def _copied(self, parameters: Sequence[Span], changing: Copy) -> Copy:
        """Return a copy of the parameters, and reserve the memory for `changing`."""
        began = time.monotonic()
        self._memory.enter()
        copy = Copy(self._memory, parameters)
        try:
            copy.save()
            changing.reserve()
        except BaseException:
            changing.free()
            copy.free()
            raise
        log.info("copied to host: bytes=%s s=%.3f", _gib(copy.size), time.monotonic() - began)
        return copy

    def _kept(self) -> list[Span]:
        allocations = self._memory.allocations.values()
        return sorted(_span(data) for data in allocations if data.tag in _KEPT)

    def _parameter_spans(self) -> list[Span]:
        kept = self._kept()
        return without(kept, without(kept, merged(self._parameters())))

    # --- down

    def suspend(self, level: int = 1) -> None:
        """Free the device's memory; at level 2 the parameters are lost.

        No step may run, and all kept memory must be on the device. Raises MemoryError if the host
        has too little memory; then the device's memory is unchanged.
        """
        laps = _Laps()
        self._memory.settle()
        laps.lap("settle")
        parameters = self._start_copy().result().spans if level == 1 else self._spans_to_lose()
        laps.lap("parameters")
        changing = self._changing_copy_of(without(self._kept(), parameters))
        changing.save()
        laps.lap("rest")
        if level != 1:
            self._lose(parameters)
        # torch keeps the memory of activations, which the model needs after its wake.
        size = self._unmap(self._awake())
        self._state = "SUSPENDED"
        laps.lap("unmap")
        log.info(
            "slept: level=%d freed=%s rest=%s %s", level, _gib(size), _gib(changing.size), laps
        )

    def _spans_to_lose(self) -> list[Span]:
        if self._parameter_copy is not None:
            wait((self._parameter_copy,))  # its thread pins memory
        return self._parameter_spans()

    def _lose(self, parameters: Sequence[Span]) -> None:
        copy, self._parameter_copy = self._parameter_copy, None
        if copy is not None and not copy.exception():
            copy.result().free()
        self.lost = bool(parameters)

    def forget(self) -> None:
        """Lower a sleeping worker from level 1 to level 2."""
        if self._parameter_copy is not None:
            self._lose(self._parameter_copy.result().spans)

    def discard(self, tags: tuple[str, ...]) -> None:
        laps = _Laps()
        self._memory.settle()
        laps.lap("settle")
        size = self._unmap([data for data in self._awake() if data.tag in tags])
        self._state = "SUSPENDED"
        laps.lap("unmap")
        log.info("discarded: tags=%s freed=%s %s", ",".join(tags), _gib(size), laps)

    def _awake(self) -> list[AllocationData]:
        return [data for data in self._memory.allocations.values() if not data.is_asleep]

    def _unmap(self, allocations: Iterable[AllocationData]) -> int:
        unmapped = list(allocations)
        self._memory.unmap([data.handle for data in unmapped])
        for data in unmapped:
            data.is_asleep = True
        return _size(unmapped)

    # --- up

    def resume(self, tags: list[str] | None = None) -> None:
        """Map and fill the freed memory, all or that of `tags`; `lost` parameters stay empty.

        Raises RuntimeError if the device has too little memory; the worker then stays asleep.
        """
        laps = _Laps()
        self._state = "RESUMING"
        kept, scratch = self._asleep(tags)
        handles = [data.handle for data in (*scratch, *kept)]
        try:
            # Before the copies: during a copy, mapping takes longer (docs/performance.md).
            self._memory.map(handles)
        except RuntimeError as error:
            self._state = "SUSPENDED"
            raise RuntimeError(_out_of_memory(_size([*kept, *scratch]), error)) from error
        laps.lap("map")
        try:
            for data in kept:
                self._begin_restore(data)
            self._memory.copied()
        except BaseException:
            self._roll_back(handles)
            raise
        laps.lap("copy")
        for data in (*kept, *scratch):
            data.is_asleep = False
        self._state = "RUNNING"
        log.info("woke: kept=%s scratch=%s %s", _gib(_size(kept)), _gib(_size(scratch)), laps)

    def _roll_back(self, handles: Sequence[HandleType]) -> None:
        """Unmap memory that was mapped and not filled: a later wake maps it again."""
        self._state = "SUSPENDED"
        with contextlib.suppress(Exception):  # copies end before their memory is unmapped
            self._memory.copied()
        self._memory.unmap(handles)

    def _asleep(self, tags: list[str] | None) -> tuple[list[AllocationData], list[AllocationData]]:
        """Return the allocations to wake: kept ones, and those without contents."""
        parts: tuple[list[AllocationData], list[AllocationData]] = ([], [])
        for data in self._memory.allocations.values():
            wanted = tags is None or data.tag in tags or data.tag not in DEFERRABLE_TAGS
            if data.is_asleep and wanted:
                parts[data.tag not in _KEPT].append(data)
        return parts

    def _begin_restore(self, data: AllocationData) -> None:
        if self._parameter_copy is not None:
            self._parameter_copy.result().restore(*_span(data))
        if self._changing_copy is not None:
            self._changing_copy.restore(*_span(data))


def _span(data: AllocationData) -> Span:
    _, size, start, _ = data.handle
    return start, start + size


def _size(allocations: Iterable[AllocationData]) -> int:
    return sum(data.handle[1] for data in allocations)


def _out_of_memory(size: int, error: RuntimeError) -> str:
    return (
        f"too little GPU memory to wake: {_gib(size)} needed ({error}); the model stays asleep; "
        "free GPU memory and wake it again"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}GiB"


class _Laps:
    """Seconds of each part, for the log."""

    def __init__(self) -> None:
        self._at = time.monotonic()
        self._parts: list[str] = []

    def lap(self, part: str) -> None:
        now = time.monotonic()
        self._parts.append(f"{part}_s={now - self._at:.3f}")
        self._at = now

    def __str__(self) -> str:
        return " ".join(self._parts)
