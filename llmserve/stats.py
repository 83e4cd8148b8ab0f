"""vLLM's Prometheus figures of one engine, in a registry of their own.

Left to itself vLLM's logger takes the process-wide registry and removes every other
engine's collectors from it (vllm/v1/metrics/prometheus.py, unregister_vllm_metrics),
and it observes the inter-token latency of every token by itself.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import partial
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.perf import PerfMetricsProm
from vllm.v1.spec_decode.metrics import SpecDecodingProm

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

_LAG_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Weighted(Histogram):
    """A histogram that takes a value several times in one call.

    prometheus_client has no such call; these are its own fields (metrics.py, observe).
    """

    def observe_many(self, value: float, count: int) -> None:
        self._sum.inc(value * count)
        self._buckets[bisect_left(self._upper_bounds, value)].inc(count)


def stat_logger(registry: CollectorRegistry) -> type[PrometheusStatLogger]:
    """The class of vLLM's logger for one engine."""
    gauge = staticmethod(partial(Gauge, registry=registry))
    counter = staticmethod(partial(Counter, registry=registry))
    histogram = staticmethod(partial(Weighted, registry=registry))

    class SpecDecoding(SpecDecodingProm):
        _counter_cls = counter

    class Perf(PerfMetricsProm):
        _counter_cls = counter

    class EngineLogger(PrometheusStatLogger):
        _gauge_cls = gauge
        _counter_cls = counter
        _histogram_cls = histogram
        _spec_decoding_cls = SpecDecoding
        _perf_metrics_cls = Perf

        def record(
            self,
            scheduler_stats: SchedulerStats | None,
            iteration_stats: IterationStats | None,
            mm_cache_stats: Any = None,
            engine_idx: int = 0,
        ) -> None:
            super().record(scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)
            for gap, count in getattr(iteration_stats, "gaps", ()):
                self.histogram_inter_token_latency[engine_idx].observe_many(gap, count)

    return EngineLogger


def stream_lag(registry: CollectorRegistry, model: str) -> Callable[[float], None]:
    """Takes the seconds from the engine's having a token to our having written it."""
    histogram = Histogram(
        "llmserve_stream_lag_seconds",
        "From the engine's step to its last event being written, once per write of a step.",
        ("model",),
        registry=registry,
        buckets=_LAG_BUCKETS_S,
    )
    observe: Callable[[float], None] = histogram.labels(model).observe
    return observe
