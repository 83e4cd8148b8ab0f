"""An event loop with virtual time, on which a seed chooses which ready callback runs next."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import heapq
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, cast

import pytest
from anyio._backends._asyncio import CancelScope

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

_FAIR = 40  # callbacks that one which is ready may be passed over by


class Stuck(AssertionError):
    """Nothing is ready and no timer is pending: all tasks that wait would wait forever."""


class _Task(asyncio.Task[Any]):
    """Hashed by number: by address, the order of a set would differ from run to run."""

    def __hash__(self) -> int:
        return cast("SimulatedLoop", self.get_loop()).number_of(self)


class _Future(asyncio.Future[Any]):
    __hash__ = _Task.__hash__


class SimulatedLoop(asyncio.BaseEventLoop):
    """Timers fire as soon as nothing is ready; `after` runs after each callback.

    `thread_s` gives the virtual seconds that a call in a thread takes. It cannot be
    interrupted, as a real one: its effects come also if the future was cancelled.
    """

    def __init__(
        self,
        chance: random.Random,
        thread_s: Callable[[Any], float],
        after: Callable[[], None],
    ) -> None:
        super().__init__()
        self._chance = chance
        self._thread_s = thread_s
        self._after = after
        self._virtual_s = 1000.0
        self.disorder = chance.choice((0.0, 0.0, 0.1, 0.5, 1.0))  # share of picks out of order
        self._passed = 0
        self._numbered: dict[int, tuple[int, Any]] = {}
        self.set_task_factory(self._task)

    def _task(self, _: Any, work: Any, context: Any = None) -> _Task:
        return _Task(work, loop=self, context=context)

    def create_future(self) -> _Future:
        return _Future(loop=self)

    def number_of(self, thing: Any) -> int:
        """In the order of being first hashed; `thing` is kept, so that no other gets its id."""
        number, _ = self._numbered.setdefault(id(thing), (len(self._numbered), thing))
        return number

    def time(self) -> float:
        return self._virtual_s

    def _run_once(self) -> None:
        ready: Any = self._ready  # type: ignore[attr-defined]  # of BaseEventLoop
        timers: Any = self._scheduled  # type: ignore[attr-defined]
        while timers and timers[0]._cancelled:
            heapq.heappop(timers)._scheduled = False
        if not ready and not self._stopping:  # type: ignore[attr-defined]
            if not timers:
                raise Stuck("nothing is ready, and no timer is pending")
            self._virtual_s = max(self._virtual_s, timers[0]._when)
        while timers and timers[0]._when <= self._virtual_s:
            timer = heapq.heappop(timers)
            timer._scheduled = False
            if not timer._cancelled:
                ready.append(timer)
        if ready:
            handle = self._pick(ready)
            if not handle._cancelled:
                handle._run()
                self._after()

    def _pick(self, ready: Any) -> Any:
        """The oldest, or any other; none is passed over for ever."""
        if len(ready) > 1 and self._passed < _FAIR and self._chance.random() < self.disorder:
            self._passed += 1
            number = self._chance.randrange(len(ready))
            handle = ready[number]
            del ready[number]
            return handle
        self._passed = 0
        return ready.popleft()

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        del executor
        future = self.create_future()
        self.run_later(future, func, args)
        return future

    def run_later(self, future: asyncio.Future[Any] | Future[Any], func: Any, args: Any) -> None:
        self.call_later(self._thread_s(func), self._ran, future, func, args)

    @staticmethod
    def _ran(future: asyncio.Future[Any] | Future[Any], func: Any, args: Any) -> None:
        try:
            result = func(*args)
        except Exception as error:
            if not future.done():
                future.set_exception(error)
        else:
            if not future.done():
                future.set_result(result)

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Any = None
    ) -> Any:
        return self.call_soon(callback, *args, context=context)

    def _process_events(self, event_list: Any) -> None:
        raise NotImplementedError

    def _write_to_self(self) -> None:
        pass

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109
        del timeout


class SimulatedThreads:
    """As an executor of the loop's threads; a call that waits for another's result gets it."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self._loop = loop

    def submit(self, func: Any, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        awaited = [each for each in args if isinstance(each, Future)]
        if awaited:
            awaited[0].add_done_callback(lambda _: self._loop.run_later(future, func, args))
        else:
            self._loop.run_later(future, func, args)
        return future


@contextlib.contextmanager
def virtual_time(loop: SimulatedLoop) -> Iterator[None]:
    """`time.monotonic` is the loop's clock meanwhile.

    anyio's scopes are hashed as tasks are here, and nothing is collected: both would make two
    runs of a seed differ.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", loop.time)
        patch.setattr(CancelScope, "__hash__", lambda scope: loop.number_of(scope))  # noqa: PLW0108
        gc.disable()
        try:
            yield
        finally:
            gc.enable()
