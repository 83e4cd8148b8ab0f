"""Fixtures of the contract tests: services over a real `AsyncLLM` on a fake engine core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from llmserve.engine import environment
from llmserve.http.services import Services
from llmserve.registry.spec import ModelSpec
from tests.contract.support import CHAT, EMBED, on_fake_core, services_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from llmserve.http.services import Services


@pytest.fixture(scope="session")
def engine_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session", autouse=True)
def engine_environment(engine_logs: Path) -> None:
    environment.prepare(engines=2, log_dir=engine_logs)
    missing = [folder.name for folder in (CHAT, EMBED) if not folder.is_dir()]
    if missing:
        pytest.fail(f"run `make models` first: {', '.join(missing)} missing")


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
        await serving.engine.client._compiler.close()
