"""When the zygote must not fork an engine: what would differ from a spawned process."""

from __future__ import annotations

import contextlib
from pathlib import Path

# Variables that an engine may have in another form than the zygote. Everything that reads them
# does so after the fork; tests/contract/test_zygote.py checks it for vLLM.
LATE = frozenset({
    "AITER_SITUV2_A4W4",
    "COLUMNS",  # this and LINES: set by the import of readline
    "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",  # set by the import of OpenCV, for programs that are started later
    "LINES",
    "LOCAL_WORLD_SIZE",
    "NCCL_GRAPH_REGISTER",
    "NUMEXPR_MAX_THREADS",
    "VLLM_DISABLE_SHARED_EXPERTS_STREAM",
    "VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME",
    "VLLM_OMP_NUM_THREADS_SET_BY_VLLM",
    "VLLM_SSM_CONV_STATE_LAYOUT",
    "VLLM_USE_DEEP_GEMM_E8M0",
})  # fmt: skip


def unfit() -> str | None:
    """Return why this process must not fork an engine; None if it may."""
    import torch  # noqa: PLC0415  # not in the server
    from vllm import plugins  # noqa: PLC0415  # as torch

    if (threads := _thread_count()) != 1:
        return f"the zygote has {threads} threads"
    if torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork():  # noqa: SLF001  # no public name
        return "CUDA is initialized in the zygote"
    if opened := sorted(path for path in _open_files() if path.startswith("/dev/nvidia")):
        return f"the zygote has opened {', '.join(opened)}"
    if plugins.plugins_loaded:
        return "vLLM's plugins have run in the zygote and would not run in the engine"
    return None


def _thread_count() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def _open_files() -> set[str]:
    paths = set()
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of this loop
            paths.add(str(each.readlink()))
    return paths
