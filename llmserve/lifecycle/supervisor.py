"""Runs the transitions of replicas in the background, and restarts replicas that died."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from llmserve.errors import Overloaded
from llmserve.lifecycle.parallel import in_parallel
from llmserve.lifecycle.placement import Level
from llmserve.lifecycle.replica import AT_REST, State

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from llmserve.lifecycle.lease import Task
    from llmserve.lifecycle.replica import Replica
    from llmserve.lifecycle.served_model import ServedModel
    from llmserve.lifecycle.transitions import ReplicaLifecycle

log = logging.getLogger(__name__)
_STOPPING_RETRY_S = 5
Transition: TypeAlias = "Callable[[Replica], Coroutine[Any, Any, None]]"


class Supervisor:
    """Holds at most one task per replica, which starts, wakes, restarts or discards it."""

    def __init__(self, life: ReplicaLifecycle) -> None:
        self.is_closed = False  # no transition begins any more
        self._life = life
        self._tasks: dict[Replica, Task] = {}
        self._discarding: set[Replica] = set()  # whose task only ends an engine, which is short
        self._unloading: dict[Replica, asyncio.Future[None]] = {}  # until they are stopped

    def begin(self, replica: Replica, transition: Transition, *, discards: bool = False) -> None:
        """Begin a transition unless another one runs; `discards`: it only ends an engine."""
        is_free = replica not in self._tasks and replica not in self._unloading
        if is_free and not (self.is_closed or replica.retired):
            if discards:
                self._discarding.add(replica)
            task = asyncio.create_task(transition(replica))
            self._tasks[replica] = task
            task.add_done_callback(partial(self._finish, replica))

    def _finish(self, replica: Replica, task: Task) -> None:
        del self._tasks[replica]
        self._discarding.discard(replica)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("model=%s unforeseen", replica.name, exc_info=error)
        self.handle_death(replica)
        replica.model.serve_queue()

    def tasks(self, replicas: Sequence[Replica]) -> set[Task]:
        """The tasks that run for these replicas."""
        return {self._tasks[each] for each in replicas if each in self._tasks}

    def may_become_ready(self, model: ServedModel) -> bool:
        """Whether a replica is ready, starts, or can start."""
        starts = any(each in self._tasks and not each.retired for each in model.replicas)
        return starts or model.is_usable or model.is_idle_on_demand

    # --- starts

    def start_on_demand(self, replicas: Iterable[Replica]) -> None:
        """Begin to start or wake replicas, and let requests wait for them."""
        for replica in replicas:
            replica.queues_requests = True
            self.begin(replica, self._life.make_ready)

    async def ensure_started(self, model: ServedModel) -> None:
        """Start or wake each replica; return when each is ready or has failed.

        Raises Overloaded if the server stops.
        """
        if self.is_closed:
            raise server_stopping()
        if not await self.wait_started(model):
            return
        startable = AT_REST | {State.FAILED}
        self.start_on_demand(each for each in model.replicas if each.state in startable)
        await self.wait_started(model)

    async def start_stopped(self, model: ServedModel) -> None:
        """Start the replicas without an engine, as a server start does, and wait for all."""
        for replica in model.replicas:
            if replica.level is Level.STOPPED:
                self.begin(replica, self._life.start)
        await self.wait_started(model)

    async def wait_started(self, model: ServedModel) -> bool:
        """Wait for the tasks of its replicas. Returns False if `unload` cancelled one of them."""
        if tasks := self.tasks(model.replicas):
            await asyncio.wait(tasks)
        unloading = {self._unloading[each] for each in model.replicas if each in self._unloading}
        if unloading:
            await asyncio.wait(unloading)
        return not (tasks and unloading)

    # --- stops

    async def unload(self, model: ServedModel) -> None:
        """Stop a model; a start, wake or restart under way is cancelled."""
        starting = self._tasks.keys() - self._discarding
        cancelled = [each for each in model.replicas if each in starting]
        others = [each for each in model.replicas if each not in starting]
        stops = [self._life.lower(each, Level.STOPPED) for each in others]
        await in_parallel([self._cancel(cancelled), *stops])
        for current in dict.fromkeys(replica.model for replica in model.replicas):
            current.serve_queue()  # a reload may have moved the replicas to another model

    async def _cancel(self, replicas: Sequence[Replica]) -> None:
        tasks = self.tasks(replicas)
        stopped = asyncio.get_running_loop().create_future()
        self._unloading |= dict.fromkeys(replicas, stopped)  # no transition begins until then
        try:
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            await in_parallel(self._life.stop(each) for each in replicas)
        finally:
            for replica in replicas:
                if self._unloading.get(replica) is stopped:
                    del self._unloading[replica]
            stopped.set_result(None)

    async def end(self, replica: Replica) -> None:
        """Stop a retired replica after its requests and after a transition under way."""
        await self._life.lower(replica, Level.STOPPED)
        while task := self._tasks.get(replica):
            await asyncio.wait({task})
            await self._life.lower(replica, Level.STOPPED)

    async def cancel_all(self) -> None:
        if tasks := list(self._tasks.values()):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    # --- deaths

    def handle_death(self, replica: Replica) -> bool:
        """Restart, discard or fail a replica whose engine died. Returns whether it did that."""
        if not replica.is_dead or replica.state not in (State.READY, State.SLEEPING):
            return False
        if replica.transition_lock.locked() or replica in self._tasks:
            return False  # handled after that transition
        if self.is_closed or replica.retired:
            self._life.change(replica, State.FAILED, "its engine died")
        elif replica.state is State.SLEEPING:
            self._life.count_death(replica)
            lower = partial(self._life.lower, level=Level.STOPPED)
            self.begin(replica, lower, discards=True)
        elif self._life.schedule_restart(
            replica, "its engine died", time.monotonic() - replica.since
        ):
            self.begin(replica, self._life.restart)
        else:
            self.begin(replica, self._life.discard, discards=True)
        return True


def server_stopping() -> Overloaded:
    return Overloaded(
        "The server is stopping, and the time for running requests is over.",
        retry_after_s=_STOPPING_RETRY_S,
        code="shutting_down",
    )
