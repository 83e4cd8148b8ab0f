"""Helpers of the contract tests: models, engines on a fake core, requests, vLLM's source."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
import sys
import uuid
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from typing import TYPE_CHECKING, Any

import httpx

from llmserve.engine.worker import plugin
from llmserve.http import app
from llmserve.http.services import Services
from llmserve.lifecycle.operator import ModelOperator
from llmserve.lifecycle.pool import Pool
from llmserve.lifecycle.timings import TIMINGS, LifecycleTimings
from llmserve.metrics import Metrics
from llmserve.registry.spec import Config, ModelSpec, ServerSpec
from tests.fakes import FakeBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from llmserve.engine.handlers import ModelHandlers
    from llmserve.lifecycle.placement import Placement
    from llmserve.lifecycle.replica import Running, State

MODELS = Path(__file__).parents[2] / "models"
CHAT = MODELS / "SmolLM2-135M-Instruct"
EMBED = MODELS / "all-MiniLM-L6-v2"
STEP_S = 0.005  # of the fake core
HELLO = [{"role": "user", "content": "Hello there, how are you?"}]
CHATS = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@asynccontextmanager
async def on_fake_core(
    spec: ModelSpec, step_s: float = STEP_S, number: int = 0, task: str = "generate"
) -> AsyncIterator[tuple[ModelHandlers, Popen[bytes]]]:
    """vLLM's front end for a replica of `spec`, attached to a fake engine core."""
    from llmserve.engine.handlers import ModelHandlers
    from llmserve.engine.launcher import Launcher

    names = [f"ipc://@llmserve-test-{uuid.uuid4().hex}" for _ in range(2)]
    addresses = {"input_address": names[0], "output_address": names[1]}
    launcher = Launcher(Path(os.environ[plugin.LOG_DIR]))
    core = _fake_core(*names, "--step-ms", str(1000 * step_s), "--task", task)
    try:
        engine = await asyncio.to_thread(launcher.start, spec, number, addresses)
        serving = await ModelHandlers.build(spec, engine)
        yield serving, core
        await serving.stop()
    finally:
        launcher.stop()
        core.kill()
        core.communicate()


def _fake_core(*arguments: str) -> Popen[bytes]:
    line = [sys.executable, "-m", "tests.contract.fake_core", *arguments]
    return Popen(line, stdin=PIPE, cwd=MODELS.parent)  # it ends with its stdin


class Started(FakeBackend):
    """A backend for models that run already, each by its name or, of several, all replicas."""

    def __init__(self, running: dict[str, Any]) -> None:
        super().__init__()
        self._running = running

    async def start(
        self, spec: ModelSpec, placement: Placement, report: Callable[[State, str], None]
    ) -> Running:
        found = self._running[spec.name]
        running: Running = found[placement.number] if spec.replicas > 1 else found
        return running


async def services_of(
    specs: list[ModelSpec], running: dict[str, Any], timings: LifecycleTimings = TIMINGS
) -> Services:
    metrics = Metrics()
    backend = Started(running)
    pool = Pool(specs, backend, metrics, timings=timings)
    await pool.start()
    config = Config(file=Path("models.yaml"), server=ServerSpec(), models=tuple(specs))
    control = ModelOperator(config.server, pool, backend, lambda: config)
    return Services(pool, metrics, control)


def events(text: str) -> list[Any]:
    """The data of each event; [DONE] as it is."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [d if d == "[DONE]" else json.loads(d) for d in data]


async def post(services: Services, path: str, **body: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app.build(services))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        return await client.post(path, json={"model": "chat"} | body)


async def get(services: Services, path: str) -> httpx.Response:
    transport = httpx.ASGITransport(app.build(services))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        return await client.get(path)


def running(services: Services) -> Any:
    return services.pool.models["chat"].running


def spec(**more: Any) -> ModelSpec:
    return ModelSpec(name="chat", model=str(CHAT), **more)


def source(name: str) -> str:
    """A file of vLLM's, which may not be importable without CUDA."""
    import vllm

    return (Path(vllm.__file__).parent / name).read_text(encoding="utf-8")


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """Without annotations, which vLLM does not write everywhere."""
    each = inspect.signature(function).parameters.values()
    return [(one.name, one.kind, one.default) for one in each]


def class_of(file: str, name: str) -> dict[str, ast.FunctionDef]:
    """The methods of a class, by name."""
    (found,) = (
        node
        for node in ast.parse(source(file)).body
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    return {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}


def core_processes(config: Any) -> Any:
    """vLLM's process of an engine core, whose server does not answer."""
    from vllm.v1.engine.utils import CoreEngineProcManager  # after `prepare`
    from vllm.v1.executor import Executor  # after `prepare`

    return CoreEngineProcManager(
        local_engine_count=1,
        start_index=0,
        local_start_index=0,
        vllm_config=config,
        local_client=True,
        handshake_address="ipc://@llmserve-no-server",
        executor_class=Executor.get_class(config),
        log_stats=False,
    )
