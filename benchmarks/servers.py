"""The servers that a benchmark measures: given by URL, or started here and ended again."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import psutil
import yaml

from llmserve.engine import environment
from llmserve.engine.worker import plugin

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llmserve.registry.spec import ModelSpec

HOST = "127.0.0.1"
STOP_S = 30
STARTS = ("ours", "stock", "rust")

# What a registry says in keys of its own and vLLM's server in flags of the same name.
_SAME = ("tensor_parallel_size", "pipeline_parallel_size", "gpu_memory_utilization")
_CPU = {"kv_cache_memory_bytes": 1 << 30, "enforce_eager": True}  # as llmserve/engine/engine.py

Addresses = dict[str, tuple[str, int]]  # by model


@dataclass(frozen=True)
class Side:
    """One of what is compared: a server to start, or one that runs."""

    label: str
    start: str = ""  # one of STARTS
    url: str = ""

    @classmethod
    def parse(cls, text: str, letter: str = "") -> Side:
        """`ours`, `stock`, `rust`, `start:NAME` or `url:URL`. Raises ValueError."""
        kind, _, value = text.partition(":")
        if kind == "url":
            address = urlsplit(value)
            if address.scheme != "http" or not address.hostname:
                raise ValueError(f"{value} is no URL such as http://127.0.0.1:8000")
            return cls(f"{letter} {address.netloc}".strip(), url=value)
        name = value if kind == "start" else text
        if name not in STARTS:
            raise ValueError(f"{text} is none of {', '.join(STARTS)}, start:NAME, url:URL")
        return cls(f"{letter} {name}".strip(), start=name)


@dataclass(frozen=True)
class Starting:
    """How servers are started."""

    specs: Sequence[ModelSpec]
    stock_args: Sequence[str]
    wait_s: float


@contextlib.contextmanager
def running(side: Side, models: Sequence[str], starting: Starting) -> Iterator[Addresses]:
    """Where each model answers. What was started for it ends with the block."""
    if side.url:
        address = urlsplit(side.url)
        yield dict.fromkeys(models, (address.hostname or HOST, address.port or 80))
        return
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        start = _ours if side.start == "ours" else partial(_vllm, rust=side.start == "rust")
        yield start(starting, folder, stack)


def _ours(starting: Starting, folder: Path, stack: contextlib.ExitStack) -> Addresses:
    """`llmserve up` with the measured models alone: others would take cores and memory."""
    port = free_port()
    content = {
        "server": {"host": HOST, "port": port, "log_dir": str(folder)},
        "models": {spec.name: _entry(spec) for spec in starting.specs},
    }
    registry = folder / "models.yaml"
    registry.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "llmserve", "up", str(registry)]
    log = folder / "ours.out"
    process = stack.enter_context(_process(command, dict(os.environ), log))
    _until_ready(process, f"http://{HOST}:{port}/ready", log, starting.wait_s)
    return dict.fromkeys((spec.name for spec in starting.specs), (HOST, port))


def _vllm(
    starting: Starting, folder: Path, stack: contextlib.ExitStack, *, rust: bool
) -> Addresses:
    """vLLM's own server, one for each model, with the environment that `llmserve up` makes.

    `rust`: with its Rust front end, which only the `vllm` command starts.
    """
    env = dict(os.environ)
    environment.prepare(len(starting.specs), folder, env)
    del env[plugin.LOG_DIR]
    if rust:
        env["VLLM_USE_RUST_FRONTEND"] = "1"
    addresses: Addresses = {}
    # One after the other: vLLM measures a GPU's free memory while it starts.
    for spec in starting.specs:
        port = free_port()
        command = stock_command(spec, port, rust=rust)
        command += [] if rust else starting.stock_args
        log = folder / f"vllm-{port}.out"
        process = stack.enter_context(_process(command, env, log))
        _until_ready(process, f"http://{HOST}:{port}/health", log, starting.wait_s)
        addresses[spec.name] = (HOST, port)
    return addresses


def stock_command(spec: ModelSpec, port: int, *, rust: bool = False) -> list[str]:
    """vLLM's server with the engine arguments that llmserve gives this entry."""
    flags: dict[str, Any] = {name: getattr(spec, name) for name in _SAME}
    flags |= {"kv_cache_memory_bytes": spec.kv_cache, "device_ids": spec.devices}
    flags |= {"reasoning_parser": spec.reasoning_parser, "tool_call_parser": spec.tool_call_parser}
    flags["enable_auto_tool_choice"] = True if spec.tool_call_parser else None
    if environment.is_cpu_build():
        flags["device_ids"] = None
        flags |= {name: value for name, value in _CPU.items() if flags.get(name) is None}
    flags |= spec.engine
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model"]
    if rust:
        command = ["vllm", "serve"]
    command += [spec.model, "--host", HOST, "--port", str(port)]
    command += ["--served-model-name", *spec.names]
    return command + [part for name, value in flags.items() for part in _flag(name, value)]


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, dict):
        return [f"--{flag}", json.dumps(value)]
    values = value if isinstance(value, (list, tuple)) else [value]
    return [f"--{flag}", *map(str, values)]


def _entry(spec: ModelSpec) -> dict[str, Any]:
    """A registry's entry again, its folders absolute."""
    return spec.model_dump(mode="json", exclude_defaults=True, exclude={"name"})


def free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def _process(command: list[str], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with the block, and with it those that it started."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is for the benchmark, which then ends the server
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """SIGTERM and some time; what is left then, or when this is interrupted, is killed."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    try:
        process.terminate()
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        print(f"the server had not ended after {STOP_S} s and was killed", file=sys.stderr)
    finally:
        if process.poll() is None:  # with what it started since
            family += psutil.Process(process.pid).children(recursive=True)
            process.kill()
        for left in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()


def _until_ready(process: subprocess.Popen[str], url: str, log: Path, wait_s: float) -> None:
    end = time.monotonic() + wait_s
    with httpx.Client(timeout=5, trust_env=False) as client:  # one: making one costs much
        while time.monotonic() < end:
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}:\n{_last_lines(log)}")
            with contextlib.suppress(httpx.TransportError):
                reply = client.get(url)
                if reply.is_success:
                    return
                if '"failed"' in reply.text:  # llmserve serves the other models
                    raise SystemExit(f"a model did not start: {reply.text}\n{_last_lines(log)}")
            time.sleep(0.25)
    raise SystemExit(f"the server was not ready after {wait_s:g} s:\n{_last_lines(log)}")


def _last_lines(log: Path, count: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])
