"""vLLM's Prometheus metrics of one engine, in a registry of their own.

vLLM's logger uses the process-wide registry by default and removes the collectors of other
engines from it (vllm/v1/metrics/prometheus.py, unregister_vllm_metrics). It also observes the
inter-token latency of each token separately.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.v1.metrics.loggers import (
    LoggingStatLogger,
    PerEngineStatLoggerAdapter,
    PrometheusStatLogger,
)
from vllm.v1.metrics.perf import PerfMetricsProm
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.spec_decode.metrics import SpecDecodingProm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.metrics_core import Metric
    from prometheus_client.samples import Sample
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.stats import IterationStats

RECORD_S = 1.0  # between two updates of the metrics
_LAG_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class WeightedHistogram(Histogram):
    """A histogram that collects values and records them together.

    prometheus_client visits all buckets for each value, with a lock for each count. The private
    fields used here are those of Histogram.observe (prometheus_client/metrics.py).
    """

    def _metric_init(self) -> None:
        super()._metric_init()
        self._pending: list[float] = []

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        if exemplar is None:
            self._pending.append(amount)
        else:
            super().observe(amount, exemplar)

    def observe_many(self, amount: float, count: int) -> None:
        self._sum.inc(amount * count)
        self._buckets[bisect_left(self._upper_bounds, amount)].inc(count)

    def record_pending(self) -> None:
        if not self._pending:
            return
        values, self._pending = sorted(self._pending), []
        self._sum.inc(sum(values))
        done = 0
        for bound, bucket in zip(self._upper_bounds, self._buckets, strict=True):
            if done == len(values):
                break
            upto = bisect_right(values, bound, done)
            if upto > done:
                bucket.inc(upto - done)
            done = upto

    def _child_samples(self) -> Iterable[Sample]:
        self.record_pending()
        return super()._child_samples()


class EngineMetrics:
    """One replica's registry, and the class of vLLM's logger that writes into it.

    `cores` are the engine cores of each replica: more than one with data parallelism.

    The statistics of steps are summed and recorded each RECORD_S: recording a step costs as much
    as carrying some dozens of tokens. Statistics without a sum are recorded at once.
    """

    def __init__(self, model: str, replica: int = 0, cores: int = 1) -> None:
        self.registry = _LabelledRegistry(model, replica * cores)
        self._labels = (model, replica)
        self.logger_class = _logger_class(self)
        self.record_pending: Callable[[], None] = lambda: None  # set by the logger

    def take_over(self, client: AsyncLLM) -> None:
        """Remove vLLM's loggers of log lines, which only `AsyncLLM.do_log_stats` would write."""
        manager = client.logger_manager
        if manager is not None:
            manager.stat_loggers = [
                each for each in manager.stat_loggers if not _writes_lines(each)
            ]

    def stream_lag(self) -> Callable[[float], None]:
        """Return a function that observes the seconds from an engine step to the write of its text."""
        histogram = WeightedHistogram(
            "llmserve_stream_lag_seconds",
            "From the engine's step to its last event being written, once per write of a step.",
            ("model", "replica"),
            registry=self.registry,
            buckets=_LAG_BUCKETS_S,
        )
        return partial(histogram.labels(*self._labels).observe_many, count=1)


def _writes_lines(logger: Any) -> bool:
    if isinstance(logger, PerEngineStatLoggerAdapter):
        return all(map(_writes_lines, logger.per_engine_stat_loggers.values()))
    return isinstance(logger, LoggingStatLogger)


class _LabelledRegistry(CollectorRegistry):
    """vLLM's samples with labels that distinguish models and replicas.

    Each AsyncLLM counts its engine cores from 0, and some families have neither a model nor an
    engine label (vllm/v1/metrics/loggers.py: cache_config_info, lora_requests_info). A page with
    two samples of the same name and labels is invalid.
    """

    def __init__(self, model: str, first_engine: int) -> None:
        super().__init__()
        self._model = model
        self._first_engine = first_engine

    def collect(self) -> Iterator[Metric]:
        for family in super().collect():
            if family.name.startswith("vllm:"):
                family.samples = [
                    sample._replace(labels=self._labels_of(sample)) for sample in family.samples
                ]
            yield family

    def _labels_of(self, sample: Sample) -> dict[str, str]:
        engine = self._first_engine + int(sample.labels.get("engine", 0))
        return {"model_name": self._model} | sample.labels | {"engine": str(engine)}


def _logger_class(metrics: EngineMetrics) -> type[PrometheusStatLogger]:
    """Return a logger class that writes into the registry of `metrics`."""

    class SpecDecoding(SpecDecodingProm):
        _counter_cls = staticmethod(partial(Counter, registry=metrics.registry))

    class Perf(PerfMetricsProm):
        _counter_cls = staticmethod(partial(Counter, registry=metrics.registry))

    class EngineLogger(_SummingLogger):
        _gauge_cls = staticmethod(partial(Gauge, registry=metrics.registry))
        _counter_cls = staticmethod(partial(Counter, registry=metrics.registry))
        _histogram_cls = staticmethod(partial(WeightedHistogram, registry=metrics.registry))
        _spec_decoding_cls = SpecDecoding
        _perf_metrics_cls = Perf
        _metrics = metrics

    return EngineLogger


class _SummingLogger(PrometheusStatLogger):
    """vLLM's Prometheus logger, recording several steps at a time."""

    _metrics: EngineMetrics

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._steps: dict[int, _StepSum] = {}  # by engine
        self._timer: asyncio.TimerHandle | None = None
        # Observed here: a value of each step, not of a sum of steps.
        vllm: Any = self
        self._step_tokens: dict[int, WeightedHistogram] = vllm.histogram_iteration_tokens
        vllm.histogram_iteration_tokens = dict.fromkeys(
            self._step_tokens, SimpleNamespace(observe=lambda _: None)
        )
        self._histograms = [
            child
            for each in vars(self).values()
            if isinstance(each, dict)
            for child in each.values()
            if isinstance(child, WeightedHistogram)
        ]
        self._metrics.record_pending = self._record_pending

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        steps = self._steps.get(engine_idx)
        if steps is None:
            steps = self._steps[engine_idx] = _StepSum()
        if iteration_stats is not None:
            steps.note(iteration_stats)
        if mm_cache_stats is None and steps.add(scheduler_stats, iteration_stats):
            self._schedule()
            return
        self._record_pending()
        super().record(scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)

    def _schedule(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(RECORD_S, self._record_pending)

    def _record_pending(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        pending, self._steps = self._steps, {}
        for engine, steps in pending.items():
            for tokens in steps.tokens:
                self._step_tokens[engine].observe(tokens)
            for gap, count in steps.gaps:
                self.histogram_inter_token_latency[engine].observe_many(gap, count)
            if steps.scheduler is not None or steps.iteration is not None:
                super().record(steps.scheduler, steps.iteration, None, engine)
        for histogram in self._histograms:
            histogram.record_pending()


# Fields of SchedulerStats: gauges, of which the last value counts. If another field is set, the
# step is recorded separately.
_GAUGES = frozenset(
    {"num_running_reqs", "num_waiting_reqs", "num_skipped_waiting_reqs", "step_counter"}
    | {"num_kv_fetch_reqs_by_stage", "current_wave", "kv_cache_usage", "encoder_cache_usage"}
    | {"waiting_lora_adapters", "running_lora_adapters", "prefix_cache_stats"}
)
_OTHERS = tuple(vars(SchedulerStats()).keys() - _GAUGES)


class _StepSum:
    """The sum of several steps' statistics."""

    def __init__(self) -> None:
        self.scheduler: SchedulerStats | None = None
        self.iteration: IterationStats | None = None
        self.tokens: list[int] = []  # of each step
        self.gaps: list[tuple[float, int]] = []  # inter-token latencies with their counts

    def note(self, iteration: IterationStats) -> None:
        """Keep the values that are observed per step."""
        self.tokens.append(iteration.prompt_token_stats.computed + iteration.num_generation_tokens)
        self.gaps += iteration.__dict__.pop("gaps", ())

    def add(self, scheduler: SchedulerStats | None, iteration: IterationStats | None) -> bool:
        """Add a step; return False if it has no sum."""
        if scheduler is not None:
            if any(map(vars(scheduler).get, _OTHERS)):
                return False
            if self.scheduler is not None:
                _add(scheduler.prefix_cache_stats, self.scheduler.prefix_cache_stats)
            self.scheduler = scheduler
        if iteration is not None:
            if self.iteration is not None:
                _add(self.iteration, iteration)
            else:
                self.iteration = iteration
        return True


def _add(into: Any, other: Any) -> None:
    """Add numbers and lists of one object to those of another of the same class."""
    mine = vars(into)
    for name, value in vars(other).items():
        if not value:  # most of them, in most steps
            continue
        if isinstance(value, list):
            mine[name].extend(value)
        elif isinstance(value, bool) or name == "iteration_timestamp":
            mine[name] = value
        elif isinstance(value, int | float):
            mine[name] += value
        elif hasattr(value, "__dict__"):
            _add(mine[name], value)
