"""vLLM's worker, which also tells what a start took: seconds of each step, memory beside the KV cache.

Named to vLLM as `worker_cls`, so it runs in the process that holds the model
(vllm/v1/worker/gpu_worker.py); the server asks it with `collective_rpc`.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import psutil
import torch
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

_IMPORTED = time.time()


class GpuWorker(Worker):
    """The steps of a start in the order in which vLLM's executor asks for them."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self._seconds = {"imports": _IMPORTED - psutil.Process().create_time()}
        self._activations = 0
        super().__init__(*arguments, **more)

    def init_device(self) -> None:
        with self._timed("device"):
            super().init_device()

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        with self._timed("weights"):
            super().load_model(load_dummy_weights=load_dummy_weights)

    def determine_available_memory(self) -> int:
        """A forward pass over as many tokens as a step can have; compiles the model."""
        before = _peak_from_now()
        with self._timed("compile"):
            available: int = super().determine_available_memory()
        self._activations = _peak() - before
        return available

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        with self._timed("kv_cache"):
            super().initialize_from_config(kv_cache_config)

    def compile_or_warm_up_model(self) -> Any:
        runner: Any = self.model_runner
        capture = runner.capture_model
        runner.capture_model = lambda: self._within("graphs", capture)
        with self._timed("warm_up"):
            times = super().compile_or_warm_up_model()
        del runner.capture_model
        self._seconds["warm_up"] -= self._seconds.get("graphs", 0.0)
        return times

    @contextlib.contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[step] = self._seconds.get(step, 0.0) + time.monotonic() - began

    def _within(self, step: str, work: Any) -> Any:
        with self._timed(step):
            return work()

    def start_report(self) -> dict[str, Any]:
        """What the start took: seconds by step; bytes of this worker on its device.

        `weights` as loaded, `reserved` and `allocated` as torch counts them (KV cache
        included), `activations` the most that the profiling pass took beside the weights.
        """
        report: dict[str, Any] = {"seconds": self._seconds}
        if current_platform.is_cuda_alike():
            report["bytes"] = {
                "weights": int(self.model_runner.model_memory_usage),
                "reserved": torch.cuda.memory_reserved(),
                "allocated": torch.cuda.memory_allocated(),
                "activations": self._activations,
            }
        return report


def _peak_from_now() -> int:
    """Starts counting the peak anew; bytes allocated now."""
    if not current_platform.is_cuda_alike():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def _peak() -> int:
    return int(torch.cuda.max_memory_allocated()) if current_platform.is_cuda_alike() else 0
