"""What a request asks for, and what it holds of its model until it is answered."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmserve.api.endpoints import Endpoint
    from llmserve.errors import LLMServeError
    from llmserve.lifecycle.admission import Deadline, Slot
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
    before: bool = False  # an engine died over it

    def retried(self) -> ModelRequest:
        return replace(self, before=True)


@dataclass(eq=False, slots=True)
class Lease:
    """A running replica and a slot of its model, until released; cut at its deadline."""

    replica: Replica
    running: Running
    _slot: Slot
    _tokens: int
    _leases: dict[Lease, None]
    _deadline: Deadline
    _task: Task | None
    cut_by: LLMServeError | None = None  # why its request was ended from here
    _timer: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self.replica.load.add(self._tokens)
        self._leases[self] = None
        if self._deadline.timeout_s is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._deadline.left_s, self._exceed)

    @property
    def model(self) -> str:
        return self.replica.model.name

    def release(self) -> None:
        """Give back what it holds; again is no mistake."""
        if self in self._leases:
            del self._leases[self]
            self.replica.load.remove(self._tokens)
            self.replica.used = time.monotonic()
            if not self.replica.load.requests:
                self.replica.unused.set()
            if self._timer is not None:
                self._timer.cancel()
            self._slot.release(whole=self.cut_by is None)

    def cut(self, error: LLMServeError) -> None:
        """Cancel the request, once; its task answers with the error."""
        if self.cut_by is None and self in self._leases:
            self.cut_by = error
            if self._task is not None:
                self._task.cancel()

    def _exceed(self) -> None:
        self.cut(self._deadline.exceeded())
