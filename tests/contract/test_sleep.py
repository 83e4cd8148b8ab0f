"""Sleep without a GPU: `llmserve.engine.worker.host_offload` on memory that is made up, and vLLM's names that it needs."""

from __future__ import annotations

import ctypes
import inspect
import itertools
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import ParallelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.device_allocator import DEFERRABLE_TAGS, AllocationData, cumem
from vllm.device_allocator.cumem import CuMemAllocator
from vllm.device_allocator.sleep_mode_backend import SleepModeBackend
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.worker.gpu_worker import Worker

from llmserve.engine.engine import Engine
from llmserve.engine.engine_arguments import engine_arguments
from llmserve.engine.metrics import EngineMetrics
from llmserve.engine.parent_watch import ParentWatch
from llmserve.engine.worker.gpu_worker import GpuWorker
from llmserve.engine.worker.host_offload import HostCopies, merged, pieces, without
from llmserve.engine.worker.kv_pages import Pinned, trimmed_bytes
from llmserve.errors import EngineError
from llmserve.lifecycle.placement import Level
from tests.contract.support import class_of, parameters, source, spec

if TYPE_CHECKING:
    from collections.abc import Mapping


HOST = 1 << 40  # host addresses lie above
MIB = 1 << 20


# --- arithmetic of spans


def bytes_of(spans: Any) -> list[int]:
    return [byte for start, stop in spans for byte in range(start, stop)]


SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=8).map(
    lambda drawn: [(start, start + size) for start, size in drawn]
)


@settings(deadline=None)
@given(spans=SPANS)
def test_merged_spans_cover_the_same_in_order_and_apart(spans: list[tuple[int, int]]) -> None:
    united = merged(spans)
    assert bytes_of(united) == sorted(set(bytes_of(spans)))
    assert all(one[1] < next_[0] for one, next_ in itertools.pairwise(united))


@settings(deadline=None)
@given(spans=SPANS, holes=SPANS)
def test_what_is_left_without_holes(
    spans: list[tuple[int, int]], holes: list[tuple[int, int]]
) -> None:
    left = without(merged(spans), merged(holes))
    assert bytes_of(left) == sorted(set(bytes_of(spans)) - set(bytes_of(holes)))


def test_spans_that_touch_stay_two() -> None:
    """They are two allocations: no copy may reach over both."""
    assert without([(0, 4), (4, 8)], [(2, 3)]) == [(0, 2), (3, 4), (4, 8)]


@settings(deadline=None)
@given(spans=SPANS, size=st.integers(1, 20))
def test_pieces_fill_one_buffer_after_another(spans: list[tuple[int, int]], size: int) -> None:
    apart = merged(spans)
    cut = list(pieces(apart, size))
    assert bytes_of((piece.device, piece.device + piece.size) for piece in cut) == bytes_of(apart)
    placed = [piece.buffer * size + piece.offset for piece in cut]
    ends = [at + piece.size for at, piece in zip(placed, cut, strict=True)]
    assert [0, *ends[:-1]] == placed or not cut
    assert all(0 < piece.size <= size - piece.offset for piece in cut)


# --- a worker's memory, made up


class Buffer:
    def __init__(self, memory: Memory, size: int) -> None:
        self.address = max((HOST, *(at + len(own) for at, own in memory.pinned.items()))) + MIB
        self._memory = memory
        memory.pinned[self.address] = bytearray(size)

    def free(self) -> None:
        del self._memory.pinned[self.address]


class Memory:
    """Copies are done when they are waited for; what is not mapped cannot be touched."""

    def __init__(self, **sizes: int) -> None:
        self.found: dict[int, AllocationData] = {}
        self.mapped: dict[int, bytearray] = {}
        self.pinned: dict[int, bytearray] = {}
        self.host_bytes = self.device_bytes = 1 << 30
        self.copied_bytes = 0
        self.threads: set[str] = set()
        self._begun: list[tuple[int, int, int]] = []
        for at, (tag, size) in enumerate(sizes.items(), start=1):
            handle = (0, size, at * MIB, at)
            self.found[at * MIB] = AllocationData(handle, tag)
            self.mapped[at * MIB] = bytearray([at]) * size

    @property
    def allocations(self) -> Mapping[int, AllocationData]:
        return self.found

    def at(self, tag: str) -> int:
        return next(address for address, data in self.found.items() if data.tag == tag)

    def write(self, address: int, contents: bytes) -> None:
        area, offset = self._area(address)
        area[offset : offset + len(contents)] = contents

    def read(self, address: int, size: int) -> bytes:
        area, offset = self._area(address)
        assert offset + size <= len(area)
        return bytes(area[offset : offset + size])

    def _area(self, address: int) -> tuple[bytearray, int]:
        for areas in (self.mapped, self.pinned):
            for start, area in areas.items():
                if start <= address < start + len(area):
                    return area, address - start
        raise AssertionError(f"{address:#x} is neither mapped nor pinned")

    def map(self, handles: Any) -> None:
        assert not self._begun
        mapped = {address: bytearray(b"\xee") * size for _, size, address, _ in handles}
        assert not self.mapped.keys() & mapped.keys()
        if sum(map(len, (*self.mapped.values(), *mapped.values()))) > self.device_bytes:
            raise RuntimeError("CUDA: out of memory from cuMemCreate")
        self.mapped |= mapped

    def unmap(self, handles: Any) -> None:
        assert not self._begun
        for _, _, address, _ in handles:
            del self.mapped[address]

    def pin(self, size: int) -> Buffer:
        if sum(map(len, self.pinned.values())) + size > self.host_bytes:
            raise MemoryError("the host is full")
        return Buffer(self, size)

    def copy(self, target: int, source: int, size: int) -> None:
        assert (target < HOST) != (source < HOST)
        self._begun.append((target, source, size))
        self.threads.add(threading.current_thread().name)

    def copied(self) -> None:
        while self._begun:
            target, source, size = self._begun.pop(0)
            self.write(target, self.read(source, size))
            self.copied_bytes += size

    def settle(self) -> None:
        self.copied()

    def enter(self) -> None:
        self.threads.add(threading.current_thread().name)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    monkeypatch.setattr("llmserve.engine.worker.host_offload.BUFFER_BYTES", 64)
    return Memory(weights=1000, kv_cache=2000, runtime=30, workspace=500, default=70)


@pytest.fixture
def copies(memory: Any) -> HostCopies:
    """Of a model with parameters in all its weights' memory but 100 bytes in the middle."""
    start = memory.at("weights")
    # The last is elsewhere: weights that vLLM leaves on the host.
    spans = [(start + 500, start + 1000), (start, start + 400), (HOST, HOST + 9)]
    return HostCopies(memory, lambda: spans)


def contents(memory: Memory, *tags: str) -> list[bytes]:
    return [memory.read(memory.at(tag), len(memory.mapped[memory.at(tag)])) for tag in tags]


def prepared(copies: HostCopies) -> None:
    copies.prepare()
    while not copies.prepared():
        threading.Event().wait(0.001)


@pytest.mark.parametrize("fails", ["copy", "copied"])
@pytest.mark.parametrize("good", [0, 1, 2])
def test_a_wake_whose_copy_fails_leaves_nothing_mapped(
    memory: Memory, copies: HostCopies, monkeypatch: pytest.MonkeyPatch, fails: str, good: int
) -> None:
    """So that it sleeps on, and each later wake maps over nothing."""
    before = contents(memory, "weights", "runtime")
    copies.suspend()
    assert not memory.mapped
    real, calls = getattr(memory, fails), itertools.count()

    def failing(*arguments: Any) -> None:
        if next(calls) == good:
            raise RuntimeError("CUDART error: 700")
        real(*arguments)

    monkeypatch.setattr(memory, fails, failing)
    if fails == "copy" or good == 0:
        with pytest.raises(RuntimeError, match="700"):
            copies.resume()
        assert not memory.mapped
        assert all(data.is_asleep for data in memory.found.values())
        monkeypatch.undo()
        monkeypatch.setattr("llmserve.engine.worker.host_offload.BUFFER_BYTES", 64)
    copies.resume()
    assert contents(memory, "weights", "runtime") == before


def test_resume_restores_kept_memory(memory: Memory, copies: HostCopies) -> None:
    weights = bytes(range(250)) * 4
    memory.write(memory.at("weights"), weights)
    for _ in range(2):
        copies.suspend(1)
        assert not memory.mapped
        assert all(data.is_asleep for data in memory.found.values())
        assert copies.state() == "SUSPENDED"
        copies.resume()
        assert contents(memory, "weights", "runtime") == [weights, b"\x03" * 30]
        assert contents(memory, "kv_cache")[0] == b"\xee" * 2000  # whatever was there
        assert not any(data.is_asleep for data in memory.found.values())
        assert copies.state() == "RUNNING"


def test_suspend_copies_parameters_once_and_the_rest_again(
    memory: Memory, copies: HostCopies
) -> None:
    prepared(copies)
    assert memory.copied_bytes == 900
    counter = memory.at("weights") + 450
    for value in (b"\x07", b"\x08"):
        memory.write(counter, value)
        before = memory.copied_bytes
        copies.suspend(1)
        assert memory.copied_bytes - before == 100 + 30
        copies.resume()
        assert memory.read(counter, 1) == value


def test_preparing_is_done_elsewhere_and_once(memory: Memory, copies: HostCopies) -> None:
    assert copies.prepared() is False
    prepared(copies)
    copies.prepare()
    assert copies.prepared()
    assert memory.copied_bytes == 900
    # Also room for what changes, 130 bytes, which is copied at each sleep.
    assert sum(map(len, memory.pinned.values())) == 900 + 130
    assert {name[:9] for name in memory.threads} == {"host-copy"}


def test_suspend_without_constant_parameters_copies_all(memory: Any) -> None:
    copies = HostCopies(memory, lambda: ())
    prepared(copies)
    assert not memory.copied_bytes
    for value in (b"\x07", b"\x08"):
        memory.write(memory.at("weights"), value * 1000)
        copies.suspend(1)
        copies.resume()
        assert contents(memory, "weights") == [value * 1000]
    copies.suspend(2)
    assert not copies.lost
    copies.resume()
    assert contents(memory, "weights") == [b"\x08" * 1000]


@pytest.mark.parametrize("by_way_of_the_host", [True, False])
def test_at_level_2_parameters_alone_are_lost(
    memory: Memory, copies: HostCopies, *, by_way_of_the_host: bool
) -> None:
    prepared(copies)
    if by_way_of_the_host:
        copies.suspend(1)
        copies.forget()
    else:
        copies.suspend(2)
    assert copies.lost
    assert sum(map(len, memory.pinned.values())) == 100 + 30
    copies.resume(["weights"])
    (weights,) = contents(memory, "weights")
    assert weights == b"\xee" * 400 + b"\x01" * 100 + b"\xee" * 500
    # Read again by the worker, they are copied anew.
    memory.write(memory.at("weights"), b"\x05" * 400)
    memory.write(memory.at("weights") + 500, b"\x05" * 500)
    copies.lost = False
    copies.resume()
    prepared(copies)
    copies.suspend(1)
    copies.resume()
    assert contents(memory, "weights") == [b"\x05" * 400 + b"\x01" * 100 + b"\x05" * 500]
    assert sum(map(len, memory.pinned.values())) == 900 + 130  # nothing twice


def test_at_level_2_what_is_being_copied_is_waited_for(
    memory: Memory, copies: HostCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its thread pins the rest a second time, and that is what comes back: nothing."""
    pin, goes_on = memory.pin, threading.Event()

    def slow(size: int) -> Buffer:
        fixed_is_pinned = sum(map(len, memory.pinned.values())) >= 900
        if threading.current_thread().name.startswith("host-copy") and fixed_is_pinned:
            goes_on.wait(60)
        return pin(size)

    monkeypatch.setattr(memory, "pin", slow)
    copies.prepare()
    threading.Timer(0.05, goes_on.set).start()
    copies.suspend(2)
    assert goes_on.is_set()
    assert sum(map(len, memory.pinned.values())) == 130
    copies.resume()
    (weights,) = contents(memory, "weights")
    assert weights == b"\xee" * 400 + b"\x01" * 100 + b"\xee" * 500


def test_the_kv_cache_alone(memory: Memory, copies: HostCopies) -> None:
    copies.discard(("kv_cache",))
    assert memory.mapped.keys() == memory.found.keys() - {memory.at("kv_cache")}
    copies.resume()
    assert memory.mapped.keys() == memory.found.keys()
    assert contents(memory, "weights", "workspace") == [b"\x01" * 1000, b"\x04" * 500]


def test_remap_maps_memory_again(memory: Memory, copies: HostCopies) -> None:
    copies.remap("kv_cache")
    assert memory.mapped.keys() == memory.found.keys()
    assert contents(memory, "kv_cache", "weights") == [b"\xee" * 2000, b"\x01" * 1000]


def test_from_no_kv_cache_to_no_weights(memory: Memory, copies: HostCopies) -> None:
    copies.discard(("kv_cache",))
    copies.suspend(1)
    assert not memory.mapped
    copies.resume()
    assert contents(memory, "weights") == [b"\x01" * 1000]


def test_a_tag_comes_with_all_that_cannot_be_deferred(memory: Memory, copies: HostCopies) -> None:
    copies.suspend(1)
    copies.resume(["weights"])
    assert memory.mapped.keys() == memory.found.keys() - {memory.at("kv_cache")}
    copies.resume(["kv_cache"])
    assert contents(memory, "weights", "runtime") == [b"\x01" * 1000, b"\x03" * 30]


@pytest.mark.parametrize("room", [100, 1500])
def test_without_room_on_the_gpu_it_sleeps_on(
    memory: Memory, copies: HostCopies, room: int
) -> None:
    copies.suspend(1)
    memory.device_bytes = room
    with pytest.raises(RuntimeError, match="free GPU memory") as raised:
        copies.resume()
    assert "out of memory" in str(raised.value)
    assert not memory.mapped
    assert copies.state() == "SUSPENDED"
    memory.device_bytes = 1 << 30
    copies.resume()
    assert contents(memory, "weights", "runtime") == [b"\x01" * 1000, b"\x03" * 30]


@pytest.mark.parametrize("room", [500, 950], ids=["for no parameters", "for these alone"])
def test_without_room_on_the_host_it_stays_awake(
    memory: Memory, copies: HostCopies, room: int
) -> None:
    memory.host_bytes = room
    with pytest.raises(MemoryError, match="the host is full"):
        copies.suspend(1)
    assert memory.mapped.keys() == memory.found.keys()
    memory.host_bytes = 1 << 30
    copies.suspend(1)
    copies.resume()
    assert contents(memory, "weights", "runtime") == [b"\x01" * 1000, b"\x03" * 30]


def test_prepare_without_host_memory_raises_and_pins_nothing(
    memory: Memory, copies: HostCopies
) -> None:
    memory.host_bytes = 500
    with pytest.raises(MemoryError, match="the host is full"):
        prepared(copies)
    assert not memory.pinned
    memory.host_bytes = 1 << 30
    prepared(copies)
    assert len(memory.pinned) == -(-900 // 64) + -(-130 // 64)


# --- pinned memory


class Cudart:
    """Registers host memory if it may."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.registered: list[int] = []
        self.drained = 0

    def cudaHostRegister(self, address: int, size: int) -> int:  # noqa: N802  # CUDA's names
        assert size == 5000
        self.registered.append(address)
        return self.code

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.registered.remove(address)
        return self.code

    def cudaGetLastError(self) -> int:  # noqa: N802
        self.drained += 1
        return self.code

    def cudaGetErrorString(self, code: int) -> str:  # noqa: N802
        return f"error {code}"


def test_pinned_memory_can_be_written_and_goes_back() -> None:
    cudart = Cudart()
    pinned = Pinned(cudart, 5000)
    ctypes.memset(pinned.address, 7, 5000)
    assert ctypes.string_at(pinned.address, 5000) == b"\x07" * 5000
    assert cudart.registered == [pinned.address]
    pinned.free()
    assert not cudart.registered


def test_pinned_memory_unpinning_error_is_raised() -> None:
    cudart = Cudart()
    pinned = Pinned(cudart, 5000)
    cudart.code = 1
    with pytest.raises(RuntimeError, match=r"unpinning host memory failed \(error 1\)"):
        pinned.free()
    assert cudart.drained == 1


def test_pinned_memory_error_names_host_memory() -> None:
    cudart = Cudart(code=2)
    with pytest.raises(MemoryError, match=r"host memory failed \(error 2\); lower `host_memory`"):
        Pinned(cudart, 5000)
    assert cudart.drained == 1


# --- what of vLLM's the copies build on


def test_the_allocator_is_as_it_was() -> None:
    assert DEFERRABLE_TAGS == ("weights", "kv_cache")
    assert cumem.CuMemAllocator.instance is None
    assert "libcudart = CudaRTLibrary()" in source("device_allocator/cumem.py")


def test_handles_are_as_they_were() -> None:
    comment = "# py_device, py_size_or_aligned_size, py_ptr, py_handle"
    assert comment in source("device_allocator/__init__.py")


def test_a_backend_is_asked_the_same() -> None:
    for name in ("suspend", "resume", "discard"):
        ours, theirs = getattr(HostCopies, name), getattr(SleepModeBackend, name)
        assert parameters(ours) == parameters(theirs)
    assert not inspect.isabstract(HostCopies)


def test_without_an_allocator_nothing_was_trimmed() -> None:
    assert trimmed_bytes() == 0


def test_segments_given_back_behind_torch_s_back_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def pool(*addresses: int) -> Any:
        segments = [{"address": at, "total_size": at * 10, "allocated_size": 0} for at in addresses]
        return SimpleNamespace(snapshot=lambda: segments), object()

    allocator = CuMemAllocator()
    allocator.pointer_to_data = {1: None, 2: None}
    allocator.allocator_and_pools = {"weights": [pool(1, 3), pool(4)], "kv_cache": [pool(2)]}
    monkeypatch.setattr(CuMemAllocator, "instance", allocator)
    assert trimmed_bytes() == 70


# --- the worker


class Backend:
    lost = False

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def suspend(self, level: int) -> None:
        self.asked.append(level)
        self.lost = level == 2

    def resume(self, tags: list[str] | None) -> None:
        self.asked.append(tags)

    def forget(self) -> None:
        self.asked.append("forget")
        self.lost = True


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ours, of an engine that can sleep, with vLLM's `wake_up`."""
    monkeypatch.setattr(Worker, "__init__", lambda _: None)
    monkeypatch.setattr(Worker, "synchronize_device", lambda _: None)
    monkeypatch.setattr(
        Worker, "reload_weights", lambda own: own.sleep_mode_backend.asked.append("reload")
    )
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    made: Any = GpuWorker()
    made._sleep_mode_backend = Backend()
    made._sleep_saved_buffers = made._sleep_saved_draft_buffers = {}
    made._sleep_saved_parameters = {}
    made.model_config = SimpleNamespace(
        enable_sleep_mode=True,
        enable_nccl_comm_suspend=False,
        quantization=None,
        is_moe=False,
        is_hybrid=False,
        use_mla=False,
        is_multimodal_model=False,
        runner_type="generate",
    )
    made.vllm_config = SimpleNamespace(
        model_config=made.model_config,
        cache_config=SimpleNamespace(cache_dtype="auto"),
        lora_config=None,
        speculative_config=None,
        parallel_config=SimpleNamespace(enable_eplb=False),
        weight_transfer_config=None,
    )
    made.load_config = LoadConfig()
    return made


def test_no_engine_argument_names_a_backend() -> None:
    """Else ours could be registered and named, instead of the worker's property."""
    assert not hasattr(AsyncEngineArgs, "sleep_mode_backend")


def test_weights_are_read_again_only_when_they_are_lost(worker: Any) -> None:
    asked = worker.sleep_mode_backend.asked
    worker.sleep(1)
    worker.wake_up()
    assert asked == [1, None]
    worker.sleep(2)
    worker.wake_up(["weights"])
    worker.wake_up()
    assert asked[2:] == [2, ["weights"], "reload", None]
    worker.sleep(1)
    worker.forget_copies()
    worker.wake_up(["kv_cache"])
    worker.wake_up(["weights"])
    assert asked[6:] == [1, "forget", ["kv_cache"], ["weights"], "reload"]


def test_sleep_with_dummy_weights_refuses_level_2(worker: Any) -> None:
    worker.load_config = LoadConfig(load_format="dummy")
    for lose in (lambda: worker.sleep(2), worker.forget_copies):
        with pytest.raises(ValueError, match="load_format dummy cannot be reloaded"):
            lose()
    assert worker.sleep_mode_backend.asked == []


@pytest.mark.parametrize(
    ("owner", "name", "value", "feature"),
    [
        ("vllm_config", "lora_config", object(), "adapters"),
        ("vllm_config", "speculative_config", object(), "speculative decoding"),
        ("model_config", "quantization", "fp8", "quantized weights"),
        ("model_config", "is_moe", True, "experts"),
        ("model_config", "is_hybrid", True, "layers without attention"),
        ("model_config", "use_mla", True, "latent attention"),
        ("model_config", "is_multimodal_model", True, "other inputs than text"),
        ("model_config", "runner_type", "pooling", "runner pooling"),
        ("cache_config", "cache_dtype", "fp8", "a KV cache of type fp8"),
    ],
)
def test_sleep_of_unsupported_model_refuses_level_2(
    worker: Any, owner: str, name: str, value: object, feature: str
) -> None:
    cache = worker.vllm_config.cache_config
    of = cache if owner == "cache_config" else getattr(worker, owner)
    setattr(of, name, value)
    for lose in (lambda: worker.sleep(2), worker.forget_copies):
        with pytest.raises(ValueError, match=f"with {feature} cannot be reloaded"):
            lose()
    assert worker.sleep_mode_backend.asked == []
    worker.sleep(1)  # in host memory it may


def test_model_config_has_the_flags_that_reload_reads() -> None:
    config = engine_arguments(spec()).create_engine_config()
    model = config.model_config
    assert (model.quantization, model.is_moe, model.is_hybrid, model.use_mla) == (
        (None,) + (False,) * 3
    )
    assert (model.is_multimodal_model, model.runner_type) == (False, "generate")
    assert config.cache_config.cache_dtype == "auto"
    assert config.lora_config is config.speculative_config is None


def test_vllm_loaders_that_reload_have_get_all_weights() -> None:
    assert hasattr(DefaultModelLoader, "get_all_weights")
    for file in ("v1/worker/gpu_model_runner.py", "v1/worker/gpu/model_runner.py"):
        arguments = class_of(file, "GPUModelRunner")["reload_weights"].args
        assert len(arguments.defaults) == len(arguments.args) - 1


def test_parameters_are_those_of_the_model_within_their_storage(worker: Any) -> None:
    model = torch.nn.Linear(4, 2, bias=False)
    model.seen_twice = torch.nn.Parameter(torch.ones(3).expand(5, 3), requires_grad=False)
    model.turned = torch.nn.Parameter(torch.ones(2, 6).t(), requires_grad=False)
    worker.model_runner = SimpleNamespace(get_model=lambda: model)
    spans = {start: stop - start for start, stop in worker._parameter_spans()}
    assert spans == {
        model.weight.data_ptr(): 32,
        model.seen_twice.data_ptr(): 12,
        model.turned.data_ptr(): 48,
    }


@pytest.mark.parametrize("change", ["eplb", "weight_transfer"])
def test_where_weights_change_none_stays(worker: Any, change: str) -> None:
    worker.model_runner = SimpleNamespace(get_model=lambda: torch.nn.Linear(4, 2))
    assert list(worker._parameter_spans())
    worker.vllm_config.parallel_config.enable_eplb = change == "eplb"
    if change == "weight_transfer":
        worker.vllm_config.weight_transfer_config = object()
    assert list(worker._parameter_spans()) == []


def test_configs_have_the_flags_of_changing_weights() -> None:
    assert ParallelConfig().enable_eplb is False
    assert VllmConfig().weight_transfer_config is None


def test_a_worker_on_a_cpu_does_what_vllm_s_does() -> None:
    """Which is to say that it does nothing."""
    assert {"sleep", "wake_up"} <= class_of("v1/worker/cpu_worker.py", "CPUWorker").keys()
    asked: list[Any] = []
    own: dict[str, Any] = {
        "__init__": lambda _: None,
        "sleep": lambda _, level: asked.append(level),
        "wake_up": lambda _, tags: asked.append(tags),
    }
    base = type("OfCpus", (Worker,), own)
    worker: Any = type("CpuWorker", (GpuWorker, base), {})()
    worker.model_config = SimpleNamespace(enable_sleep_mode=False)
    worker._sleep_mode_backend = None
    worker.sleep(1)
    worker.wake_up(["weights"])
    assert asked == [1, ["weights"]]
    assert worker._sleep_mode_backend is None


# --- who asks the worker


class Workers:
    """What an executor asks its workers."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.fails: str | None = None

    def __call__(self, method: str, args: Any = (), kwargs: Any = None) -> list[Any]:
        if method == self.fails:
            raise RuntimeError("no room")
        self.asked.append((method, *args, *(kwargs or {}).values()))
        return [True]


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = object.__new__(UniProcExecutor)
    made.sleeping_tags = set()
    made.collective_rpc = Workers()
    return made


class Core:
    """vLLM's executor under the calls that its client makes."""

    def __init__(self, executor: Any) -> None:
        self.executor = executor
        self.paused = False

    async def pause_scheduler_async(self, mode: str = "abort", clear_cache: bool = True) -> None:
        assert (mode, clear_cache) == ("abort", False)
        self.paused = True


class Client:
    """AsyncLLM's methods over that, without the process between."""

    def __init__(self, executor: Any) -> None:
        self.executor = executor
        self.engine_core = Core(executor)

    async def collective_rpc(self, method: str) -> list[Any]:
        answers: list[Any] = self.executor.collective_rpc(method)
        return answers

    async def release_kv_cache_memory(self) -> None:
        assert self.engine_core.paused
        assert not self.executor.is_sleeping
        self.executor.discard(("kv_cache",))

    async def sleep(self, level: int) -> None:
        self.executor.sleep(level)

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        self.executor.wake_up(tags)
        return not self.executor.is_sleeping


@pytest.fixture
def engine(executor: Any) -> Any:
    client: Any = Client(executor)
    arguments = AsyncEngineArgs(model="m", enable_sleep_mode=True)
    return Engine(client, arguments, EngineMetrics("chat"), ParentWatch(), Path("model-chat.log"))


SLEEP, WAKE = "sleep", "wake_up"
RELEASE, FORGET = ("discard", ("kv_cache",)), ("forget_copies",)
FROM_DISK = [(WAKE, ["weights"]), (WAKE, None)]


@pytest.mark.parametrize(
    ("levels", "asked"),
    [
        ([Level.KV_RELEASED], [RELEASE, (WAKE, None)]),
        ([Level.HOST], [(SLEEP, 1), (WAKE, None)]),
        ([Level.DISK], [(SLEEP, 2), *FROM_DISK]),
        ([Level.KV_RELEASED, Level.HOST], [RELEASE, (SLEEP, 1), (WAKE, None)]),
        ([Level.KV_RELEASED, Level.DISK], [RELEASE, (SLEEP, 2), *FROM_DISK]),
        ([Level.HOST, Level.DISK], [(SLEEP, 1), FORGET, *FROM_DISK]),
    ],
    ids=lambda value: "-".join(getattr(each, "name", "") for each in value).strip("-"),
)
async def test_down_and_up(engine: Any, levels: list[Level], asked: list[Any]) -> None:
    workers = engine.client.executor.collective_rpc
    for _ in range(2):
        workers.asked.clear()
        for level in levels:
            await engine.sleep(level)
            assert engine.level is level
            assert engine.client.executor.is_sleeping
        await engine.wake()
        assert engine.level is Level.READY
        assert not engine.client.executor.is_sleeping
        assert workers.asked == asked


async def test_one_that_is_awake_has_nothing_to_wake(engine: Any) -> None:
    await engine.wake()
    assert engine.client.executor.collective_rpc.asked == []


@pytest.mark.parametrize("to", [Level.HOST, Level.KV_RELEASED, Level.READY])
async def test_sleep_leads_down_only(engine: Any, to: Level) -> None:
    await engine.sleep(Level.HOST)
    with pytest.raises(EngineError, match="the engine is at level HOST"):
        await engine.sleep(to)
    assert engine.level is Level.HOST


async def test_preparing_waits_until_all_workers_are_done(engine: Any) -> None:
    answers: list[list[Any]] = [[None], [True, False], [True, True]]
    asked: list[str] = []

    async def rpc(method: str) -> list[Any]:
        asked.append(method)
        return answers.pop(0)

    engine.client.collective_rpc = rpc
    await engine.prepare_sleep()
    assert asked == ["prepare_sleep", "sleep_prepared", "sleep_prepared"]


@pytest.mark.parametrize(
    ("fails", "action"), [("sleep", "sleep at level HOST"), ("wake_up", "wake")]
)
async def test_what_fails_is_one_line_and_leaves_the_level(
    engine: Any, fails: str, action: str
) -> None:
    if fails == "wake_up":
        await engine.sleep(Level.HOST)
    before = engine.level
    engine.client.executor.collective_rpc.fails = fails
    with pytest.raises(EngineError) as raised:
        await (engine.wake() if fails == "wake_up" else engine.sleep(Level.HOST))
    assert raised.value.message == f"the engine could not {action}: RuntimeError: no room"
    assert engine.level is before


async def test_an_engine_on_a_cpu_does_not_sleep(engine: Any) -> None:
    engine.arguments = engine_arguments(spec(), sleeps=True)
    assert not engine.sleeps
    for refused in (engine.sleep(Level.HOST), engine.prepare_sleep()):
        with pytest.raises(EngineError, match="cannot sleep"):
            await refused
    assert engine.client.executor.collective_rpc.asked == []


def test_one_on_cuda_does_if_it_is_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda _: True)
    assert engine_arguments(spec(), sleeps=True).enable_sleep_mode is True
    assert engine_arguments(spec()).enable_sleep_mode is False
    explicit = spec(engine={"enable_sleep_mode": False})
    assert engine_arguments(explicit, sleeps=True).enable_sleep_mode is False
