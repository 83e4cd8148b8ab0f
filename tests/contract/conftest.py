"""Engines inside the test process: a real `AsyncLLM` on a fake core, or on the CPU."""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import Popen
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from llmserve.engine import environment
from llmserve.engine.worker import plugin
from llmserve.http.services import Services
from llmserve.lifecycle.operator import ModelOperator
from llmserve.lifecycle.pool import Pool
from llmserve.lifecycle.timings import TIMINGS, LifecycleTimings
from llmserve.metrics import Metrics
from llmserve.registry.config import Config, ModelSpec, ServerSpec
from tests.fakes import FakeBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from llmserve.engine.handlers import ModelHandlers
    from llmserve.lifecycle.placement import Placement
    from llmserve.lifecycle.replica import Running, State

MODELS = Path(__file__).parents[2] / "models"
CHAT = MODELS / "SmolLM2-135M-Instruct"
EMBED = MODELS / "all-MiniLM-L6-v2"
FAKE_CORE = Path(__file__).with_name("fake_core.py")
STEP_S = 0.005  # of the fake core


@pytest.fixture(scope="session")
def engine_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session", autouse=True)
def engine_environment(engine_logs: Path) -> None:
    environment.prepare(engines=2, log_dir=engine_logs)
    missing = [folder.name for folder in (CHAT, EMBED) if not folder.is_dir()]
    if missing:
        pytest.fail(f"run `make models` first: {', '.join(missing)} missing")


@asynccontextmanager
async def on_fake_core(
    spec: ModelSpec, step_s: float = STEP_S, number: int = 0, task: str = "generate"
) -> AsyncIterator[tuple[ModelHandlers, Popen[bytes]]]:
    """vLLM's front end for a replica of `spec`, attached to a fake engine core."""
    from llmserve.engine.engine import Launcher
    from llmserve.engine.handlers import ModelHandlers

    names = [f"ipc://@llmserve-test-{uuid.uuid4().hex}" for _ in range(2)]
    addresses = {"input_address": names[0], "output_address": names[1]}
    launcher = Launcher(Path(os.environ[plugin.LOG_DIR]))
    core = _fake_core(*names, str(step_s), task)
    try:
        engine = await asyncio.to_thread(launcher.start, spec, number, addresses)
        serving = await ModelHandlers.build(spec, engine)
        yield serving, core
        await serving.stop()
    finally:
        launcher.stop()
        core.kill()
        core.wait()


def _fake_core(*arguments: str) -> Popen[bytes]:
    return Popen([sys.executable, str(FAKE_CORE), *arguments], env=os.environ)


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


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def fake() -> AsyncIterator[Any]:
    spec = ModelSpec(
        name="chat", model=str(CHAT), aliases=("alias",), engine={"max_model_len": 2048}
    )
    async with on_fake_core(spec) as (serving, _):
        yield await services_of([spec], {"chat": serving})


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def calling() -> AsyncIterator[Services]:
    """A model with a tool parser, whose constraints are compiled."""
    spec = ModelSpec(
        name="chat",
        model=str(CHAT),
        engine={"max_model_len": 2048},
        tool_call_parser="hermes",
    )
    async with on_fake_core(spec) as (serving, _):
        yield await services_of([spec], {"chat": serving})
        await serving.engine.client._grammars.close()
