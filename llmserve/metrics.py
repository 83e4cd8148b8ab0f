"""llmserve's metrics, and the page that merges them with every engine's."""

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
            "Requests by requested model, endpoint and HTTP status.",
            ("model", "endpoint", "status"),
            registry=self.registry,
        )
        self.disconnects = Counter(
            "llmserve_disconnects",
            "Requests whose client disconnected before the answer was complete.",
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
            "1 for the current state of a replica.",
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
            "Load time of the last transition to ready, by starting level.",
            ("model", "replica", "level"),
            registry=self.registry,
        )
        self.evictions = Counter(
            "llmserve_evictions",
            "Evictions of a replica, by the level that it was lowered to.",
            ("model", "replica", "level"),
            registry=self.registry,
        )
        self.deaths = Counter(
            "llmserve_engine_deaths",
            "Engines that died, and failed starts after a death.",
            ("model", "replica"),
            registry=self.registry,
        )
        self.start_step_seconds = Gauge(
            "llmserve_model_start_step_seconds",
            "Duration of each step of a replica's last start.",
            ("model", "replica", "step"),
            registry=self.registry,
        )
        self.tokens_in_flight = Gauge(
            "llmserve_replica_tokens_in_flight",
            "Estimated tokens of a replica's requests in flight, prompts and answers.",
            ("model", "replica"),
            registry=self.registry,
        )
        self.dispatched = Counter(
            "llmserve_requests_dispatched",
            "Requests dispatched to a replica, by policy.",
            ("model", "replica", "policy"),
            registry=self.registry,
        )
        self.loop_lag = Histogram(
            "llmserve_event_loop_lag_seconds",
            "Delay of a timer of the event loop, which delays all streams.",
            buckets=_LAG_BUCKETS_S,
            registry=self.registry,
        )

    async def watch_loop(self, every_s: float = 0.25) -> None:
        """Measure `loop_lag` until cancelled."""
        while True:
            due = time.monotonic() + every_s
            await asyncio.sleep(every_s)
            try:
                self.loop_lag.observe(max(0.0, time.monotonic() - due))
            except Exception:
                log.exception("event-loop lag could not be recorded")

    def page(self, engines: Iterable[CollectorRegistry]) -> bytes:
        """The Prometheus text of this process, llmserve and all engines."""
        return generate_latest(_Merged([REGISTRY, self.registry, *engines]))


class _Merged(CollectorRegistry):
    """Merges several registries: families with the same name become one family.

    Engines cannot share collectors: some of vLLM's histograms have buckets that depend on the
    model, and a registry accepts a name only once.
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
