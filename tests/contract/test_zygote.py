"""A zygote with vLLM: what its forks share, and what they have of their own."""

from __future__ import annotations

import ast
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from llmserve.engine import environment, zygote_guards, zygote_process
from llmserve.engine.parent_watch import ParentWatch
from llmserve.engine.worker.plugin import LOG_DIR
from llmserve.engine.zygote_guards import LATE, unfit
from tests import zygotes
from tests.contract.support import core_processes, spec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmserve.engine.zygote import Zygote

WITHIN_S = 60.0
# vLLM's own names of what `environment` and `run_folder` set.
VARIABLES = [
    "VLLM_WORKER_MULTIPROC_METHOD",
    "VLLM_NO_USAGE_STATS",
    "VLLM_V1_OUTPUT_PROC_CHUNK_SIZE",
    "VLLM_ENABLE_RESPONSES_API_STORE",
    "VLLM_MEDIA_CONNECTOR",
    "VLLM_RPC_BASE_PATH",
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """A zygote that has imported vLLM."""
    folder = tmp_path_factory.mktemp("logs")
    kept = dict(os.environ)
    environment.prepare(1, folder)
    os.environ["VLLM_RPC_BASE_PATH"] = str(folder)
    os.environ["OMP_NUM_THREADS"] = "4"  # with more than one, libraries start threads at import
    try:
        with zygotes.zygote(zygote_process.serve, import_s=500.0) as made:
            yield made
    finally:
        os.environ.clear()
        os.environ.update(kept)


def facts(running: Zygote, path: Path) -> dict[str, Any]:
    zygotes.hide_current_test()
    process: Any = running.context().Process(
        target=zygotes.report_engine, args=(str(path), VARIABLES), name="EngineCore"
    )
    process.start()
    process.join(WITHIN_S)
    log = Path(os.environ[LOG_DIR]) / "zygote.log"
    assert type(process._popen).__module__ == "llmserve.engine.zygote", log.read_text()
    assert process.exitcode == 0, log.read_text()
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_fork_has_vllm_and_its_own_state(running: Zygote, tmp_path: Path) -> None:
    first, second = (facts(running, tmp_path / name) for name in ("a", "b"))
    assert {"vllm.v1.engine.core", "llmserve.engine.worker.gpu_worker"} <= {*first["imported"]}
    assert first["title"] == "llmserve::zygot"
    assert not first["have_plugins_run"]  # so they run in the engine
    assert not first["are_variables_cached"]
    assert first["product"] == 500.0**3  # a parallel region works
    assert first["numpy"] != second["numpy"]
    assert "OPENBLAS_NUM_THREADS" not in first["environment"]


@pytest.mark.parametrize("name", VARIABLES)
def test_variable_of_the_server_holds_in_a_fork(running: Zygote, tmp_path: Path, name: str) -> None:
    from vllm import envs

    expected = envs.environment_variables[name]()  # `envs` itself may have a cached value
    assert str(facts(running, tmp_path / "file")["variables"][name]) == str(expected)


def test_thread_count_of_an_engine_holds_in_a_fork(
    running: Zygote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch reads it at its import, so the fork sets it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = facts(running, tmp_path / "file")
    assert found["torch_threads"] == 3


def test_engine_cores_are_forked(running: Zygote, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM creates them with the context that `Launcher` sets."""
    from vllm.v1.engine import utils

    from llmserve.engine.engine_arguments import engine_arguments
    from llmserve.engine.launcher import Launcher

    monkeypatch.setattr(utils, "get_mp_context", None)
    Launcher(Path(os.environ[LOG_DIR]), zygote=running)
    config = engine_arguments(spec()).create_engine_config()
    watch = ParentWatch()
    zygotes.hide_current_test()
    with watch.watching():
        manager = core_processes(config)
    (process,) = manager.processes
    assert type(process._popen).__module__ == "llmserve.engine.zygote"
    assert watch.pids == [process.pid]
    watch.kill()
    process.join(WITHIN_S)
    assert process.exitcode == -signal.SIGKILL


def test_workers_start_through_the_replaced_name() -> None:
    from vllm.v1.executor import multiproc_executor

    names = multiproc_executor.WorkerProc.make_worker_process.__code__.co_names
    assert "get_mp_context" in names
    assert callable(multiproc_executor.get_mp_context)


# --- Guards


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import plugins

    monkeypatch.setattr(zygote_guards, "_thread_count", lambda: 1)
    monkeypatch.setattr(plugins, "plugins_loaded", False)


@pytest.mark.usefixtures("fit")
def test_process_without_threads_and_cuda_is_fit() -> None:
    assert unfit() is None


@pytest.mark.usefixtures("fit")
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("llmserve.engine.zygote_guards._thread_count", lambda: 2, "the zygote has 2 threads"),
        ("torch.cuda.is_initialized", lambda: True, "CUDA is initialized in the zygote"),
        ("torch.cuda._is_in_bad_fork", lambda: True, "CUDA is initialized in the zygote"),
        (
            "llmserve.engine.zygote_guards._open_files",
            lambda: {"/dev/null", "/dev/nvidiactl"},
            "the zygote has opened /dev/nvidiactl",
        ),
        (
            "vllm.plugins.plugins_loaded",
            True,
            "vLLM's plugins have run in the zygote and would not run in the engine",
        ),
    ],
)
def test_guard_refuses(monkeypatch: pytest.MonkeyPatch, name: str, value: Any, reason: str) -> None:
    monkeypatch.setattr(name, value)
    assert unfit() == reason


def test_guard_sees_threads_and_files(tmp_path: Path) -> None:
    import threading

    before = zygote_guards._thread_count()
    wait = threading.Event()
    thread = threading.Thread(target=wait.wait)
    thread.start()
    assert zygote_guards._thread_count() == before + 1
    wait.set()
    thread.join()
    with (tmp_path / "file").open("w"):
        assert str(tmp_path / "file") in zygote_guards._open_files()


# --- Variables that may differ


def test_variable_that_vllm_reads_at_import_is_not_late() -> None:
    from vllm.v1.executor.ray_env_utils import _RAY_WORKER_PRE_IMPORT_ENV_VARS as READ_AT_IMPORT

    assert not LATE & READ_AT_IMPORT


def test_late_variables_are_read_in_functions_alone() -> None:
    import vllm

    root = Path(vllm.__file__).parent
    late = {name for name in LATE if name.startswith(("VLLM_", "NCCL_"))}
    found = [
        f"{file.relative_to(root)}: {name}"
        for file in root.rglob("*.py")
        if file != root / "envs.py"
        and any(name in (text := file.read_text(encoding="utf-8")) for name in late)
        for name in late & set(_read_at_import(ast.parse(text)))
    ]
    assert found == []


def _read_at_import(tree: ast.AST) -> Iterator[str]:
    """Yield attributes and strings outside functions, without a module's constant for a name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Attribute):
            yield node.attr
        if isinstance(node, ast.Subscript | ast.Call):
            yield from (
                each.value
                for each in ast.walk(node)
                if isinstance(each, ast.Constant) and isinstance(each.value, str)
            )
        yield from _read_at_import(node)
