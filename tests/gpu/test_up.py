"""`llmserve up` on a GPU: two models share it as planned, from the command to the answer.

The weights are made up (`load_format: dummy`): what is shown is that engines get the KV
cache that the plan says, take the memory that it says, and answer.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from benchmarks import shapes
from tests.gpu import MARKS, gpus
from tests.integration.conftest import CHAT, EMBED, STOP_S, Server, write_registry

if TYPE_CHECKING:
    from collections.abc import Iterator


pytestmark = MARKS


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    dummy = {"load_format": "dummy"}
    model = str(shapes.make("llama-1b", Path(CHAT), folder / "1b"))
    models = {
        "chat": {
            "model": model,
            "devices": [gpus()[0]],
            "gpu_memory_utilization": 0.3,
            "engine": dummy | {"max_model_len": 4096},
        },
        "embed": {"model": EMBED, "devices": [0], "memory": "6GiB", "engine": dummy},
        # There are no files of this format, which only vLLM reads.
        "empty": {
            "model": model,
            "devices": [0],
            "memory": "8GiB",
            "engine": {"load_format": "sharded_state"},
        },
    }
    return write_registry(folder, models=models)


@pytest.fixture(scope="module")
def plan(registry: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "llmserve", "plan", str(registry), "--json"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    planned: dict[str, Any] = json.loads(printed)
    return {replica["name"]: replica for replica in planned["replicas"]}


@pytest.fixture(scope="module")
def server(registry: Path, plan: dict[str, Any]) -> Iterator[Server]:
    """Started after the plan was made: its overhead is that of the first start."""
    assert plan.keys() == {"chat", "embed", "empty"}
    with Server(registry) as running:
        began = time.monotonic()
        running.wait_for("Serving", timeout_s=400)
        print(f"ready after {time.monotonic() - began:.1f} s\n{running.printed()}")
        yield running


def test_both_answer(server: Server) -> None:
    chat = server.post("/v1/completions", model="chat", prompt="Once", max_tokens=16)
    assert chat.json()["usage"]["completion_tokens"] <= 16
    vector = server.post("/v1/embeddings", model="embed", input="x").json()["data"][0]["embedding"]
    assert len(vector) == 384


def test_the_kv_cache_is_what_was_planned(server: Server, plan: dict[str, Any]) -> None:
    log = next(server.registry.parent.glob("logs/*/model-chat.log")).read_text()
    line = next(line for line in log.splitlines() if "KV cache size" in line)
    tokens = int(line.split("KV cache size: ")[1].split(" tokens")[0].replace(",", ""))
    assert tokens == pytest.approx(plan["chat"]["kv_cache_tokens"], rel=0.02)
    bytes_per_token = 2 * 16 * 8 * 64 * 2  # key and value, layers, kv heads, head_dim, bfloat16
    assert tokens * bytes_per_token == pytest.approx(plan["chat"]["kv_cache_bytes"], rel=0.02)


def test_the_memory_is_what_was_planned(server: Server, plan: dict[str, Any]) -> None:
    assert server.process.poll() is None
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    used = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    planned = sum(plan[name]["total_bytes"] for name in ("chat", "embed"))
    assert int(used) * 2**20 == pytest.approx(planned, rel=0.05)


def test_what_cannot_start_is_told_in_a_line(server: Server) -> None:
    failed = [line for line in server.printed().splitlines() if line.startswith("empty: failed")]
    assert len(failed) == 1
    assert "Could not find checkpoint files" in failed[0]
    assert "Traceback" not in server.printed()


def test_the_end_leaves_nothing_on_the_gpu(server: Server) -> None:
    family = server.family()
    server.send(signal.SIGINT)
    assert server.process.wait(STOP_S) == 0
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    query = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    assert not {int(pid) for pid in listed if pid.isdigit()} & {p.pid for p in family}
