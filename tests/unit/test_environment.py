from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from llmserve.engine import environment
from llmserve.engine.worker import plugin


def test_the_log_folder_is_told_to_engine_processes(tmp_path: Path) -> None:
    env: dict[str, str] = {}
    environment.prepare(2, tmp_path / "a" / "b", env)
    assert env[plugin.LOG_DIR] == str(tmp_path / "a" / "b")


def test_engines_are_spawned_whatever_was_said(tmp_path: Path) -> None:
    env = {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}
    environment.prepare(1, tmp_path, env)
    assert env["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


def test_cuda_counts_gpus_as_the_driver_does_whatever_was_said(tmp_path: Path) -> None:
    env = {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    environment.prepare(1, tmp_path, env)
    assert env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_what_the_operator_said_stays(tmp_path: Path) -> None:
    said = {
        "VLLM_NO_USAGE_STATS": "0",
        "VLLM_ENABLE_RESPONSES_API_STORE": "0",
        "VLLM_MEDIA_CONNECTOR": "http",
        "OMP_NUM_THREADS": "3",
        "VLLM_CPU_OMP_THREADS_BIND": "0-3",
    }
    env = dict(said)
    environment.prepare(2, tmp_path, env)
    assert {key: env[key] for key in said} == said


def test_the_process_s_own_environment_is_left_alone(tmp_path: Path) -> None:
    before = dict(os.environ)
    environment.prepare(2, tmp_path, {})
    assert dict(os.environ) == before


@pytest.mark.parametrize("engines", [0, 1, 2, 1000])
def test_engines_share_the_cores(engines: int) -> None:
    env: dict[str, str] = {}
    assert list(environment._prepare_cpu(engines, env)) == []
    threads = int(env["OMP_NUM_THREADS"])
    assert threads == max(1, environment.cores() // max(1, engines))
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_a_size_that_would_hold_for_every_engine_is_refused_aloud() -> None:
    env = {"VLLM_CPU_KVCACHE_SPACE": "40"}
    (notice,) = environment._prepare_cpu(2, env)
    assert "VLLM_CPU_KVCACHE_SPACE is ignored" in notice
    assert "kv_cache" in notice
    assert "VLLM_CPU_KVCACHE_SPACE" not in env


def test_an_openmp_that_is_preloaded_already_stays_alone() -> None:
    env = {"LD_PRELOAD": "/opt/libgomp.so.1"}
    list(environment._prepare_cpu(1, env))
    assert env["LD_PRELOAD"] == "/opt/libgomp.so.1"


def test_intel_s_openmp_is_preloaded_after_what_is_there() -> None:
    env = {"LD_PRELOAD": "/opt/libtcmalloc.so"}
    list(environment._prepare_cpu(1, env))
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    expected = ["/opt/libtcmalloc.so"] + ([str(openmp)] if openmp.exists() else [])
    assert env["LD_PRELOAD"].split(":") == expected


@pytest.mark.parametrize(
    ("soft", "hard", "then"),
    [
        (1024, 4096, 4096),
        (1024, 10**9, 65_536),
        (1024, resource.RLIM_INFINITY, 65_536),
        (100_000, 10**9, 100_000),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, resource.RLIM_INFINITY),
    ],
)
def test_descriptors_are_raised_as_far_as_they_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, then: int
) -> None:
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, now: limits.append(now))
    environment.prepare(1, tmp_path, {})
    assert limits[-1] == (then, hard)


def test_shared_memory_of_killed_engines_is_not_reported(tmp_path: Path) -> None:
    """multiprocessing removes it when the server ends, and would print a warning."""
    code = (
        "import multiprocessing\n"
        "from multiprocessing.shared_memory import SharedMemory\n"
        "from pathlib import Path\n"
        "from llmserve.engine import environment\n"
        f"environment.prepare(1, Path({str(tmp_path)!r}))\n"
        "spawn = multiprocessing.get_context('spawn')\n"
        "engine = spawn.Process(target=SharedMemory, args=('llmserve_test', True, 64))\n"
        "engine.start()\n"
        "engine.join()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    assert not Path("/dev/shm/llmserve_test").exists()
