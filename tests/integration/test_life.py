"""How a server starts, fails, drains and ends."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest

from llmserve.engine.run_folder import RunFolder
from tests.integration.conftest import (
    CHAT,
    EMBED,
    START_S,
    Server,
    left_in,
    shared_by,
    until,
    write_certificate,
    write_registry,
)
from tests.readme import ASKED, REPLY

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALL = {
    "model": CHAT,
    "kv_cache": "256MiB",
    "engine": {"max_model_len": 2048, "dtype": "float32"},  # not every CPU is fast in bfloat16
}
ORPHAN_S = 15  # no process of a killed server lives for longer


def run(registry: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "llmserve", "up", str(registry)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


def test_taken_port_ends_the_server_before_a_load(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        registry = write_registry(tmp_path, server={"port": port}, models={"chat": SMALL})
        ended = run(registry)
    assert ended.returncode == 3
    assert not (tmp_path / "logs").exists()  # nothing has begun to load
    assert f"port {port}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_broken_registry_starts_nothing(tmp_path: Path) -> None:
    registry = write_registry(tmp_path, models={"chat": {"modle": CHAT}})
    ended = run(registry)
    assert ended.returncode == 2
    assert "models.chat.modle: unknown key; nearest: model" in ended.stderr


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model that serves beside two that cannot start."""
    folder = tmp_path_factory.mktemp("pair")
    truncated = folder / "truncated"
    truncated.mkdir()
    for file in Path(EMBED).iterdir():
        if file.is_file():
            content = file.read_bytes()
            (truncated / file.name).write_bytes(
                content[: len(content) // 2] if file.suffix == ".safetensors" else content
            )
    empty = folder / "empty"
    empty.mkdir()
    chat = SMALL | {"engine": {"max_model_len": 2048, "dtype": "bfloat16"}}
    models = {"chat": chat, "broken": {"model": str(truncated)}, "empty": {"model": str(empty)}}
    with Server(write_registry(folder, server={"drain_timeout": 20}, models=models)) as server:
        yield server


def test_while_models_load_the_port_answers(pair: Server) -> None:
    url = pair.url
    assert httpx.get(f"{url}/health", timeout=20).status_code == 200
    ready = httpx.get(f"{url}/ready", timeout=20)
    assert ready.status_code == 503
    assert ready.json()["ready"] is False
    refused = httpx.post(f"{url}/v1/completions", json={"model": "chat", "prompt": "x"}, timeout=20)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "model_not_ready"
    assert int(refused.headers["retry-after"]) > 0


def test_models_that_fail_are_printed_and_the_rest_serves(pair: Server) -> None:
    printed = pair.ready().printed()
    broken = [line for line in printed.splitlines() if line.startswith("broken: failed")]
    empty = [line for line in printed.splitlines() if line.startswith("empty: failed")]
    assert len(broken) == len(empty) == 1
    assert "safetensor" in broken[0].lower() or "header" in broken[0].lower(), broken
    assert "config.json" in empty[0] or "config" in empty[0], empty
    assert "Traceback" not in printed
    assert printed.splitlines()[-1].endswith("(2 failed)")
    assert len(pair.engines()) == 1
    reply = pair.post("/v1/completions", model="chat", prompt="x", max_tokens=2)
    assert reply.status_code == 200
    refused = pair.post("/v1/embeddings", model="broken", input="x")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_failed")


def test_the_readme_s_question_is_answered_in_bfloat16(pair: Server) -> None:
    """tests/integration/test_serving.py asks it in float32."""
    reply = pair.post("/v1/chat/completions", **ASKED)
    assert reply.json()["choices"] == REPLY["choices"]


def test_a_second_signal_ends_at_once(pair: Server) -> None:
    """The last that this server sees."""
    url, family = pair.ready().url, pair.family()
    body = {"model": "chat", "prompt": "x", "max_tokens": 2000, "ignore_eos": True}

    def ask() -> None:
        with pytest.raises(httpx.HTTPError):
            httpx.post(f"{url}/v1/completions", json=body, timeout=60)

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: pair.running("chat") == 1)
    pair.send(signal.SIGTERM)
    pair.wait_for("Stopping: 1 requests")
    pair.send(signal.SIGTERM)
    # An end after the drain, with the answer or without, has code 0.
    assert pair.process.wait(60) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    asking.join()


def write_unknown_model(folder: Path) -> None:
    """The demo chat model with an architecture that only vLLM knows it cannot load."""
    folder.mkdir()
    for file in Path(CHAT).iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    config["architectures"] = ["UnknownForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))


def test_a_required_model_that_cannot_start_ends_the_server(tmp_path: Path) -> None:
    """And until then the port answers, here over TLS."""
    tls = write_certificate(tmp_path, "-nodes", "-addext", "subjectAltName=IP:127.0.0.1")
    write_unknown_model(tmp_path / "unknown")
    models = {"chat": SMALL, "main": {"model": str(tmp_path / "unknown"), "required": True}}
    with Server(write_registry(tmp_path, server=tls, models=models)) as server:
        url = server.url
        assert url.startswith("https://")
        trust = ssl.create_default_context(cafile=tmp_path / "cert.pem")
        assert httpx.get(f"{url}/health", verify=trust, timeout=20).status_code == 200
        assert server.process.wait(START_S) == 3
        assert "main is required and failed: " in server.printed()
        assert "Traceback" not in server.printed()
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)


@pytest.mark.parametrize("moment", ["young", "loads"])
def test_a_server_killed_while_models_load_leaves_nothing(
    tmp_path: Path, temporary: Path, moment: str
) -> None:
    """Its engine's process has just begun, or has read its config and writes its log."""
    registry = write_registry(tmp_path, models={"chat": SMALL})
    with Server(registry) as server:
        server.wait_for("chat: loading")
        until(lambda: bool(server.family()), START_S)
        if moment == "loads":
            until(lambda: bool(list(tmp_path.glob("logs/*/model-chat.log"))), START_S)
        family = server.family()
        server.send(signal.SIGKILL)
        assert server.process.wait(60) == -signal.SIGKILL
        _, alive = psutil.wait_procs(family, timeout=ORPHAN_S)
        assert not alive
        assert not started_by(server.registry)
    RunFolder.make({"TMPDIR": str(temporary)}).remove()  # as the next start does
    assert left_in(temporary) == set()
    assert not shared_by(family)


def started_by(registry: Path) -> list[psutil.Process]:
    """Processes of engines that write into the server's logs, also orphans."""
    return [
        each
        for each in psutil.process_iter()
        if each.is_running() and str(registry.parent) in environment_of(each)
    ]


def environment_of(process: psutil.Process) -> str:
    try:
        return str(process.environ().get("LLMSERVE_LOG_DIR", ""))
    except psutil.Error:
        return ""


def test_a_signal_while_models_load(tmp_path: Path, temporary: Path) -> None:
    with Server(write_registry(tmp_path, models={"chat": SMALL})) as server:
        server.wait_for("chat: loading")
        until(lambda: bool(server.engines()), START_S)
        family = server.family()
        server.send(signal.SIGTERM)
        assert server.process.wait(60) == 0
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive
    assert left_in(temporary) == set()
    assert not shared_by(family)
