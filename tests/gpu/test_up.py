"""`llmserve up` on a GPU: two models share it, from the command to the answer.

The weights are made up (`load_format: dummy`): what is shown is that engines start
together, get the KV cache that the registry says, and answer.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.integration.conftest import CHAT, EMBED, STOP_S, Server, write_registry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KV_GIB = 8


def gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpus(), reason="no NVIDIA GPU here (nvidia-smi lists none)"),
]


def shape_of_1b(folder: Path) -> str:
    """A folder with the demo chat model's tokenizer and the shape of a 1B Llama."""
    shutil.copytree(CHAT, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 8192,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("gpu")
    dummy = {"load_format": "dummy"}
    models = {
        "chat": {
            "model": shape_of_1b(folder / "1b"),
            "devices": [gpus()[0]],
            "gpu_memory_utilization": 0.3,
            "kv_cache": f"{KV_GIB}GiB",
            "engine": dummy | {"max_model_len": 4096},
        },
        "embed": {"model": EMBED, "devices": [0], "memory": "6GiB", "engine": dummy},
        "absurd": {
            "model": EMBED,
            "devices": [0],
            "gpu_memory_utilization": 0.1,
            "engine": dummy | {"max_model_len": 10**6},
        },
    }
    with Server(write_registry(folder, models=models)) as running:
        began = time.monotonic()
        running.wait_for("Serving", timeout_s=400)
        print(f"ready after {time.monotonic() - began:.1f} s\n{running.printed()}")
        yield running


def test_both_answer(server: Server) -> None:
    chat = server.post("/v1/completions", model="chat", prompt="Once", max_tokens=16)
    assert chat.json()["usage"]["completion_tokens"] <= 16
    vector = server.post("/v1/embeddings", model="embed", input="x").json()["data"][0]["embedding"]
    assert len(vector) == 384


def test_the_kv_cache_is_what_the_registry_says(server: Server) -> None:
    log = next(server.registry.parent.glob("logs/*/model-chat.log")).read_text()
    tokens = next(line for line in log.splitlines() if "KV cache size" in line)
    count = int(tokens.split("KV cache size: ")[1].split(" tokens")[0].replace(",", ""))
    bytes_per_token = 2 * 16 * 8 * 64 * 2  # key and value, layers, kv heads, head_dim, bfloat16
    assert count * bytes_per_token == pytest.approx(KV_GIB * 2**30, rel=0.02)


def test_what_cannot_start_is_told_in_a_line(server: Server) -> None:
    failed = [line for line in server.printed().splitlines() if line.startswith("absurd: failed")]
    assert len(failed) == 1
    assert "max_model_len" in failed[0]
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
