"""Gives requests a lease on a replica, or a place in the queue of their model."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from llmserve.errors import EngineDead, LLMServeError, Overloaded, quoted
from llmserve.lifecycle.dispatch import DispatchRequest
from llmserve.lifecycle.lease import Lease
from llmserve.lifecycle.supervisor import server_stopping

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llmserve.lifecycle.admission import QueuedRequest
    from llmserve.lifecycle.gauges import PoolGauges
    from llmserve.lifecycle.lease import ModelRequest
    from llmserve.lifecycle.replica import Replica
    from llmserve.lifecycle.served_model import ServedModel
    from llmserve.lifecycle.supervisor import Supervisor
    from llmserve.lifecycle.transitions import ReplicaLifecycle


class Router:
    """Admits requests to models, in order of arrival, while the server is not closed."""

    def __init__(self, life: ReplicaLifecycle, supervisor: Supervisor, gauges: PoolGauges) -> None:
        self.leases: dict[Lease, None] = {}  # in order of their creation
        self._life = life
        self._supervisor = supervisor
        self._gauges = gauges

    def lease(
        self, model: ServedModel, request: ModelRequest
    ) -> Lease | QueuedRequest[ModelRequest, Lease]:
        """Return a lease for the request, or its place in the queue, in one synchronous step.

        Joining the queue starts a model that is stopped or asleep. Raises EngineDead if the model
        has failed, and Overloaded if the server stops, the queue is full or too long, or the
        model starts and does not queue requests; a retried request is queued even then.
        """
        if self._supervisor.is_closed:
            raise server_stopping()
        if model.slots.free and (living := self._living_replicas(model)):
            return self._lease_one(model, living, request)
        may_wait = model.queues_requests or (request.before and model.is_usable)
        if not model.ready and not may_wait:
            raise _not_ready(model)
        if not request.before:  # a retried request was admitted before
            ready_in_s = None if model.ready else model.furthest.ready_in_s
            model.slots.raise_if_full(request.deadline, ready_in_s or 0.0)
        return model.slots.join(request.deadline, request)

    def _lease_one(
        self, model: ServedModel, living: Sequence[Replica], request: ModelRequest
    ) -> Lease:
        replica, tokens = living[0], 0
        if model.policy is not None:
            dispatch = DispatchRequest.from_body(
                request.name, request.body, request.endpoint.answer_tokens
            )
            replica, tokens = model.policy.choose(living, dispatch), dispatch.tokens
            self._gauges.count_dispatch(replica)
        if replica.running is None:
            raise _not_ready(model)
        lease = Lease(replica, replica.running, request, model.slots, tokens, self._release)
        self.leases[lease] = None
        return lease

    def _release(self, lease: Lease) -> None:
        del self.leases[lease]
        if not lease.replica.load.requests:
            self._life.record_idle(lease.replica)

    def _living_replicas(self, model: ServedModel) -> Sequence[Replica]:
        """The ready replicas whose engines live.

        A dead replica has the least load, so it would receive every request.
        """
        if any(replica.is_dead for replica in model.ready):
            for replica in model.ready:
                self._supervisor.handle_death(replica)
            return [replica for replica in model.ready if not replica.is_dead]
        return model.ready

    def serve_queue(self, model: ServedModel) -> None:
        """Admit queued requests, start their model, or refuse them.

        Called after each change of the queue, the slots, their limit or a replica's state.
        """
        if not model.slots.waiting():
            return
        if living := self._living_replicas(model):
            model.slots.advance(partial(self._lease_one, model, living))
        elif self._supervisor.is_closed:
            model.slots.refuse(server_stopping)
        elif self._supervisor.may_become_ready(model):
            self._supervisor.start_on_demand(each for each in model.replicas if each.can_start)
        else:
            model.slots.refuse(lambda: _not_ready(model))

    def cut(self, replicas: Sequence[Replica], error: Callable[[], LLMServeError]) -> None:
        """Cancel the running requests of these replicas; each answers with an error of its own."""
        for lease in [each for each in self.leases if each.replica in replicas]:
            lease.cut(error())


def _not_ready(model: ServedModel) -> LLMServeError:
    name = quoted(model.name)
    if model.is_usable:
        return Overloaded(
            f"The model {name} is {model.state}; try again.",
            retry_after_s=model.retry_after_s,
            code="model_not_ready",
        )
    if deaths := model.furthest.deaths.in_a_row:
        return EngineDead(f"The engine of {name} died {deaths} times and is not started again.")
    return EngineDead(f"The model {name} could not be started.", code="model_failed")
