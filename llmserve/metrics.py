"""Our own figures, and one page of them with those of every engine."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.metrics_core import Metric

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

log = logging.getLogger(__name__)
CONTENT_TYPE = CONTENT_TYPE_LATEST
_LAG_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "llmserve_requests",
            "Requests by model asked for, endpoint and HTTP status.",
            ("model", "endpoint", "status"),
            registry=self.registry,
        )
        self.disconnects = Counter(
            "llmserve_disconnects",
            "Requests whose client left before the answer was complete.",
            ("model", "endpoint"),
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "llmserve_requests_in_flight",
            "Requests that hold a slot of a model, queued and running.",
            ("model",),
            registry=self.registry,
        )
        self.state = Gauge(
            "llmserve_model_state",
            "1 for the state a replica of a model is in.",
            ("model", "replica", "state"),
            registry=self.registry,
        )
        self.queued = Gauge(
            "llmserve_requests_queued",
            "Requests that wait for a slot or for their model, in order of arrival.",
            ("model",),
            registry=self.registry,
        )
        self.ready_seconds = Gauge(
            "llmserve_model_ready_seconds",
            "How long a replica last took to be ready, by where it came from.",
            ("model", "replica", "level"),
            registry=self.registry,
        )
        self.evictions = Counter(
            "llmserve_evictions",
            "Replicas that gave way to another, by where they went.",
            ("model", "replica", "level"),
            registry=self.registry,
        )
        self.deaths = Counter(
            "llmserve_engine_deaths",
            "Engines that died; each is started again, until it died too often in a row.",
            ("model", "replica"),
            registry=self.registry,
        )
        self.start_step_seconds = Gauge(
            "llmserve_model_start_step_seconds",
            "Where the seconds of a replica's last start went.",
            ("model", "replica", "step"),
            registry=self.registry,
        )
        self.tokens_in_flight = Gauge(
            "llmserve_replica_tokens_in_flight",
            "Estimated tokens, prompts and answers, of a replica's requests in flight.",
            ("model", "replica"),
            registry=self.registry,
        )
        self.dispatched = Counter(
            "llmserve_requests_dispatched",
            "Requests that a replica was chosen for, by the model's policy.",
            ("model", "replica", "policy"),
            registry=self.registry,
        )
        self.loop_lag = Histogram(
            "llmserve_event_loop_lag_seconds",
            "How late the event loop ran a timer: all streams wait this long.",
            buckets=_LAG_BUCKETS_S,
            registry=self.registry,
        )

    async def watch_loop(self, every_s: float = 0.25) -> None:
        """Feed `loop_lag` until cancelled."""
        while True:
            due = time.monotonic() + every_s
            await asyncio.sleep(every_s)
            try:
                self.loop_lag.observe(max(0.0, time.monotonic() - due))
            except Exception:
                log.exception("the event loop's lag could not be counted")

    def page(self, engines: Iterable[CollectorRegistry]) -> bytes:
        """The Prometheus text of this process, ours and every engine's, side by side."""
        return generate_latest(_Merged([REGISTRY, self.registry, *engines]))


class _Merged(CollectorRegistry):
    """Several registries as one: families of the same name become one family.

    Engines must not share collectors: some of vLLM's histograms have buckets that
    depend on the model, and a registry holds a name only once.
    """

    def __init__(self, parts: Iterable[CollectorRegistry]) -> None:
        super().__init__()
        self._parts = tuple(parts)

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for part in self._parts:
            for family in part.collect():
                known = families.get(family.name)
                if known is None:
                    known = Metric(family.name, family.documentation, family.type, family.unit)
                    families[family.name] = known
                known.samples.extend(family.samples)
        yield from families.values()
