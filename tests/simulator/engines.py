"""Simulated engines behind the real backend: they start, die, hang, are slow or refuse."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prometheus_client import CollectorRegistry
from starlette.responses import Response

from llmserve.api.endpoint_id import EndpointId
from llmserve.api.sse import EventStream, PeekableStream
from llmserve.errors import EngineDead, EngineError, StartupError
from llmserve.lifecycle.placement import Level, Place, Placement
from tests.fakes import failure

if TYPE_CHECKING:
    import random
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Callable,
        Mapping,
        Sequence,
    )
    from contextlib import AbstractContextManager

    from starlette.requests import Request

    from llmserve.lifecycle.gpu_memory import Keep
    from llmserve.lifecycle.placement import Takes
    from llmserve.registry.spec import Config, ModelSpec

_BOUND_S = 60.0  # on every call into an engine, as on the real ones
_NO_FIGURES = CollectorRegistry()


class Weather:
    """How likely things go wrong in one run."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.bad = chance.choice((0.0, 0.05, 0.3))

    def strikes(self, weight: float = 1.0) -> bool:
        return self.chance.random() < self.bad * weight


def _holds(spec: ModelSpec, gpu: Place) -> Mapping[Level, Takes]:
    size = int(spec.memory or 0)
    sleeps = spec.start == "sleeping" or spec.idle.sleep_after is not None
    asleep = {Level.KV_RELEASED: {gpu: size // 2}, Level.HOST: {gpu: size // 8}}
    return {Level.READY: {gpu: size}} | (asleep if sleeps else {})


def _gpu_of(spec: ModelSpec) -> Place:
    """Of an entry that a start was given."""
    assert spec.devices is not None
    (index,) = spec.devices
    return Place(int(index))


class Start(NamedTuple):
    """A start in progress."""

    model: str
    number: int
    gpu: Place


class Memory:
    """GPUs of `capacity` units; a model holds `memory` of one of them, half of it asleep."""

    def __init__(self, gpus: int, capacity: int, chance: random.Random) -> None:
        self.capacity: Takes = {Place(index): capacity for index in range(gpus)}
        self.starting: dict[Start, Takes] = {}  # what starts may hold that have no engine yet
        self.count: Callable[[], None] = lambda: None  # called when more may be held
        self._chance = chance
        self.plan: dict[str, Place] = {}  # the GPU of each model

    def place(self, spec: ModelSpec, number: int) -> Placement:
        return Placement(number, _holds(spec, self.plan[spec.name]))

    def planned(
        self, config: Config, kept: Mapping[str, Sequence[Placement]]
    ) -> Callable[[], None]:
        plan = {spec.name: self._chosen(spec.name) for spec in config.models}
        for name, placements in kept.items():
            (plan[name],) = {gpu for each in placements for gpu in each.holds[Level.READY]}
        return partial(setattr, self, "plan", plan)

    def _chosen(self, name: str) -> Place:
        """A GPU for engines that start, often the one of those before."""
        gpus = list(self.capacity)
        if name in self.plan:
            gpus.append(self.plan[name])
        return self._chance.choice(gpus)

    @asynccontextmanager
    async def start(
        self, spec: ModelSpec, placement: Placement
    ) -> AsyncIterator[tuple[ModelSpec, Keep]]:
        takes = placement.holds[Level.READY]
        (gpu,) = takes
        placed = spec.model_copy(update={"devices": (gpu.gpu,)})
        start = Start(spec.name, placement.number, gpu)
        self.starting[start] = takes
        self.count()
        try:
            yield placed, lambda _: None
        finally:
            self.starting.pop(start, None)

    def expecting(self, placement: Placement) -> AbstractContextManager[None]:
        del placement
        return nullcontext()

    @asynccontextmanager
    async def moves(
        self, placement: Placement, wakes_from: Level | None = None
    ) -> AsyncIterator[None]:
        del placement, wakes_from
        await asyncio.sleep(0)
        yield


class Engine:
    """An engine's process."""

    def __init__(self, fleet: Fleet, spec: ModelSpec, watch: Watch, *, sleeps: bool) -> None:
        watch.engine = self
        self.spec = spec
        self.sleeps = sleeps
        self.gpu = _gpu_of(spec)
        self._holds = _holds(spec, self.gpu)
        self.dead = False  # as its client knows
        self.alive = True  # as the machine knows
        self.hangs = False
        self.level = Level.READY
        self.work: dict[asyncio.Future[None], asyncio.TimerHandle] = {}
        self._fleet = fleet
        self.count = fleet.count
        self._weather = fleet.weather

    @property
    def held(self) -> Takes:
        if not self.alive:
            return {}
        return self._holds[self.level]

    def die(self) -> None:
        """Its client notices at once, those that wait for it a little later."""
        self.alive = False
        self.dead = True
        self._fleet.died(self.spec.name)
        loop = asyncio.get_running_loop()
        for future, timer in self.work.items():
            timer.cancel()
            loop.call_later(self._weather.chance.random() * 0.1, _fail, future)

    async def do(self, seconds: float) -> None:
        """Some work. Raises EngineDead."""
        if self.dead:
            raise EngineDead("dead")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        seconds = seconds if not self.hangs else 1e9
        self.work[future] = loop.call_later(seconds, self._finish, future)
        try:
            await future
        finally:
            self.work.pop(future).cancel()

    def _finish(self, future: asyncio.Future[None]) -> None:
        if not future.done():
            future.set_result(None)
            self._fleet.worked(self.spec.name)

    def hang(self) -> None:
        self.hangs = True
        loop = asyncio.get_running_loop()
        for future, timer in self.work.items():
            timer.cancel()
            self.work[future] = loop.call_later(1e9, self._finish, future)

    async def bounded(self, what: str, seconds: float) -> None:
        """A call that moves memory, and has a bound: a hung engine is killed at its end."""
        if self.hangs or self._weather.strikes(0.3):
            await asyncio.sleep(_BOUND_S)
            self.die()
            raise EngineError(f"did not {what} in time")
        await asyncio.sleep(seconds)
        if self._weather.strikes(0.5):
            self.die()
        if self.dead or self._weather.strikes():
            raise EngineError(f"could not {what}")

    # --- as `llmserve.engine.engine.Engine` is used by the backend

    async def start_reports(self) -> Sequence[Mapping[str, Any]]:
        await asyncio.sleep(0.01)
        if self._weather.strikes(0.2):
            raise EngineError("no report")
        return [{"seconds": {}, "bytes": {}}]

    def stop(self) -> None:
        """Blocks: the loop lets it take its time."""
        self.alive = False
        self.dead = True


class Watch:
    """Ends an engine's processes, also while they start."""

    pids = ()

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.is_killed = False

    def kill(self) -> None:
        self.is_killed = True
        if self.engine is not None and self.engine.alive:
            self.engine.die()


def _fail(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_exception(EngineDead("died"))


class Running:
    """What the pool sees of an engine."""

    def __init__(self, engine: Engine, weather: Weather) -> None:
        self.engine = engine
        self.endpoints = frozenset(EndpointId)
        self.took: Mapping[str, float] = {}
        self.max_model_len = 2048
        self.registry = _NO_FIGURES
        self.pid = 1
        self.sleeps = engine.sleeps
        self.log = Path("/logs/engine.log")
        self._weather = weather

    @property
    def dead(self) -> bool:
        return self.engine.dead

    def preparing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def prepare_constraints(self) -> None: ...

    def share(self, stored: Any) -> None:
        pass

    def try_fast_path(self, *_: Any) -> None:
        return None

    async def call(
        self, endpoint: EndpointId, body: dict[str, Any], asked: str, request: Request
    ) -> Response:
        del endpoint, request
        assert self.engine.level is Level.READY, "a request reached an engine that is asleep"
        names = (*self.engine.spec.names, *self.engine.spec.loras)
        assert asked in names, "another model's request"
        pieces, each_s = int(body["pieces"]), float(body["each_s"])
        if body.get("stream"):
            frames = PeekableStream(self._frames(pieces, each_s), failure)
            await frames.begin(2.0)
            return EventStream(frames)
        await self.engine.do(pieces * each_s)
        return Response(b"{}", media_type="application/json")

    async def _frames(self, pieces: int, each_s: float) -> AsyncGenerator[bytes, None]:
        for _ in range(pieces):
            await self.engine.do(each_s)
            yield b"data: x\n\n"

    async def responds(self, within_s: float) -> bool:
        if self.engine.hangs and not self.engine.dead:
            await asyncio.sleep(within_s)
            return False
        return True

    async def prepare_sleep(self) -> None:
        await self.engine.bounded("prepare", 0.5)

    async def sleep(self, level: Level) -> None:
        assert not self.engine.work, "an engine fell asleep over a request"
        await self.engine.bounded("sleep", 0.2)
        self.engine.level = level

    async def wake(self) -> None:
        self.engine.level = Level.READY
        self.engine.count()
        await self.engine.bounded("wake", 0.3)

    async def changed(self, spec: ModelSpec) -> Running:
        await asyncio.sleep(0.05)
        if self._weather.strikes():
            raise EngineError("could not change")
        self.engine.spec = spec
        return Running(self.engine, self._weather)

    def kill(self) -> None:
        if not self.engine.dead:
            self.engine.die()

    async def stop(self) -> None:
        await asyncio.to_thread(self.engine.stop)
        for future in self.engine.work:
            _fail(future)
        if self._weather.strikes(0.3):
            raise RuntimeError("did not stop cleanly")


class Fleet:
    """Every engine there ever was; the modules that the backend would import vLLM with."""

    def __init__(self, weather: Weather, memory: Memory) -> None:
        self.weather = weather
        self.memory = memory
        self.engines: list[Engine] = []
        self.stopped = False
        self.most: Counter[Place] = Counter()  # that engines held at the same time
        self.overfull = False  # which was more than there is
        memory.count = self.count
        # Called with the name of the model.
        self.died: Callable[[str], None] = lambda _: None
        self.worked: Callable[[str], None] = lambda _: None
        self.ModelHandlers = self  # as the module `handlers`

    def alive(self) -> list[Engine]:
        return [engine for engine in self.engines if engine.alive]

    def count(self) -> None:
        held: Counter[Place] = Counter()
        for takes in (*(engine.held for engine in self.engines), *self.memory.starting.values()):
            held.update(takes)
        self.most |= held
        self.overfull = any(size > self.memory.capacity[place] for place, size in self.most.items())

    # --- the launcher

    def new_watch(self) -> Watch:
        if self.stopped:
            raise StartupError("the server is stopping")
        return Watch()

    def start(self, spec: ModelSpec, number: int, *, sleeps: bool, watch: Watch) -> Engine:
        """At the end of the seconds that the thread takes."""
        self.memory.starting.pop(Start(spec.name, number, _gpu_of(spec)), None)
        if self.stopped or watch.is_killed:
            raise StartupError("the server is stopping")
        if self.weather.strikes():
            raise StartupError("no memory left")
        if self.weather.strikes(0.3):
            raise ValueError("unforeseen by the launcher")
        engine = Engine(self, spec, watch, sleeps=sleeps)
        self.engines.append(engine)
        self.count()
        return engine

    def start_s(self) -> float:
        return self.weather.chance.choice((0.5, 3.0, 10.0, 40.0)) * self.weather.chance.random()

    def stop(self) -> None:
        self.stopped = True
        for engine in self.alive():
            engine.die()

    # --- the modules

    async def build(self, spec: ModelSpec, engine: Engine) -> Running:
        del spec
        await asyncio.sleep(0.3)
        if self.weather.strikes(0.5):
            raise RuntimeError("a template that cannot be used")
        return Running(engine, self.weather)
