"""A request for a model, and its lease on a replica until it is answered."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmserve.api.endpoints import Endpoint
    from llmserve.errors import LLMServeError
    from llmserve.lifecycle.admission import AdmissionQueue, Deadline
    from llmserve.lifecycle.replica import Replica, Running

Task = asyncio.Task[None]


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """A request for a model by one of its public names; `task` handles it."""

    name: str
    endpoint: Endpoint
    body: dict[str, Any]
    deadline: Deadline
    task: Task | None = None
    before: bool = False  # it was leased before, to an engine that died

    def retried(self) -> ModelRequest:
        return replace(self, before=True)


@dataclass(eq=False, slots=True)
class Lease:
    """A running replica and a slot of its model, until released; cut at its deadline.

    `_released` is called once, with the lease.
    """

    replica: Replica
    running: Running
    _request: ModelRequest
    _queue: AdmissionQueue[ModelRequest, Lease]
    _tokens: int
    _released: Callable[[Lease], None]
    cut_by: LLMServeError | None = None  # why the server cancelled the request
    _is_held: bool = True
    _timer: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self._queue.take_slot()
        self.replica.load.add(self._tokens)
        deadline = self._request.deadline
        if deadline.timeout_s is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(deadline.left_s, lambda: self.cut(deadline.exceeded()))

    @property
    def model(self) -> str:
        return self.replica.model.name

    def release(self) -> None:
        """Release what it holds; a second call has no effect."""
        if self._is_held:
            self._is_held = False
            self.replica.load.remove(self._tokens)
            self.replica.used = time.monotonic()
            self._released(self)
            if self._timer is not None:
                self._timer.cancel()
            self._queue.release_slot(whole=self.cut_by is None)

    def cut(self, error: LLMServeError) -> None:
        """Cancel the request, once; its task answers with the error."""
        if self.cut_by is None and self._is_held:
            self.cut_by = error
            if self._request.task is not None:
                self._request.task.cancel()
