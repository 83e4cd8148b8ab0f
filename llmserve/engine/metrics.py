"""vLLM's Prometheus figures of one engine, in a registry of their own.

Left to itself vLLM's logger takes the process-wide registry and removes every other
engine's collectors from it (vllm/v1/metrics/prometheus.py, unregister_vllm_metrics),
and it observes the inter-token latency of every token by itself.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right
from functools import partial
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

EVERY_S = 1.0
_LAG_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class WeightedHistogram(Histogram):
    """A histogram that is told values and enters them together, or one that came several times.

    prometheus_client walks all buckets for each value, with a lock for each count; these are
    its own fields (metrics.py, Histogram.observe).
    """

    def _metric_init(self) -> None:
        super()._metric_init()
        self._told: list[float] = []

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        if exemplar is None:
            self._told.append(amount)
        else:
            super().observe(amount, exemplar)

    def observe_many(self, amount: float, count: int) -> None:
        self._sum.inc(amount * count)
        self._buckets[bisect_left(self._upper_bounds, amount)].inc(count)

    def enter(self) -> None:
        """What it has been told."""
        if not self._told:
            return
        told, self._told = sorted(self._told), []
        self._sum.inc(sum(told))
        done = 0
        for bound, bucket in zip(self._upper_bounds, self._buckets, strict=True):
            if done == len(told):
                break
            upto = bisect_right(told, bound, done)
            if upto > done:
                bucket.inc(upto - done)
            done = upto

    def _child_samples(self) -> Iterable[Sample]:
        self.enter()
        return super()._child_samples()


class EngineMetrics:
    """One replica's registry, and the class of vLLM's logger that writes into it.

    `cores` are the engine cores of each replica: more than one with data parallelism.

    A step's figures are added up and entered every EVERY_S: entering them costs as much
    as carrying some dozens of tokens. What cannot be added up is entered at once.
    """

    def __init__(self, model: str, replica: int = 0, cores: int = 1) -> None:
        self.registry = _Labelled(model, replica * cores)
        self._labels = (model, replica)
        self.logger_class = _logger_class(self)
        self.enter: Callable[[], None] = lambda: None  # what has been added up; the logger's

    def take_over(self, client: AsyncLLM) -> None:
        """Spare vLLM its loggers of lines: `AsyncLLM.do_log_stats` is what would print them."""
        manager = client.logger_manager
        if manager is not None:
            manager.stat_loggers = [each for each in manager.stat_loggers if not _of_lines(each)]

    def stream_lag(self) -> Callable[[float], None]:
        """Takes the seconds from the engine's having a token to our having written it."""
        histogram = WeightedHistogram(
            "llmserve_stream_lag_seconds",
            "From the engine's step to its last event being written, once per write of a step.",
            ("model", "replica"),
            registry=self.registry,
            buckets=_LAG_BUCKETS_S,
        )
        return partial(histogram.labels(*self._labels).observe_many, count=1)


def _of_lines(logger: Any) -> bool:
    if isinstance(logger, PerEngineStatLoggerAdapter):
        return all(map(_of_lines, logger.per_engine_stat_loggers.values()))
    return isinstance(logger, LoggingStatLogger)


class _Labelled(CollectorRegistry):
    """vLLM's samples with the labels that tell one replica's from another's.

    Every AsyncLLM counts its engine cores from 0, and some families name neither the
    model nor the engine (vllm/v1/metrics/loggers.py: cache_config_info,
    lora_requests_info). Two samples of one name and the same labels are no valid page.
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


def _logger_class(figures: EngineMetrics) -> type[PrometheusStatLogger]:
    """A logger that writes into a registry of its own."""

    class SpecDecoding(SpecDecodingProm):
        _counter_cls = staticmethod(partial(Counter, registry=figures.registry))

    class Perf(PerfMetricsProm):
        _counter_cls = staticmethod(partial(Counter, registry=figures.registry))

    class EngineLogger(_Adding):
        _gauge_cls = staticmethod(partial(Gauge, registry=figures.registry))
        _counter_cls = staticmethod(partial(Counter, registry=figures.registry))
        _histogram_cls = staticmethod(partial(WeightedHistogram, registry=figures.registry))
        _spec_decoding_cls = SpecDecoding
        _perf_metrics_cls = Perf
        _figures = figures

    return EngineLogger


class _Adding(PrometheusStatLogger):
    """vLLM's Prometheus logger, entering several steps at a time."""

    _figures: EngineMetrics

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._steps: dict[int, _Steps] = {}  # by engine
        self._timer: asyncio.TimerHandle | None = None
        # Of a step, not of a sum of steps: observed here.
        vllm: Any = self
        self._step_tokens: dict[int, WeightedHistogram] = vllm.histogram_iteration_tokens
        vllm.histogram_iteration_tokens = dict.fromkeys(self._step_tokens, _Ignored())
        self._histograms = [
            child
            for each in vars(self).values()
            if isinstance(each, dict)
            for child in each.values()
            if isinstance(child, WeightedHistogram)
        ]
        self._figures.enter = self._enter

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        steps = self._steps.get(engine_idx)
        if steps is None:
            steps = self._steps[engine_idx] = _Steps()
        if iteration_stats is not None:
            steps.note(iteration_stats)
        if mm_cache_stats is None and steps.add(scheduler_stats, iteration_stats):
            self._enter_soon()
            return
        self._enter()
        super().record(scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)

    def _enter_soon(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(EVERY_S, self._enter)

    def _enter(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        entered, self._steps = self._steps, {}
        for engine, steps in entered.items():
            for tokens in steps.tokens:
                self._step_tokens[engine].observe(tokens)
            for gap, count in steps.gaps:
                self.histogram_inter_token_latency[engine].observe_many(gap, count)
            if steps.scheduler is not None or steps.iteration is not None:
                super().record(steps.scheduler, steps.iteration, None, engine)
        for histogram in self._histograms:
            histogram.enter()


class _Ignored:
    def observe(self, _: float) -> None:
        pass


# Of SchedulerStats: gauges, of which the last value counts. All other fields must be as
# they are in a new object, which is empty, or the step is entered by itself.
_GAUGES = frozenset(
    {
        "num_running_reqs",
        "num_waiting_reqs",
        "num_skipped_waiting_reqs",
        "num_kv_fetch_reqs_by_stage",
        "step_counter",
        "current_wave",
        "kv_cache_usage",
        "encoder_cache_usage",
        "waiting_lora_adapters",
        "running_lora_adapters",
        "prefix_cache_stats",
    }
)


_OTHERS = tuple(vars(SchedulerStats()).keys() - _GAUGES)


class _Steps:
    """Several steps' figures as one's."""

    def __init__(self) -> None:
        self.scheduler: SchedulerStats | None = None
        self.iteration: IterationStats | None = None
        self.tokens: list[int] = []  # of each step
        self.gaps: list[tuple[float, int]] = []  # inter-token latencies, and how many had each

    def note(self, iteration: IterationStats) -> None:
        """What is observed of each step, not of a sum of steps."""
        self.tokens.append(iteration.prompt_token_stats.computed + iteration.num_generation_tokens)
        self.gaps += iteration.__dict__.pop("gaps", ())

    def add(self, scheduler: SchedulerStats | None, iteration: IterationStats | None) -> bool:
        """False if they cannot be added up."""
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
    """Numbers and lists of one object to those of another of its class."""
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
