"""The metrics of models and replicas."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from llmserve.lifecycle.replica import State

if TYPE_CHECKING:
    from prometheus_client import Counter

    from llmserve.lifecycle.replica import Replica
    from llmserve.lifecycle.served_model import ServedModel
    from llmserve.metrics import Metrics


class PoolGauges:
    """Shows the models of the pool; counters stay after a model has left."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._dispatched: dict[Replica, Counter] = {}  # of models with a dispatch policy

    def add(self, model: ServedModel) -> None:
        self._metrics.in_flight.labels(model.name).set_function(lambda: model.slots.in_flight)
        self._metrics.queued.labels(model.name).set_function(model.slots.waiting)
        for replica in model.replicas:
            self.show(replica)
        self.show_dispatch(model)

    def show_dispatch(self, model: ServedModel) -> None:
        """Count the requests of each replica under the model's policy; a lone one has none."""
        if model.policy is None:
            return
        for replica in model.replicas:
            labels = (model.name, replica.number)
            tokens = self._metrics.tokens_in_flight.labels(*labels)
            tokens.set_function(partial(getattr, replica.load, "tokens"))
            self._dispatched[replica] = self._metrics.dispatched.labels(
                *labels, model.spec.dispatch
            )

    def count_dispatch(self, replica: Replica) -> None:
        self._dispatched[replica].inc()

    def show(self, replica: Replica) -> None:
        name, number = replica.model.name, replica.number
        for state in State:
            gauge = self._metrics.state.labels(name, number, state.value)
            gauge.set(state is replica.state)
        for level, seconds in replica.cost_s.items():
            self._metrics.ready_seconds.labels(name, number, level.name.lower()).set(seconds)
        for step, seconds in replica.took.items():
            self._metrics.start_step_seconds.labels(name, number, step).set(seconds)

    def remove(self, model: ServedModel) -> None:
        """Remove the gauges of a model that leaves the pool."""
        metrics = self._metrics
        for gauge in (
            metrics.in_flight,
            metrics.queued,
            metrics.state,
            metrics.ready_seconds,
            metrics.start_step_seconds,
            metrics.tokens_in_flight,
        ):
            gauge.remove_by_labels({"model": model.name})

    def forget(self, replica: Replica) -> None:
        """Forget a replica that has ended."""
        self._dispatched.pop(replica, None)
