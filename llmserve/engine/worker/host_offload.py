"""Weights in pinned host memory, copied once: sleep is an unmap, and waking one copy back.

vLLM's own way (vllm/device_allocator/cumem.py) pins and copies anew at each sleep. Here
the copy of what does not change while a model serves, its parameters, is made ahead and
kept. All else that sleep has to keep (buffers, counters of kernels, LoRA stacks, what
belongs to the KV cache) may change at any step, so that is copied when nothing runs.
"""

from __future__ import annotations

import contextlib
import logging
import time
from bisect import bisect_left, bisect_right
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vllm.device_allocator import DEFERRABLE_TAGS
from vllm.device_allocator.sleep_mode_backend import SleepModeBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from concurrent.futures import Future

    from vllm.device_allocator import AllocationData, HandleType

# A child of vLLM's logger: in an engine's process no other reaches the log.
log = logging.getLogger("vllm.llmserve.hostcopy")

# What is pinned at once: a stream stalls meanwhile (benchmarks/sleep.py).
BUFFER_BYTES = 64 << 20
_KEPT = ("weights", "runtime", "cudagraph")  # as vLLM's own backend; the rest is scratch

Span = tuple[int, int]  # addresses: the first byte, and the one after the last


def merged(spans: Iterable[Span]) -> list[Span]:
    """In order and apart."""
    united: list[Span] = []
    for start, stop in sorted(spans):
        if united and start <= united[-1][1]:
            united[-1] = (united[-1][0], max(stop, united[-1][1]))
        else:
            united.append((start, stop))
    return united


def without(spans: Iterable[Span], holes: Sequence[Span]) -> list[Span]:
    """What of each span no hole covers; the holes are in order and apart."""
    left: list[Span] = []
    for first, stop in spans:
        start = first
        for i in range(bisect_right(holes, start, key=lambda hole: hole[1]), len(holes)):
            if holes[i][0] >= stop:
                break
            if holes[i][0] > start:
                left.append((start, holes[i][0]))
            start = min(holes[i][1], stop)
        if start < stop:
            left.append((start, stop))
    return left


class Piece(NamedTuple):
    """Bytes that lie together on the device and in one host buffer."""

    device: int
    size: int
    buffer: int
    offset: int


def pieces(spans: Iterable[Span], buffer_bytes: int) -> Iterator[Piece]:
    """The spans one after another in buffers of one size."""
    done = 0
    for first, stop in spans:
        start = first
        while start < stop:
            buffer, offset = divmod(done, buffer_bytes)
            size = min(stop - start, buffer_bytes - offset)
            yield Piece(start, size, buffer, offset)
            start += size
            done += size


class Buffer(Protocol):
    address: int

    def free(self) -> None: ...


class Memory(Protocol):
    """A device's memory as vLLM's allocator holds it, and the host's: `devicememory`."""

    @property
    def allocations(self) -> Mapping[int, AllocationData]:
        """By address."""
        ...

    def map(self, handles: Sequence[HandleType]) -> None:
        """All of them; the contents are anything but NaN. Raises RuntimeError and maps none."""
        ...

    def unmap(self, handles: Sequence[HandleType]) -> None: ...
    def pin(self, size: int) -> Buffer:
        """Raises MemoryError if the host cannot."""
        ...

    def copy(self, target: int, source: int, size: int) -> None:
        """Begin to copy; a host address is in one pinned buffer."""
        ...

    def copied(self) -> None:
        """Wait for all copies."""
        ...

    def settle(self) -> None:
        """Wait for all that this process has the device do."""
        ...

    def enter(self) -> None:
        """Let the calling thread use it."""
        ...


class Copy:
    """Spans of the device's memory on the host, in order and apart."""

    def __init__(self, memory: Memory, spans: Sequence[Span]) -> None:
        self.spans = spans
        self.size = sum(stop - start for start, stop in spans)
        self._memory = memory
        self._pieces = list(pieces(spans, BUFFER_BYTES))
        self._buffers: list[Buffer] = []

    def reserve(self) -> None:
        """Pin what is needed, which takes longer than to copy."""
        for piece in self._pieces:
            self._pin(piece)

    def _pin(self, piece: Piece) -> None:
        if piece.buffer == len(self._buffers):
            left = self.size - piece.buffer * BUFFER_BYTES
            self._buffers.append(self._memory.pin(min(left, BUFFER_BYTES)))

    def save(self) -> None:
        """From the device. The first time pins, buffer by buffer, so that others get turns."""
        try:
            for piece in self._pieces:
                self._pin(piece)
                self._memory.copy(self._host(piece), piece.device, piece.size)
        finally:
            self._memory.copied()

    def restore(self, start: int, stop: int) -> None:
        """Begin to copy back what lies between these addresses, which cut no span."""
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
    """How a worker sleeps.

    `parameters` gives the spans of what does not change while the model serves. Once they
    are `lost`, waking maps their memory and leaves it to the worker to read them again.
    """

    def __init__(self, memory: Memory, parameters: Callable[[], Iterable[Span]]) -> None:
        super().__init__()
        self.lost = False
        self._memory = memory
        self._parameters = parameters
        self._fixed: Future[Copy] | None = None  # the parameters
        self._loose: Copy | None = None  # the rest of what is kept
        self._thread = ThreadPoolExecutor(1, "host-copy")

    @classmethod
    def preserves_communicators(cls) -> bool:
        return True

    # --- ahead of time

    def adopt(self, tag: str) -> None:
        """Map what has no contents yet anew, so that its memory can change hands later."""
        self._memory.settle()  # it may still be being zeroed
        found = [data.handle for data in self._memory.allocations.values() if data.tag == tag]
        self._memory.unmap(found)
        self._memory.map(found)
        self._memory.copied()

    def prepare(self) -> None:
        """Begin to copy the parameters, which are on the device, while the model serves."""
        self._begun()

    def _begun(self) -> Future[Copy]:
        if self._fixed is None or (self._fixed.done() and self._fixed.exception()):
            self._memory.settle()
            fixed = self._unchanging()
            loose = self._room_for(without(self._kept(), fixed))
            self._fixed = self._thread.submit(self._saved, fixed, loose)
        return self._fixed

    def _room_for(self, spans: Sequence[Span]) -> Copy:
        """For the rest of what is kept: the same room as long as that lies where it lay."""
        if self._loose is None or self._loose.spans != spans:
            if self._loose is not None:
                self._loose.free()
            self._loose = Copy(self._memory, spans)
        return self._loose

    def prepared(self) -> bool:
        """Whether the copy is made. Raises what kept it from being made."""
        if self._fixed is None or not self._fixed.done():
            return False
        self._fixed.result()
        return True

    def _saved(self, fixed: Sequence[Span], loose: Copy) -> Copy:
        """The copy of what is fixed; the rest, which is copied at each sleep, gets its room."""
        began = time.monotonic()
        self._memory.enter()
        copy = Copy(self._memory, fixed)
        try:
            copy.save()
            loose.reserve()
        except BaseException:
            loose.free()
            copy.free()
            raise
        log.info("copied to the host: %s s=%.3f", _gib(copy.size), time.monotonic() - began)
        return copy

    def _kept(self) -> list[Span]:
        allocations = self._memory.allocations.values()
        return sorted(_span(data) for data in allocations if data.tag in _KEPT)

    def _unchanging(self) -> list[Span]:
        kept = self._kept()
        return without(kept, without(kept, merged(self._parameters())))

    # --- down

    def suspend(self, level: int = 1) -> None:
        """Give the device's memory back; at level 2 the parameters are lost.

        Nothing is running, and all that is kept is on the device. Raises MemoryError, and
        leaves it there, if the host has no room for it.
        """
        laps = _Laps()
        self._memory.settle()
        laps.lap("settle")
        fixed = self._begun().result().spans if level == 1 else self._spans_to_lose()
        laps.lap("parameters")
        loose = self._room_for(without(self._kept(), fixed))
        loose.save()
        laps.lap("rest")
        if level != 1:
            self._lose(fixed)
        # torch keeps what activations took: it is at hand when the model wakes.
        size = self._unmap(self._awake())
        self._state = "SUSPENDED"
        laps.lap("unmap")
        log.info("slept: level=%d freed=%s rest=%s %s", level, _gib(size), _gib(loose.size), laps)

    def _spans_to_lose(self) -> list[Span]:
        if self._fixed is not None:
            wait((self._fixed,))  # it pins the room of the rest
        return self._unchanging()

    def _lose(self, fixed: Sequence[Span]) -> None:
        made, self._fixed = self._fixed, None
        if made is not None and not made.exception():
            made.result().free()
        self.lost = bool(fixed)

    def forget(self) -> None:
        """From level 1 to level 2, asleep."""
        if self._fixed is not None:
            self._lose(self._fixed.result().spans)

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
        gone = list(allocations)
        self._memory.unmap([data.handle for data in gone])
        for data in gone:
            data.is_asleep = True
        return _size(gone)

    # --- up

    def resume(self, tags: list[str] | None = None) -> None:
        """Map what was given back, all or the tags, and fill it; `lost` parameters stay empty.

        Raises RuntimeError if the device has no room; what was asleep then still is.
        """
        laps = _Laps()
        self._state = "RESUMING"
        kept, scratch = self._asleep(tags)
        handles = [data.handle for data in (*scratch, *kept)]
        try:
            # Before any copy begins: beside one, it takes longer (docs/performance.md).
            self._memory.map(handles)
        except RuntimeError as error:
            self._state = "SUSPENDED"
            raise RuntimeError(_no_room(_size([*kept, *scratch]), error)) from error
        laps.lap("map")
        try:
            for data in kept:
                self._begin_to_fill(data)
            self._memory.copied()
        except BaseException:
            self._give_up(handles)
            raise
        laps.lap("copy")
        for data in (*kept, *scratch):
            data.is_asleep = False
        self._state = "RUNNING"
        log.info("woke: kept=%s scratch=%s %s", _gib(_size(kept)), _gib(_size(scratch)), laps)

    def _give_up(self, handles: Sequence[HandleType]) -> None:
        """Unmap what was mapped and not filled: it sleeps on, and nothing is mapped twice."""
        self._state = "SUSPENDED"
        with contextlib.suppress(Exception):  # copies that have begun end before their memory goes
            self._memory.copied()
        self._memory.unmap(handles)

    def _asleep(self, tags: list[str] | None) -> tuple[list[AllocationData], list[AllocationData]]:
        """Those to wake: what is kept, and what has no contents."""
        parts: tuple[list[AllocationData], list[AllocationData]] = ([], [])
        for data in self._memory.allocations.values():
            wanted = tags is None or data.tag in tags or data.tag not in DEFERRABLE_TAGS
            if data.is_asleep and wanted:
                parts[data.tag not in _KEPT].append(data)
        return parts

    def _begin_to_fill(self, data: AllocationData) -> None:
        if self._fixed is not None:
            self._fixed.result().restore(*_span(data))
        if self._loose is not None:
            self._loose.restore(*_span(data))


def _span(data: AllocationData) -> Span:
    _, size, start, _ = data.handle
    return start, start + size


def _size(allocations: Iterable[AllocationData]) -> int:
    return sum(data.handle[1] for data in allocations)


def _no_room(size: int, error: RuntimeError) -> str:
    return (
        f"waking needs {_gib(size)} of the GPU ({error}); it sleeps on: free GPU memory, then "
        "wake it again"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}GiB"


class _Laps:
    """Seconds of each part."""

    def __init__(self) -> None:
        self._at = time.monotonic()
        self._parts: list[str] = []

    def lap(self, part: str) -> None:
        now = time.monotonic()
        self._parts.append(f"{part}_s={now - self._at:.3f}")
        self._at = now

    def __str__(self) -> str:
        return " ".join(self._parts)
