"""The names of vLLM's that `llmserve.engine.engine` builds on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from llmserve.engine import run_folder
from llmserve.errors import StartupError
from llmserve.registry.spec import SamplingSpec
from tests.contract.support import core_processes, spec


def test_a_registry_entry_in_vllms_terms() -> None:
    from llmserve.engine.engine_arguments import engine_arguments

    arguments = engine_arguments(
        spec(
            aliases=("a", "b"),
            kv_cache="512MiB",
            gpu_memory_utilization=0.25,
            reasoning_parser="qwen3",
            sampling=SamplingSpec(temperature=0.2, max_tokens=64),
            engine={"max_model_len": 512},
        )
    )
    assert arguments.served_model_name == ["chat", "a", "b"]
    assert arguments.kv_cache_memory_bytes == 512 * 2**20
    assert arguments.gpu_memory_utilization == 0.25
    assert arguments.reasoning_parser == "qwen3"
    assert arguments.override_generation_config == {"temperature": 0.2, "max_new_tokens": 64}
    assert arguments.max_model_len == 512
    assert arguments.trust_remote_code is False
    assert arguments.disable_log_stats is False


def test_on_the_cpu_each_engine_gets_its_own_kv_cache_and_no_compilation() -> None:
    from llmserve.engine.engine_arguments import engine_arguments

    arguments = engine_arguments(spec(devices=(0,)))
    assert arguments.kv_cache_memory_bytes == 2**30
    assert arguments.enforce_eager is True
    assert arguments.device_ids is None
    assert engine_arguments(spec(engine={"enforce_eager": False})).enforce_eager is False


def test_mappings_become_vllms_config_classes() -> None:
    from vllm.config import StructuredOutputsConfig

    from llmserve.engine.engine_arguments import engine_arguments

    arguments = engine_arguments(
        spec(engine={"structured_outputs_config": {"backend": "xgrammar"}})
    )
    assert isinstance(arguments.structured_outputs_config, StructuredOutputsConfig)
    assert arguments.structured_outputs_config.backend == "xgrammar"


def test_tensor_parallel_engines_do_without_ray() -> None:
    from llmserve.engine.engine_arguments import engine_arguments

    arguments = engine_arguments(spec(tensor_parallel_size=2, devices=(0, 1)))
    assert arguments.tensor_parallel_size == 2
    assert arguments.distributed_executor_backend == "mp"


def test_each_engine_writes_its_figures_into_a_registry_of_its_own() -> None:
    from llmserve.engine.engine_arguments import engine_arguments
    from llmserve.engine.metrics import EngineMetrics

    each = [EngineMetrics("chat"), EngineMetrics("embed")]
    config = engine_arguments(spec(engine={"max_model_len": 512})).create_engine_config()
    for figures in each:
        figures.logger_class(config)
    for figures in each:
        names = {family.name for family in figures.registry.collect()}
        assert {"vllm:num_requests_running", "vllm:generation_tokens"} <= names


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (
            """(EngineCore pid=7) ERROR 11-22 10:00:00 [core.py:1] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-22 10:00:00 [core.py:1] ValueError: No room for   KV.
(EngineCore pid=7) RuntimeError: Engine core initialization failed. See root cause
""",
            "ValueError: No room for KV.",
        ),
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n",
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
        ),
    ],
)
def test_the_cause_of_a_failed_start_comes_from_the_engines_log(
    log: str, cause: str, tmp_path: Path
) -> None:
    from llmserve.engine.startup_log import cause_of

    file = tmp_path / "chat.log"
    file.write_text(log)
    raised = RuntimeError("Engine core initialization failed. See root cause above.")
    assert cause_of(raised, file) == cause


def test_engine_cores_start_where_they_are_watched() -> None:
    """By multiprocessing, in the thread of the start: `llmserve.engine.parent_watch`."""
    from llmserve.engine.engine_arguments import engine_arguments
    from llmserve.engine.parent_watch import ParentWatch

    config = engine_arguments(spec()).create_engine_config()
    watch = ParentWatch()
    with watch.watching():
        manager = core_processes(config)
    (process,) = manager.processes
    assert watch.pids == [process.pid]
    assert process.is_alive()
    watch.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def test_launcher_stopped_kills_all_and_starts_nothing(tmp_path: Path) -> None:
    from llmserve.engine.launcher import Launcher

    launcher = Launcher(tmp_path)
    under_way = [launcher.new_watch() for _ in range(2)]
    launcher.stop()
    assert all(watch.is_killed for watch in under_way)
    for start in (launcher.new_watch, lambda: launcher.start(spec(), watch=under_way[0])):
        with pytest.raises(StartupError, match="the server is stopping"):
            start()


def test_launcher_that_fails_after_its_engine_is_made_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    from llmserve.engine.launcher import Launcher

    monkeypatch.setattr(AsyncLLM, "from_vllm_config", lambda *_, **__: object())
    launcher = Launcher(tmp_path)
    watch = launcher.new_watch()
    with pytest.raises(StartupError, match="AttributeError"):
        launcher.start(spec(), watch=watch)
    assert watch.is_killed


def test_sockets_are_where_the_run_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with a name of 36 characters, for which `runfolder` leaves room."""
    from vllm import envs
    from vllm.utils.network_utils import get_open_zmq_ipc_path

    monkeypatch.setenv(run_folder.SOCKETS, str(tmp_path))
    assert envs.environment_variables[run_folder.SOCKETS]() == str(tmp_path)
    assert len(Path(get_open_zmq_ipc_path()).name) == 36
