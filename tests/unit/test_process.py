from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING, Any

import pytest

from llmserve.checkpoint import shape
from llmserve.engine import environment
from llmserve.errors import PlacementError, StartupError
from llmserve.gpus import nvml
from llmserve.gpus.device import GIB, described
from llmserve.lifecycle.gpu_memory import GpuMemory
from llmserve.lifecycle.host_memory import HostMemory
from llmserve.planning.measurements import Measured
from llmserve.registry.spec import Config, ModelSpec, ServerSpec
from llmserve.server import logs, process
from tests.unit.shapes import LLAMA_8B

if TYPE_CHECKING:
    from pathlib import Path

    from llmserve.gpus.device import Box


def test_any_free_port_is_bound_and_listens() -> None:
    with process.bind(ServerSpec(port=0)) as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1"
        socket.create_connection((host, port), timeout=2).close()


def test_ipv6_is_an_address_too() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        listener = process.bind(ServerSpec(host="::1", port=0))
    except StartupError as error:
        pytest.skip(f"no IPv6: {error.message}")
    with listener:
        assert listener.family == socket.AF_INET6


def test_port_in_use_is_an_error() -> None:
    with process.bind(ServerSpec(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(StartupError) as refused:
            process.bind(ServerSpec(port=port))
    assert refused.value.message == (
        f"port {port} on 127.0.0.1 cannot be bound: Address already in use; "
        "choose another port with --port or end the process that uses it"
    )
    assert refused.value.exit_code == 3


@pytest.mark.parametrize(
    "host", ["no-such-host.invalid", "256.256.256.256", "a" * 70, "a..b", "host\0name"]
)
def test_host_that_is_no_address_is_an_error(host: str) -> None:
    with pytest.raises(StartupError, match="is not an address of this machine"):
        process.bind(ServerSpec(host=host, port=0))


def test_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(StartupError, match=r"203\.0\.113\.7"):
        process.bind(ServerSpec(host="203.0.113.7", port=0))


def test_log_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with process.bind(ServerSpec(port=0)) as listener:
        spec = ServerSpec(log_dir=tmp_path / "file")
        with pytest.raises(StartupError, match=r"log_dir .* cannot be written"):
            process._log_folder(spec, listener)


def record(message: str, *arguments: object, error: Exception | None = None) -> logging.LogRecord:
    info = (type(error), error, None) if error is not None else None
    return logging.LogRecord(
        "llmserve.http.app", logging.ERROR, "app.py", 1, message, arguments, info
    )


def test_log_record_with_text_of_a_client_is_one_record() -> None:
    forged = "/a\n2026-01-01 00:00:00 ERROR llmserve: forged\r\x1b[2J\u202e\x85"
    text = logs._Escaping("%(levelname)s %(message)s").format(record("path=%s", forged))
    assert text == (
        "ERROR path=/a\n  2026-01-01 00:00:00 ERROR llmserve: forged\\r\\x1b[2J\\u202e\\x85"
    )


def test_traceback_in_the_log_has_no_control_characters() -> None:
    error = ValueError("bad\nERROR forged \x1b]0;title\x07 \udcff\tthere")
    text = logs._Escaping().format(record("unforeseen", error=error))
    assert text.splitlines() == [
        "unforeseen",
        "  ValueError: bad",
        "  ERROR forged \\x1b]0;title\\x07 \\udcff\tthere",
    ]
    assert logs._Brief().format(record("x\x1b", error=error)) == "x\\x1b"


def test_connections_without_a_model_end_after_the_drain() -> None:
    config = process._uvicorn_config(ServerSpec(drain_timeout=0.5), object())
    assert config.timeout_graceful_shutdown == 3


# --- the GPUs


def registry(folder: Path, **entry: Any) -> Config:
    """One model that is an 8B Llama wherever its files are read."""
    made = ModelSpec.model_validate({"name": "m", "model": "/m"} | entry)
    return Config(file=folder / "models.yaml", models=(made,))


def on_gpus(monkeypatch: pytest.MonkeyPatch, folder: Path, box: Box, used: int = 0) -> None:
    """As with vLLM's build for CUDA and these GPUs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(environment, "is_cpu_build", lambda: False)
    monkeypatch.setattr(nvml, "visible", lambda: box)
    monkeypatch.setattr(nvml, "used_bytes", lambda gpu: used)
    monkeypatch.setattr(nvml, "holders", lambda gpu: [])
    monkeypatch.setattr(shape, "read", lambda spec, hub: LLAMA_8B)


def test_the_build_for_cpus_has_no_gpus_to_plan(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_gpus(monkeypatch, tmp_path, described("H100"))
    monkeypatch.setattr(environment, "is_cpu_build", lambda: True)
    memory = process._memory(registry(tmp_path, devices=[5], kv_cache="4GiB"))
    assert isinstance(memory, HostMemory)
    assert memory.capacity == {}


def test_the_build_for_cuda_does_not_start_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_gpus(monkeypatch, tmp_path, ())
    with pytest.raises(StartupError, match="no NVIDIA GPU is visible") as refused:
        process._memory(registry(tmp_path))
    assert refused.value.exit_code == 3


def test_models_that_do_not_fit_do_not_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_gpus(monkeypatch, tmp_path, described("RTX4090"))
    with pytest.raises(PlacementError, match="what would fit: ") as refused:
        process._memory(registry(tmp_path, concurrency=40))
    assert refused.value.exit_code == 2


def test_gpus_in_use_by_other_processes_end_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_gpus(monkeypatch, tmp_path, described("H100"), used=30 * GIB)
    with pytest.raises(StartupError, match=r"49\.6 GiB of 79\.6 GiB are free"):
        process._memory(registry(tmp_path))
    space = process._memory(registry(tmp_path, memory="40GiB"))  # the rest is enough
    assert isinstance(space, GpuMemory)
    assert space.plan.replica("m", 0).bytes == 40 * GIB


def test_plan_uses_measurements_of_earlier_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_gpus(monkeypatch, tmp_path, described("H100"))
    first = process._memory(registry(tmp_path))
    assert isinstance(first, GpuMemory)
    mark = first.plan.replica("m", 0).fingerprint
    Measured(tmp_path / "llmserve" / "memory").keep(mark, 5 * GIB, {})
    again = process._memory(registry(tmp_path))
    assert isinstance(again, GpuMemory)
    assert again.plan.replica("m", 0).overhead == 5 * GIB


@pytest.mark.parametrize(
    ("logger", "level", "shown"),
    [
        ("llmserve.lifecycle.transitions", logging.ERROR, True),
        ("llmserve.lifecycle.transitions", logging.WARNING, False),
        ("llmserve.engine.backend", logging.WARNING, True),  # a model from the cache
        ("llmserve.engine.backend", logging.INFO, False),
        ("vllm.config", logging.WARNING, False),
    ],
)
def test_terminal_shows_errors_and_warnings_of_a_start(
    logger: str, level: int, shown: bool
) -> None:
    record = logging.LogRecord(logger, level, __file__, 1, "text", None, None)
    assert logs._is_for_terminal(record) is shown
