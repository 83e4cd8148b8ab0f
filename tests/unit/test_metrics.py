from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.parser import text_string_to_metric_families

from llmserve.metrics import CONTENT_TYPE, Metrics
from tests.fakes import until


def engine(model: str, buckets: list[float]) -> CollectorRegistry:
    registry = CollectorRegistry()
    lengths = Histogram(
        "vllm:prompt_tokens", "Prompt.", ("model",), buckets=buckets, registry=registry
    )
    lengths.labels(model).observe(3)
    Counter("vllm:done", "Done.", ("model",), registry=registry).labels(model).inc()
    return registry


def test_engines_with_different_buckets_are_one_family() -> None:
    page = Metrics().page([engine("chat", [1, 2048]), engine("embed", [1, 16, 256])]).decode()
    families = list(text_string_to_metric_families(page))
    for name in ("vllm:prompt_tokens", "vllm:done"):
        assert [family.name for family in families].count(name) == 1
    assert page.count("# TYPE vllm:prompt_tokens histogram") == 1
    prompt = next(family for family in families if family.name == "vllm:prompt_tokens")
    assert prompt.type == "histogram"
    buckets = {
        model: [
            s.labels["le"]
            for s in prompt.samples
            if s.labels["model"] == model and "le" in s.labels
        ]
        for model in ("chat", "embed")
    }
    assert buckets == {"chat": ["1.0", "2048.0", "+Inf"], "embed": ["1.0", "16.0", "256.0", "+Inf"]}
    done = next(family for family in families if family.name == "vllm:done")
    assert {s.labels["model"]: s.value for s in done.samples if s.name.endswith("_total")} == {
        "chat": 1.0,
        "embed": 1.0,
    }


def test_page_is_text_format_with_this_process() -> None:
    page = Metrics().page([]).decode()
    names = {family.name for family in text_string_to_metric_families(page)}
    assert CONTENT_TYPE.startswith("text/plain")
    assert {"llmserve_requests", "llmserve_requests_in_flight", "python_info"} <= names


def test_two_servers_in_one_process_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.requests.labels("chat", "completions", 200).inc()
    labels = {"model": "chat", "endpoint": "completions", "status": "200"}
    assert first.registry.get_sample_value("llmserve_requests_total", labels) == 1
    assert second.registry.get_sample_value("llmserve_requests_total", labels) is None


async def test_blocked_loop_is_recorded_as_lag() -> None:
    metrics = Metrics()
    watching = asyncio.ensure_future(metrics.watch_loop(every_s=0.01))
    await asyncio.sleep(0)
    time.sleep(0.15)  # noqa: ASYNC251  # blocks the loop
    await asyncio.sleep(0.01)
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    assert metrics.registry.get_sample_value(
        "llmserve_event_loop_lag_seconds_sum"
    ) == pytest.approx(0.14, abs=0.1)


class Uncounted:
    """A histogram that fails at first."""

    def __init__(self) -> None:
        self.observed = 0

    def observe(self, _: float) -> None:
        self.observed += 1
        if self.observed == 1:
            raise RuntimeError("no metric")


async def test_watch_loop_continues_after_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    lag = Uncounted()
    metrics.loop_lag = lag  # type: ignore[assignment]
    watching = asyncio.create_task(metrics.watch_loop(0.001))
    await until(lambda: lag.observed > 2)
    watching.cancel()
    assert "event-loop lag could not be recorded" in caplog.text
