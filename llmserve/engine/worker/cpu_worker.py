"""The same for engines on a CPU.

Apart from `worker`: importing vLLM's CPU worker replaces torch's CUDA events with stand-ins.
"""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from llmserve.engine.worker.gpu_worker import GpuWorker


class CpuWorker(GpuWorker, CPUWorker):
    pass
