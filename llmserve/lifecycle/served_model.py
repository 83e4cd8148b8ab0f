"""A model of the pool: its spec, and what its replicas share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from llmserve.lifecycle.admission import AdmissionQueue
from llmserve.lifecycle.dispatch import policy_from_spec
from llmserve.lifecycle.replica import STARTING, Replica, State
from llmserve.lifecycle.response_store import ResponseStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from llmserve.lifecycle.lease import Lease, ModelRequest
    from llmserve.lifecycle.placement import Placement
    from llmserve.lifecycle.replica import Running
    from llmserve.registry.spec import ModelSpec

_LOADING_RETRY_S = 5  # for a model that has never been ready
# A model has the state of its replica that comes first in this order.
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
    """A model: the owner of its spec, its replicas, its queue and its stored responses.

    `serve_queue` is called with it when a queued request may be admitted or refused, and
    `changed` with a replica and the state before when a replica changes its state or note.
    `kept` are replicas of the same model before a reload, whose engines continue.
    """

    def __init__(
        self,
        spec: ModelSpec,
        placements: Sequence[Placement],
        serve_queue: Callable[[ServedModel], None] = lambda _: None,
        changed: Callable[[ServedModel, Replica, State], None] = lambda *_: None,
        kept: Iterable[Replica] = (),
    ) -> None:
        self.spec = spec
        self.responses = ResponseStore()  # can be fetched while no engine runs, too
        self.policy = policy_from_spec(spec)  # None: there is one replica
        self._serve_queue, self._changed = serve_queue, changed
        self.slots: AdmissionQueue[ModelRequest, Lease] = AdmissionQueue(
            spec.name, spec.max_in_flight, spec.max_queue, self.serve_queue
        )
        running = {replica.number: replica for replica in kept}
        self.replicas = tuple(running.get(p.number) or Replica(self, p) for p in placements)
        for replica, placement in zip(self.replicas, placements, strict=True):
            replica.model, replica.next_placement = self, placement
        self.ready = self._ready_replicas()

    def apply_spec(self, spec: ModelSpec, placements: Sequence[Placement]) -> None:
        """Continue with a changed spec and the same engines.

        An engine that starts later uses its placement in `placements`.
        """
        before, self.spec = self.spec, spec
        if (before.dispatch, before.weights) != (spec.dispatch, spec.weights):
            self.policy = policy_from_spec(spec)
        for replica, placement in zip(self.replicas, placements, strict=True):
            replica.next_placement = placement
        self.slots.resize(spec.max_in_flight, spec.max_queue)

    def inherit(self, before: ServedModel) -> None:
        """Take over the queue and the requests in flight of a model whose engines continue here."""
        self.slots, before.slots = before.slots, self.slots
        for model in (self, before):
            model.slots.changed = model.serve_queue
        self.slots.limit, self.slots.longest = before.slots.limit, before.slots.longest

    def serve_queue(self) -> None:
        """Admit or refuse queued requests, as the replicas allow now."""
        self._serve_queue(self)

    def record_change(self, replica: Replica, before: State) -> None:
        """Record that a replica changed its state, from `before`, or its note."""
        if replica.state is not before:
            self.ready = self._ready_replicas()
            if before is State.READY and self.policy is not None:
                self.policy.forget(replica.number)
            if replica.state is State.READY and replica.running is not None:
                replica.running.share(self.responses)
        self._changed(self, replica, before)

    def _ready_replicas(self) -> tuple[Replica, ...]:
        return tuple(each for each in self.replicas if each.state is State.READY)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def furthest(self) -> Replica:
        """The replica that determines the state of the model."""
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
        """Whether a replica is ready, starts, or can start."""
        return any(
            replica.state is State.READY or not (replica.retired or replica.state is State.FAILED)
            for replica in self.replicas
        )

    @property
    def is_idle_on_demand(self) -> bool:
        """Whether no replica is ready, and a request would start one."""
        return not self.ready and any(replica.can_start for replica in self.replicas)

    @property
    def queues_requests(self) -> bool:
        """Whether requests may wait for it while it is not ready."""
        return any(
            replica.can_start or (replica.state in STARTING and replica.queues_requests)
            for replica in self.replicas
        )

    @property
    def retry_after_s(self) -> int:
        """Seconds after which a client may try again."""
        ready_in_s = self.furthest.ready_in_s
        return _LOADING_RETRY_S if ready_in_s is None else max(1, math.ceil(ready_in_s))
