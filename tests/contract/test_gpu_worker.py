"""The names of vLLM's that `llmserve.engine.worker.gpu_worker` builds on: what a worker is asked, and in which order."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CacheConfig, ParallelConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import WorkerWrapperBase

from llmserve.engine.engine_arguments import _WORKERS, engine_arguments
from llmserve.engine.worker.gpu_worker import GpuWorker
from tests.contract.support import class_of, parameters, source, spec

STEPS = (
    "init_device",
    "load_model",
    "determine_available_memory",
    "initialize_from_config",
    "compile_or_warm_up_model",
)
RUNNERS = ("v1/worker/gpu_model_runner.py", "v1/worker/gpu/model_runner.py")


# --- what is overridden


@pytest.mark.parametrize("name", [*STEPS, "sleep", "wake_up"])
def test_overridden_method_has_the_parameters_of_vllm_s(name: str) -> None:
    assert name in vars(Worker)
    assert parameters(getattr(GpuWorker, name)) == parameters(getattr(Worker, name))


@pytest.mark.parametrize("step", STEPS)
def test_vllm_s_worker_for_cpus_is_asked_the_same(step: str) -> None:
    of_gpus = class_of("v1/worker/gpu_worker.py", "Worker")[step]
    of_cpus = class_of("v1/worker/cpu_worker.py", "CPUWorker").get(step, of_gpus)
    assert ast.unparse(of_cpus.args) == ast.unparse(of_gpus.args)


def test_names_of_our_own_are_not_vllm_s() -> None:
    files = ("worker_base.py", "gpu_worker.py", "cpu_worker.py")
    theirs = {
        name
        for file in files
        for node in ast.walk(ast.parse(source(f"v1/worker/{file}")))
        for name in (getattr(node, "attr", None), getattr(node, "name", None))
    }
    assert {"model_runner", "init_device"} <= theirs
    overridden = {"__init__", *STEPS, "sleep", "wake_up", "sleep_mode_backend"}
    ours = {
        name
        for name, value in vars(GpuWorker).items()
        if inspect.isfunction(value) or isinstance(value, property)
    }
    assert overridden < ours
    assert not theirs & ((ours - overridden) | {"_seconds", "_activation_bytes"})


# --- who asks, and when


@pytest.mark.parametrize(
    "name", ["uniproc_executor.UniProcExecutor", "multiproc_executor.MultiprocExecutor"]
)
def test_an_executor_asks_its_workers_by_these_names(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, tuple[Any, ...]]] = []

    def noted(_: Any, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        asked.append((method, args))
        return []

    kind = resolve_obj_by_qualname(f"vllm.v1.executor.{name}")
    monkeypatch.setattr(kind, "collective_rpc", noted)
    executor = object.__new__(kind)
    executor.determine_available_memory()
    executor.initialize_from_config(["config"])
    executor.compile_or_warm_up_model()
    assert asked == [
        ("determine_available_memory", ()),
        ("initialize_from_config", (["config"],)),
        ("compile_or_warm_up_model", ()),
    ]


def test_a_worker_gets_its_own_part_of_the_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[Any] = []
    wrapper = WorkerWrapperBase(rpc_rank=1)
    wrapper.vllm_config = VllmConfig()
    wrapper.worker = SimpleNamespace(initialize_from_config=got.append)
    wrapper.initialize_from_config(["first", "second"])
    assert got == ["second"]


# --- the class, by its name


def test_the_class_is_found_by_its_name() -> None:
    assert resolve_obj_by_qualname(_WORKERS[False]) is GpuWorker


def test_our_worker_stays_and_auto_becomes_vllm_s() -> None:
    for engine, becomes in (
        ({}, "llmserve.engine.worker.cpu_worker.CpuWorker"),
        ({"worker_cls": "auto"}, "vllm.v1.worker.cpu_worker.CPUWorker"),
    ):
        config = engine_arguments(spec(engine=engine)).create_engine_config()
        assert config.parallel_config.worker_cls == becomes


@pytest.mark.parametrize(
    ("platform", "theirs"),
    [
        ("cuda", "vllm.v1.worker.gpu_worker.Worker"),
        ("cpu", "vllm.v1.worker.cpu_worker.CPUWorker"),
    ],
)
def test_a_platform_replaces_auto_alone(platform: str, theirs: str) -> None:
    sets = [
        (ast.unparse(node.test), *map(ast.unparse, node.body))
        for node in ast.walk(ast.parse(source(f"platforms/{platform}.py")))
        if isinstance(node, ast.If) and "worker_cls" in ast.unparse(node.test)
    ]
    assert sets == [
        (
            "parallel_config.worker_cls == 'auto'",
            f"parallel_config.worker_cls = {theirs!r}",
        )
    ]


def test_config_hash_ignores_placement() -> None:
    """torch.compile's cache is found by the hash of the config."""
    usual = ParallelConfig().compute_hash()
    placed = ParallelConfig(
        worker_cls="llmserve.engine.worker.gpu_worker.GpuWorker",
        assigned_physical_gpu_ids=[1],
        distributed_executor_backend="mp",
    )
    assert placed.compute_hash() == usual
    assert ParallelConfig(tensor_parallel_size=2).compute_hash() != usual
    sized = CacheConfig(kv_cache_memory_bytes=2**30, gpu_memory_utilization=0.3)
    assert sized.compute_hash() == CacheConfig().compute_hash()


# --- what the worker reads and times


@pytest.mark.parametrize("file", RUNNERS)
def test_model_runner_has_weights_and_plain_capture(file: str) -> None:
    methods = class_of(file, "GPUModelRunner")
    loads = [ast.unparse(node) for node in ast.walk(methods["load_model"])]
    assert "self.model_memory_usage" in loads
    arguments = methods["capture_model"].args
    assert [one.arg for one in arguments.args] == ["self"]
    assert None not in arguments.kw_defaults  # none that must be given


class Runner:
    model_memory_usage = 7
    captured = 0

    def capture_model(self) -> int:
        self.captured += 1
        return 3


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ours on a worker of vLLM's that does nothing but say what it was asked."""
    asked: list[Any] = []

    def start(_: Any, *arguments: Any, **more: Any) -> None:
        asked.append((arguments, more))

    def warm_up(of: Any) -> str:
        return f"captured {of.model_runner.capture_model()}"

    monkeypatch.setattr(Worker, "__init__", start)
    monkeypatch.setattr(Worker, "init_device", lambda _: asked.append("device"))
    monkeypatch.setattr(
        Worker, "load_model", lambda _, *, load_dummy_weights: asked.append(load_dummy_weights)
    )
    monkeypatch.setattr(Worker, "determine_available_memory", lambda _: 5)
    monkeypatch.setattr(Worker, "initialize_from_config", lambda _, config: asked.append(config))
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", warm_up)
    made = GpuWorker("config", rank=1)
    made.model_runner = Runner()
    made.model_config = SimpleNamespace(enable_sleep_mode=False)
    made.asked = asked
    return made


def start_of(worker: Any) -> None:
    worker.init_device()
    worker.load_model(load_dummy_weights=True)
    assert worker.determine_available_memory() == 5
    worker.initialize_from_config("kv")
    assert worker.compile_or_warm_up_model() == "captured 3"


def test_every_step_reaches_vllm_s_worker_and_is_timed(worker: Any) -> None:
    start_of(worker)
    assert worker.asked == [(("config",), {"rank": 1}), "device", True, "kv"]
    assert worker.model_runner.captured == 1
    assert "capture_model" not in vars(worker.model_runner)  # the class's own again
    report = worker.start_report()
    steps = {"imports", "device", "weights", "compile", "kv_cache", "warm_up", "graphs"}
    assert report["seconds"].keys() == steps
    assert all(took >= 0 for took in report["seconds"].values())


@pytest.mark.parametrize("transfers", [None, "a connector that knows where the KV cache is"])
def test_worker_with_sleep_mode_remaps_its_kv_cache(worker: Any, transfers: str | None) -> None:
    worker.model_config.enable_sleep_mode = True
    worker.vllm_config = SimpleNamespace(kv_transfer_config=transfers)
    worker._sleep_mode_backend = SimpleNamespace(remap=worker.asked.append)
    worker.initialize_from_config("kv")
    assert worker.asked[1:] == (["kv"] if transfers else ["kv", "kv_cache"])


def test_worker_loads_real_weights_by_default(worker: Any) -> None:
    worker.load_model()
    assert worker.asked[1:] == [False]


def test_worker_on_a_gpu_reports_its_bytes(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "bytes" not in worker.start_report()
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda _: True)
    resets: list[None] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(None))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 130)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 150)
    start_of(worker)
    assert len(resets) == 1
    assert worker.start_report()["bytes"] == {
        "weights": 7,
        "reserved": 150,
        "allocated": 100,
        "activations": 30,
    }


def test_a_report_comes_through_vllm_s_executor_and_wire(worker: Any) -> None:
    start_of(worker)
    executor = object.__new__(UniProcExecutor)
    executor.driver_worker = WorkerWrapperBase()
    executor.driver_worker.worker = worker
    reports = executor.collective_rpc("start_report")
    sent = MsgpackEncoder().encode(UtilityResult(reports))
    assert MsgpackDecoder(UtilityResult).decode(sent).result == [worker.start_report()]


# --- what importing does


IMPORTS = """
import json, sys
import torch

before = torch.cuda.Event
import llmserve.engine.worker.gpu_worker
cpu = sorted(name for name in sys.modules if name.startswith("vllm.v1.worker.cpu"))
same = torch.cuda.Event is before
import llmserve.engine.worker.cpu_worker
from vllm.v1.worker.cpu_worker import CPUWorker

order = [each.__name__ for each in llmserve.engine.worker.cpu_worker.CpuWorker.__mro__]
print(json.dumps([cpu, same, torch.cuda.Event is before, order]))
"""


def test_the_worker_for_gpus_leaves_cuda_s_events_alone() -> None:
    """vLLM's worker for CPUs replaces them, so it has a module of its own."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
    )
    cpu, same, same_after_cpu, order = json.loads(done.stdout.splitlines()[-1])
    assert cpu == []
    assert same
    assert not same_after_cpu  # else both could be one module
    assert order[:4] == ["CpuWorker", "GpuWorker", "CPUWorker", "Worker"]
