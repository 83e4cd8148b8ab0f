"""Starts and ends the three front ends, each on fake engine cores of its own."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from benchmarks import client, servers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

HOST = "127.0.0.1"
CHAT = "/v1/chat/completions"
MODEL = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct"
MAX_MODEL_LEN, MAX_NUM_SEQS = 2048, 1024
_START_S = 180.0
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Cores:
    """CPU cores: of the front end, of the fake engine cores, of the load client."""

    front: int = 0
    engine: int = 1
    client: int = 1


class Process:
    """A child with its output in a file; it is ended by its pid."""

    def __init__(
        self,
        command: list[str],
        log: Path,
        core: int,
        env: Mapping[str, str] | None = None,
        piped: bool = False,
        pass_fds: tuple[int, ...] = (),
        root: Path = _ROOT,
    ) -> None:
        self._log = log
        pipe = subprocess.PIPE if piped else None
        with pinned(core), log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                cwd=root,  # whose packages `python -m` imports
                env=os.environ | (env or {}),
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or file,
                stderr=file,
                pass_fds=pass_fds,
                start_new_session=True,  # Ctrl-C is for the benchmark, which ends its children
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def cpu_s(self) -> float:
        """CPU time of all threads, those that have ended too."""
        return time.clock_gettime((~self.pid << 3) | 2)  # CPUCLOCK_SCHED: its CPU-time clock

    def waited_s(self) -> float:
        """What threads that live would have run, had their CPU core been free."""
        waited = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with suppress(FileNotFoundError):  # it ends just now
                waited += int((task / "schedstat").read_text().split()[1])
        return waited / 1e9

    def check(self) -> None:
        """Raises RuntimeError with the end of its output if it has ended."""
        if self._process.poll() is not None:
            end = self._log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{self._process.args!r} ended:\n{end}")

    def ask(self, line: bytes) -> bytes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self.check()
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


class Core:
    """A fake engine core: one replica of a model."""

    def __init__(self, name: str, folder: Path, core: int, program: str) -> None:
        self.paths = folder / f"{name}.in", folder / f"{name}.out"
        self.process = Process(
            [sys.executable, "-m", f"benchmarks.{program}", *self.urls.values()],
            folder / f"{name}.core.log",
            core,
            piped=True,
        )

    @property
    def urls(self) -> dict[str, str]:
        inputs, outputs = self.paths
        return {"input_address": f"ipc://{inputs}", "output_address": f"ipc://{outputs}"}

    def set(self, **settings: float) -> dict[str, Any]:
        """Change its settings; returns its report since the last call (fake_core.py)."""
        report: dict[str, Any] = json.loads(self.process.ask(json.dumps(settings).encode()))
        return report


Engines = dict[str, list[Core]]  # by model, one for each replica


@dataclass
class Front:
    """A front end that answers."""

    name: str
    process: Process
    port: int
    cores: Engines

    @property
    def core(self) -> Core:
        return next(iter(self.cores.values()))[0]

    @property
    def model(self) -> str:
        return next(iter(self.cores))

    def ask(self, body: dict[str, Any]) -> asyncio.Task[client.Answer]:
        return asyncio.ensure_future(
            client.ask(HOST, self.port, CHAT, {"model": self.model} | body)
        )


@contextmanager
def front(
    kind: str,
    cores: Cores,
    models: Mapping[str, Mapping[str, Any]],
    vllm_rs: Path | None = None,
    program: str = "fake_core",
    before: Path | None = None,
) -> Iterator[Front]:
    """A front end of a kind, each replica of a model on a fake engine core, until the block ends.

    `models` has the keys of each model's entry besides the common ones; `program` is the engine
    core's. The kind "before" is llmserve of the checkout `before`.
    """
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="llmserve-bench-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        engines: Engines = {}
        for model, own in models.items():
            engines[model] = []
            for number in range(own.get("replicas", 1)):
                engine = Core(f"{model}.{number}", folder, cores.engine, program)
                stack.callback(engine.process.end)
                engines[model].append(engine)
        port = servers.free_port()
        if kind == "rust":
            assert vllm_rs is not None
            process = _rust(vllm_rs, folder, port, engines, cores.front)
        else:
            stock = kind == "stock"
            arguments = _stock(port, engines) if stock else _ours(folder, port, models, engines)
            line = [sys.executable, "-m", "benchmarks.attached", *arguments]
            root = before if kind == "before" and before else _ROOT
            process = Process(line, folder / "front.log", cores.front, root=root)
        stack.callback(process.end)
        started = Front(kind, process, port, engines)
        _wait_for(started)
        yield started


def _ours(
    folder: Path, port: int, models: Mapping[str, Mapping[str, Any]], engines: Engines
) -> list[str]:
    entry: dict[str, Any] = {
        "model": str(MODEL),
        "max_in_flight": 2048,
        "engine": {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": MAX_NUM_SEQS},
    }
    registry = folder / "models.yaml"
    server = {"host": HOST, "port": port, "log_dir": str(folder)}
    registry.write_text(
        yaml.safe_dump(
            {"server": server, "models": {name: {**entry, **own} for name, own in models.items()}}
        )
    )
    return ["ours", str(registry), _addresses(engines)]


def _stock(port: int, engines: Engines) -> list[str]:
    (name,) = engines
    return [
        "stock",
        _addresses(engines),
        *("--model", str(MODEL), "--served-model-name", name),
        *("--host", HOST, "--port", str(port), "--disable-uvicorn-access-log"),
        *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS)),
        "--enforce-eager",
    ]


def _addresses(engines: Engines) -> str:
    return json.dumps({name: [core.urls for core in each] for name, each in engines.items()})


def _rust(binary: Path, folder: Path, port: int, engines: Engines, core: int) -> Process:
    """vLLM's Rust front end as `vllm serve` starts it: RustFrontendProcessManager."""
    (name, (engine,)), *_ = engines.items()
    with ExitStack() as stack:
        http = stack.enter_context(socket.create_server((HOST, port), backlog=2048))
        inputs, outputs = (stack.enter_context(_unix_listener(path)) for path in engine.paths)
        arguments = {
            "model_tag": str(MODEL),
            "model": str(MODEL),
            "served_model_name": [name],
            "max_model_len": MAX_MODEL_LEN,
            "max_num_seqs": MAX_NUM_SEQS,
            "engine_ready_timeout_secs": 600,
            "http_timeout_keep_alive": 5,
        }
        line = [str(binary), "frontend", "--listen-fd", str(http.fileno())]
        line += ["--input-listener-fd", str(inputs.fileno())]
        line += ["--output-listener-fd", str(outputs.fileno())]
        line += ["--engine-start-index", "0", "--engine-count", "1", "--data-parallel-size", "1"]
        line += ["--args-json", json.dumps(arguments)]
        return Process(
            line,
            folder / "front.log",
            core,
            env={"TOKIO_WORKER_THREADS": "1"},
            pass_fds=(http.fileno(), inputs.fileno(), outputs.fileno()),
        )


def _unix_listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(128)
    return listener


def _wait_for(started: Front) -> None:
    """Until each model answers. Raises RuntimeError if it does not."""
    end = time.monotonic() + _START_S
    for model, cores in started.cores.items():
        while time.monotonic() < end:
            for process in (started.process, *(core.process for core in cores)):
                process.check()
            if asyncio.run(_answers(started, model)):
                break
            time.sleep(0.25)
        else:
            raise RuntimeError(f"{started.name} did not start in {_START_S:g} s")


async def _answers(started: Front, model: str) -> bool:
    body: dict[str, Any] = {"model": model, "max_tokens": 1, "stream": True}
    body["messages"] = [{"role": "user", "content": "Hello"}]
    try:
        answer = await asyncio.wait_for(started.ask(body), timeout=10)
    except TimeoutError:
        return False
    return not answer.error


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Run on one CPU core, and let children that are started here do so."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
