"""Two replicas of one model behind our routes, each vLLM's front end on a fake core."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from llmserve.engine.worker import plugin
from llmserve.http import app
from llmserve.registry.spec import ModelSpec
from tests.contract.support import CHAT, on_fake_core, services_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from prometheus_client.samples import Sample

    from llmserve.http.services import Services

CHATS, RESPONSES = "/v1/chat/completions", "/v1/responses"


def twins(**said: Any) -> ModelSpec:
    return ModelSpec(
        name="chat", model=str(CHAT), replicas=2, engine={"max_model_len": 2048} | said
    )


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def services() -> AsyncIterator[Services]:
    spec = twins()
    async with (
        on_fake_core(spec, number=0) as (first, _),
        on_fake_core(spec, number=1) as (second, _),
    ):
        yield await services_of([spec], {"chat": [first, second]})


@asynccontextmanager
async def client_of(services: Services) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app.build(services))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        yield client


async def chat(client: httpx.AsyncClient, **said: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "Hello there, how are you?"}]
    return await client.post(CHATS, json={"model": "chat", "messages": messages} | said)


async def page_of(client: httpx.AsyncClient) -> list[Sample]:
    """Every sample of /metrics."""
    text = (await client.get("/metrics")).text
    return [s for family in text_string_to_metric_families(text) for s in family.samples]


def of(samples: list[Sample], name: str, by: str) -> dict[str, float]:
    return {s.labels[by]: s.value for s in samples if s.name == name}


async def test_the_figures_of_replicas_are_told_apart_on_one_valid_page(services: Services) -> None:
    async with client_of(services) as client:
        before = of(await page_of(client), "vllm:generation_tokens_total", "engine")
        for said in ({}, {}, {"stream": True}, {"stream": True}):
            assert (await chat(client, max_tokens=7, **said)).status_code == 200
        samples = await page_of(client)
    seen = Counter((s.name, frozenset(s.labels.items())) for s in samples)
    assert [one for one, count in seen.items() if count > 1] == []
    tokens = of(samples, "vllm:generation_tokens_total", "engine")
    assert {engine: tokens[engine] - before[engine] for engine in tokens} == {"0": 14, "1": 14}
    for name in ("vllm:cache_config_info", "vllm:num_requests_running"):
        assert of(samples, name, "engine").keys() == {"0", "1"}
    for sample in samples:
        if sample.name.startswith("vllm:") and "tool" not in sample.name:
            assert sample.labels["model_name"] == "chat", sample
            assert sample.labels["engine"] in {"0", "1"}, sample
    lags = of(samples, "llmserve_stream_lag_seconds_count", "replica")
    assert lags["0"] > 0
    assert lags["1"] > 0
    dispatched = of(samples, "llmserve_requests_dispatched_total", "replica")
    assert dispatched["0"] == dispatched["1"]
    assert of(samples, "llmserve_replica_tokens_in_flight", "replica") == {"0": 0, "1": 0}


async def test_models_with_adapters_and_the_same_cache_are_told_apart() -> None:
    """Some families of vLLM's have neither model nor engine among their labels."""
    from llmserve.engine.engine_arguments import engine_arguments
    from llmserve.engine.metrics import EngineMetrics
    from llmserve.metrics import Metrics

    config = engine_arguments(twins(enable_lora=True)).create_engine_config()
    registries = []
    for figures in (
        EngineMetrics("chat"),
        EngineMetrics("chat", 1),
        EngineMetrics("draft"),
        EngineMetrics("wide", 1, 2),
    ):
        logger = figures.logger_class(config, [0])
        logger.log_engine_initialized()
        logger.gauge_lora_info.labels(1, "", "").set(1)
        registries.append(figures.registry)
    text = Metrics().page(registries).decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    for name in ("vllm:cache_config_info", "vllm:lora_requests_info"):
        labels = [(s.labels["model_name"], s.labels["engine"]) for s in samples if s.name == name]
        assert labels == [("chat", "0"), ("chat", "1"), ("draft", "0"), ("wide", "2")]


async def test_a_response_is_found_whichever_replica_gave_it(services: Services) -> None:
    async with client_of(services) as client:

        async def respond(**said: Any) -> dict[str, Any]:
            body = {"model": "chat", "input": "hi", "max_output_tokens": 4} | said
            reply = await client.post(RESPONSES, json=body)
            assert reply.status_code == 200, reply.text
            answer: dict[str, Any] = reply.json()
            return answer

        for _ in range(2):
            made = await respond()
            again = (await client.get(f"{RESPONSES}/{made['id']}")).json()
            assert again["output"] == made["output"]
            for _ in range(2):  # one of them by the other replica
                assert (await respond(previous_response_id=made["id"]))["status"] != "failed"
            slow = await respond(max_output_tokens=1500, background=True)
            cancelled = await client.post(f"{RESPONSES}/{slow['id']}/cancel")
            assert cancelled.json()["status"] == "cancelled"
    async with asyncio.timeout(60):
        while any(replica.load.tokens for replica in services.pool.replicas):
            await asyncio.sleep(0.02)


def test_replicas_share_what_torch_compile_has_made() -> None:
    from llmserve.engine.engine_arguments import engine_arguments

    config = engine_arguments(twins()).create_engine_config()
    assert plugin._replica_of(config.instance_id) is None
    before = config.compute_hash()
    config.instance_id = plugin.instance_of(1, config.instance_id)
    assert plugin._replica_of(config.instance_id) == 1
    assert config.compute_hash() == before


def test_each_replica_s_engine_core_is_told_its_log(
    engine_logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    from llmserve.engine.launcher import Launcher
    from llmserve.errors import StartupError

    configs: list[Any] = []

    def noted(config: Any, **_: Any) -> None:
        configs.append(config)
        raise RuntimeError("not in this test")

    monkeypatch.setattr(AsyncLLM, "from_vllm_config", noted)
    launcher = Launcher(engine_logs)
    alone = twins().model_copy(update={"replicas": 1})
    for spec, number in ((twins(), 0), (twins(), 1), (alone, 0)):
        with pytest.raises(StartupError, match="not in this test"):
            launcher.start(spec, number)
    assert [plugin._replica_of(config.instance_id) for config in configs] == [0, 1, None]
    assert len({config.instance_id for config in configs}) == 3
    logs = [launcher.log_of(twins(), 0), launcher.log_of(twins(), 1), launcher.log_of(alone, 0)]
    assert [log.name for log in logs] == ["model-chat+0.log", "model-chat+1.log", "model-chat.log"]
