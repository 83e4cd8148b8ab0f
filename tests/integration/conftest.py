"""`llmserve up` as a user runs it: a process, a real socket, real engines."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx
import psutil
import pytest
import yaml

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Iterator
    from types import TracebackType

MODELS = Path(os.environ.get("LLMSERVE_TEST_MODELS", Path(__file__).parents[2] / "models"))
CHAT = str(MODELS / "SmolLM2-135M-Instruct")
EMBED = str(MODELS / "all-MiniLM-L6-v2")
START_S = 500
STOP_S = 120
SHARED = Path("/dev/shm")


@dataclass
class Server:
    """A running `llmserve up` and what it printed."""

    registry: Path
    python: str = sys.executable
    temporary: Path | None = None  # its TMPDIR, short enough for sockets
    process: subprocess.Popen[str] = field(init=False)
    output: Path = field(init=False)

    def __enter__(self) -> Self:
        self.output = self.registry.with_suffix(".out")
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                [self.python, "-m", "llmserve", "up", str(self.registry)],
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | ({"TMPDIR": str(self.temporary)} if self.temporary else {}),
                start_new_session=True,  # a terminal's Ctrl-C reaches a whole group: ours only
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        family = self.family()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        for left in family:
            if left.is_running():
                left.kill()

    def printed(self) -> str:
        return self.output.read_text()

    def wait_for(self, text: str, timeout_s: float = START_S) -> str:
        """Everything printed, once `text` (a pattern) is part of it."""
        end = time.monotonic() + timeout_s
        while not re.search(text, self.printed()):
            assert self.process.poll() is None, f"ended early:\n{self.printed()}"
            assert time.monotonic() < end, f"no {text!r} in:\n{self.printed()}"
            time.sleep(0.05)
        return self.printed()

    def ready(self) -> Self:
        self.wait_for(r"Serving .* on http")
        return self

    @property
    def url(self) -> str:
        found = re.search(r"Listening on (\S+),", self.wait_for("Listening on"))
        assert found is not None
        return found[1]

    def family(self) -> list[psutil.Process]:
        """The processes below the server."""
        try:
            below: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return below

    def engines(self) -> list[psutil.Process]:
        return [each for each in self.family() if self._is_engine(each)]

    def _is_engine(self, process: psutil.Process) -> bool:
        """Whether a process is an engine that runs; a zombie does not."""
        try:
            is_core = "VLLM::EngineCor" in process.name()  # the kernel keeps 15 characters
            return is_core and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry `labels`."""
        page = httpx.get(f"{self.url}/metrics", timeout=10).text
        total = 0.0
        for line in page.splitlines():
            sample, _, value = line.rpartition(" ")
            if re.match(rf"{re.escape(name)}(\{{|$)", sample) and all(
                f'{key}="{wanted}"' in sample for key, wanted in labels.items()
            ):
                total += float(value)
        return total

    def running(self, model: str) -> float:
        """Requests in the model's batches, by vLLM's own count."""
        return self.metric("vllm:num_requests_running", model_name=model)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=START_S)


def until(holds: Callable[[], bool], within_s: float = 60) -> None:
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, f"not within {within_s} s"
        time.sleep(0.05)


def left_in(temporary: Path) -> set[str]:
    """Without what torch keeps for later, and what torch.distributed's processes share."""
    names = {each.name for each in temporary.iterdir()}
    return {each for each in names if not each.startswith(("torchinductor_", "vllm_dist_"))}


def shared_by(family: list[psutil.Process]) -> list[str]:
    """What these processes left in shared memory; a pid comes again."""
    began = {str(each.pid): each.create_time() for each in family}
    return [
        each.name
        for each in SHARED.glob("__KMP_REGISTERED_LIB_*")
        if each.stat().st_mtime >= began.get(each.name.split("_")[5], math.inf)
    ]


def write_registry(folder: Path, name: str = "models.yaml", **content: Any) -> Path:
    server = {"port": 0, "log_dir": str(folder / "logs")} | content.pop("server", {})
    file = folder / name
    file.write_text(yaml.safe_dump({"server": server, **content}))
    return file


def rewrite(registry: Path, name: str, **changes: Any) -> None:
    """Change an entry of a registry on disk."""
    content = yaml.safe_load(registry.read_text())
    content["models"][name] |= changes
    registry.write_text(yaml.safe_dump(content))


def write_certificate(folder: Path, *options: str) -> dict[str, str]:
    """Write `cert.pem` and `key.pem`; return the keys of `server` for them."""
    line = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-subj", "/CN=localhost", *options]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run([*line, *files], check=True, capture_output=True)
    return {"ssl_certfile": "cert.pem", "ssl_keyfile": "key.pem"}


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder of servers; short enough for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def write_lora(folder: Path) -> str:
    """An adapter for the demo chat model with other answers."""
    import torch
    from safetensors.torch import save_file

    shape = json.loads((Path(CHAT) / "config.json").read_text())
    hidden, rank = shape["hidden_size"], 8
    torch.manual_seed(1)
    weights = {}
    for layer in range(shape["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(rank, hidden) * 0.3
        weights[f"{name}.lora_B.weight"] = torch.randn(hidden, rank) * 0.3
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": CHAT,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Both demo models, with aliases, an adapter and a tool parser."""
    folder = tmp_path_factory.mktemp("server")
    registry = write_registry(
        folder,
        server={"drain_timeout": 600},  # a slow CPU takes long for what a test lets finish
        models={
            "chat": {
                "model": CHAT,
                "aliases": ["gpt-4o-mini", "chat@2025-10"],
                "kv_cache": "512MiB",
                "tool_call_parser": "hermes",
                "loras": {"twisted": write_lora(folder / "twisted")},
                "engine": {"max_model_len": 2048, "max_num_seqs": 32, "dtype": "float32"},
            },
            "embed": {"model": EMBED},
        },
    )
    with (
        tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as temporary,
        Server(registry, temporary=Path(temporary)) as running,
    ):
        yield running.ready()
