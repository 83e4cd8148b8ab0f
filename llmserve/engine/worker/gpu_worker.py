"""vLLM's worker, with times and bytes of its start, and sleep through `host_offload`.

vLLM loads it as `worker_cls` in the process that holds the model (vllm/v1/worker/gpu_worker.py).
The server calls it with `collective_rpc`.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import psutil
import torch
from vllm.distributed.parallel_state import suspend_device_comms
from vllm.model_executor.model_loader import get_model_loader
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

from llmserve.engine.worker.host_offload import HostCopies
from llmserve.engine.worker.kv_pages import CudaMemory, trimmed_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmserve.engine.worker.host_offload import Span

_IMPORTED = time.time()


class GpuWorker(Worker):
    """The steps of a start in the order in which vLLM's executor calls them; sleep and wake."""

    _sleep_mode_backend: HostCopies | None  # vLLM's attribute, set at the first use

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self._seconds = {"imports": max(0.0, _IMPORTED - psutil.Process().create_time())}
        self._activation_bytes = 0
        super().__init__(*arguments, **more)

    def init_device(self) -> None:
        with self._timed("device"):
            super().init_device()

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        with self._timed("weights"):
            super().load_model(load_dummy_weights=load_dummy_weights)

    def determine_available_memory(self) -> int:
        """Profile: a forward pass with the tokens of a full step, which compiles the model."""
        before = _reset_peak()
        with self._timed("compile"):
            available: int = super().determine_available_memory()
        self._activation_bytes = _peak() - before
        return available

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        with self._timed("kv_cache"):
            super().initialize_from_config(kv_cache_config)
            if self.model_config.enable_sleep_mode and self._exchanges_pages:
                self.sleep_mode_backend.remap("kv_cache")

    def compile_or_warm_up_model(self) -> Any:
        runner: Any = self.model_runner
        capture = runner.capture_model
        runner.capture_model = self._timed("graphs")(capture)
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

    @property
    def sleep_mode_backend(self) -> HostCopies:
        """Always llmserve's: vLLM 0.32 has no engine argument for it."""
        if self._sleep_mode_backend is None:
            memory = CudaMemory(exchanges_pages=self._exchanges_pages)
            self._sleep_mode_backend = HostCopies(memory, self._parameter_spans)
        return self._sleep_mode_backend

    @property
    def _exchanges_pages(self) -> bool:
        """Whether the KV cache's memory may change: a connector registers it by address."""
        return self.vllm_config.kv_transfer_config is None

    def _parameter_spans(self) -> Iterator[Span]:
        """Yield the model's parameters, if nothing moves or replaces them while it serves."""
        config = self.vllm_config
        if config.parallel_config.enable_eplb or config.weight_transfer_config is not None:
            return
        for parameter in self.model_runner.get_model().parameters():
            storage = parameter.untyped_storage()
            start = parameter.data_ptr()
            end = start + parameter.numel() * parameter.element_size()
            yield start, min(end, storage.data_ptr() + storage.nbytes())

    def prepare_sleep(self) -> None:
        """Begin the copy without which the first sleep takes longer than later ones."""
        self.sleep_mode_backend.prepare()

    def sleep_prepared(self) -> bool:
        return self.sleep_mode_backend.prepared()

    def sleep(self, level: int = 1) -> None:
        """Sleep without vLLM's assertion that the whole device's free memory did not shrink."""
        if not self.model_config.enable_sleep_mode:
            super().sleep(level)  # on a CPU it only logs that it does nothing
            return
        if level == 2:
            self._require_reloadable()
        self.sleep_mode_backend.suspend(level)
        if self.model_config.enable_nccl_comm_suspend:
            suspend_device_comms()

    def forget_copies(self) -> None:
        """Lower a sleeping worker from level 1 to level 2: free the host's memory."""
        self._require_reloadable()
        self.sleep_mode_backend.forget()

    def _require_reloadable(self) -> None:
        """Raises ValueError for a model whose weights may differ after a reload.

        vLLM reads weights into the loaded model layer by layer, and only logs a warning for
        missing ones (model_loader/reload). tests/gpu/test_sleep.py covers dense models.
        """
        model, config = self.model_config, self.vllm_config
        unsupported = {
            f"load_format {self.load_config.load_format}": not hasattr(
                get_model_loader(self.load_config), "get_all_weights"
            ),
            "adapters": config.lora_config is not None,
            "quantized weights": model.quantization is not None,
            f"a KV cache of type {config.cache_config.cache_dtype}": (
                config.cache_config.cache_dtype != "auto"
            ),
            "experts": model.is_moe,
            "layers without attention": model.is_hybrid,
            "latent attention": model.use_mla,
            "other inputs than text": model.is_multimodal_model,
            "speculative decoding": config.speculative_config is not None,
            f"runner {model.runner_type}": model.runner_type != "generate",
        }
        if found := ", ".join(feature for feature, is_set in unsupported.items() if is_set):
            raise ValueError(
                f"the weights of a model with {found} cannot be reloaded; put it to sleep in host "
                "memory, or stop it"
            )

    def wake_up(self, tags: list[str] | None = None) -> None:
        super().wake_up(tags)
        backend = self._sleep_mode_backend
        if backend is not None and backend.lost and (tags is None or "weights" in tags):
            self.reload_weights()
            torch.cuda.empty_cache()  # of the reload: the KV cache needs the memory
            backend.lost = False

    def start_report(self) -> dict[str, Any]:
        """Return the seconds of the start by step, and this worker's bytes on its device.

        `reserved` and `allocated` are torch's counts, with the KV cache. `activations` is the
        peak of the profiling pass besides the weights.
        """
        report: dict[str, Any] = {"seconds": self._seconds}
        if current_platform.is_cuda_alike():
            report["bytes"] = {
                "weights": int(self.model_runner.model_memory_usage),
                "reserved": torch.cuda.memory_reserved() - trimmed_bytes(),
                "allocated": torch.cuda.memory_allocated(),
                "activations": self._activation_bytes,
            }
        return report


def _reset_peak() -> int:
    """Reset the peak of allocated bytes; return the bytes allocated now."""
    if not current_platform.is_cuda_alike():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def _peak() -> int:
    return int(torch.cuda.max_memory_allocated()) if current_platform.is_cuda_alike() else 0
