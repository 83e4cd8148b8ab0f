"""A model: its replicas, and what they share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from llmserve.lifecycle.admission import AdmissionQueue
from llmserve.lifecycle.dispatch import policy_of
from llmserve.lifecycle.replica import STARTING, Replica, State
from llmserve.lifecycle.response_store import ResponseStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from llmserve.lifecycle.dispatch import Policy
    from llmserve.lifecycle.lease import Lease, ModelRequest
    from llmserve.lifecycle.placement import Placement
    from llmserve.lifecycle.replica import Running
    from llmserve.registry.names import Model

_LOADING_RETRY_S = 5  # of a model that has never been ready
# A model's state is that of its replica which comes first here.
_FURTHEST = (
    State.READY,
    State.WAKING,
    State.WARMING,
    State.LOADING,
    State.DOWNLOADING,
    State.WAITING,
    State.DRAINING,
    State.SLEEPING,
    State.STOPPED,
    State.FAILED,
)


class ServedModel:
    """`changed` is called with it whenever a request in its queue may have to be let in."""

    def __init__(
        self, model: Model, replicas: Iterable[Replica], changed: Callable[[ServedModel], None]
    ) -> None:
        self.model = model
        self.replicas = tuple(replicas)
        self.ready: tuple[Replica, ...] = ()
        self.changed = lambda: changed(self)
        self.slots: AdmissionQueue[ModelRequest, Lease] = AdmissionQueue(
            model.name, model.spec.max_in_flight, model.spec.max_queue, self.changed
        )
        self.responses = ResponseStore()  # that can be fetched again, also while no engine runs
        self.policy: Policy | None = policy_of(model.spec)  # None: there is one replica

    def apply_spec(self, model: Model, placements: Iterable[Placement]) -> None:
        """Go on by a changed entry of the registry, with the same engines.

        An engine that is started from now on goes to its place of `placements`.
        """
        before, self.model = self.model.spec, model
        if (before.dispatch, before.weights) != (model.spec.dispatch, model.spec.weights):
            self.policy = policy_of(model.spec)
        for replica, placement in zip(self.replicas, placements, strict=True):
            replica.model, replica.next_placement = model, placement
        self.slots.resize(model.spec.max_in_flight, model.spec.max_queue)

    def inherit(self, before: ServedModel) -> None:
        """Take the slots of an entry whose engines go on here, with what holds and awaits them."""
        self.slots, before.slots = before.slots, self.slots
        for entry in (self, before):
            entry.slots.changed = entry.changed
        self.slots.limit, self.slots.longest = before.slots.limit, before.slots.longest

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def furthest(self) -> Replica:
        """The replica by which the model is judged."""
        if self.ready:
            return self.ready[0]
        return min(self.replicas, key=lambda replica: _FURTHEST.index(replica.state))

    @property
    def state(self) -> State:
        return self.furthest.state

    @property
    def note(self) -> str:
        return self.furthest.note

    @property
    def running(self) -> Running | None:
        return self.furthest.running

    @property
    def is_usable(self) -> bool:
        """Whether a replica is ready, on its way, or can be."""
        return any(
            replica.state is State.READY or not (replica.retired or replica.state is State.FAILED)
            for replica in self.replicas
        )

    @property
    def is_idle_on_demand(self) -> bool:
        """Whether it is not ready, but would be if it were asked."""
        return not self.ready and any(replica.can_start for replica in self.replicas)

    @property
    def queues_requests(self) -> bool:
        """Whether requests wait for it while it is not ready."""
        return any(
            replica.can_start or (replica.state in STARTING and replica.queues_requests)
            for replica in self.replicas
        )

    @property
    def retry_after_s(self) -> int:
        """When it is worth another try."""
        ready_in_s = self.furthest.ready_in_s
        return _LOADING_RETRY_S if ready_in_s is None else max(1, math.ceil(ready_in_s))
