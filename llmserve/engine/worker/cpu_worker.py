"""`GpuWorker` for engines on a CPU.

A separate module: the import of vLLM's CPU worker replaces torch's CUDA events.
"""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from llmserve.engine.worker.gpu_worker import GpuWorker


class CpuWorker(GpuWorker, CPUWorker):
    pass
