"""One run: a server, its clients, its operator and what goes wrong, from a seed to the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import orjson
from sse_starlette.sse import _get_shutdown_state

from llmserve.engine.backend import VllmBackend, _Modules
from llmserve.errors import LLMServeError, StartupError
from llmserve.http import app
from llmserve.http.services import Services
from llmserve.lifecycle.health import HealthMonitor
from llmserve.lifecycle.operator import ModelOperator
from llmserve.lifecycle.placement import Level
from llmserve.lifecycle.pool import Pool
from llmserve.lifecycle.replica import State
from llmserve.lifecycle.timings import LifecycleTimings
from llmserve.metrics import Metrics
from llmserve.registry.spec import Config, IdleSpec, ModelSpec, SamplingSpec, ServerSpec
from tests.simulator.engines import Fleet, Memory, Weather
from tests.simulator.loop import SimulatedLoop, SimulatedThreads, Stuck, virtual_time

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, MutableMapping
    from concurrent.futures import ThreadPoolExecutor

    from llmserve.lifecycle.replica import Replica

NAMES = ("a", "b", "c")
_FOLDER = Path(__file__).with_name("model")  # files that a start takes
_SETTLED = (State.READY, State.SLEEPING, State.STOPPED, State.FAILED)
_STARTS = (State.DOWNLOADING, State.LOADING, State.WARMING)
_TIMINGS = LifecycleTimings(health_check_s=1.6)  # rarer, since each check takes real time
_AT_ONCE_S = 1.0  # virtual
_PATIENCE_S = 4 * 3600.0  # virtual; longer than anything takes that ends by itself
_STUCK_S = 60.0  # after which the connection of a client that does not read is ended
_LINGER_S = 2.0
_LIMIT = 8  # the largest max_in_flight
_ENGINE = {"load_format": "dummy"}  # the folder of its models has no weights
_ASKED_AS_ONE_ENDS = 0.1  # the chance of a request as an engine completes a piece of work
# Of a server that works, whatever its engines do.
_STATUSES = frozenset({200, 400, 404, 500, 503, 504})


class Violation(AssertionError):
    """What must never be."""


class Exchange:
    """One request and its answer, as uvicorn carries them."""

    def __init__(self, world: World, model: str, body: dict[str, Any]) -> None:
        self.model = model
        self.status: int | None = None
        self.whole = False
        self.over = False  # the application has returned
        self.left = asyncio.Event()
        self.reads = True
        self._world = world
        self._body: bytes | None = orjson.dumps({"model": model, **body})

    async def run(self, limit_s: str | None) -> None:
        headers = [(b"x-request-timeout", limit_s.encode())] if limit_s else []
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "raw_path": b"/v1/chat/completions",
            "root_path": "",
            "query_string": b"",
            "http_version": "1.1",
            "scheme": "http",
            "server": ("127.0.0.1", 8000),
            "client": ("127.0.0.1", 9),
            "headers": [(b"host", b"127.0.0.1"), *headers],
            "extensions": {},
        }
        try:
            await self._world.app(scope, self._receive, self._send)
        except (Exception, asyncio.CancelledError) as error:
            self._world.violate(f"the application raised {error!r}", error)
        self.over = True
        self._world.note(f"{self.model} answered {self.status} whole={self.whole}")
        self._world.served += self.status == 200 and self.whole
        if not self.left.is_set():
            if not self.whole:
                self._world.violate("a client that stayed has no whole answer")
            if self.status not in _STATUSES:
                self._world.violate(f"status {self.status}")
        self.left.set()

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if self.left.is_set() and not self.whole:
            return
        if self.whole:
            self._world.violate(f"{message['type']} after the answer was whole")
        if message["type"] == "http.response.start":
            if self.status is not None:
                self._world.violate("a second answer")
            self.status = message["status"]
            if self.status == 500 and any(b"internal" in v for _, v in message["headers"]):
                self._world.violate("an unforeseen error")
            return
        if self.status is None:
            self._world.violate("a body without a head")
        if b"internal_error" in message.get("body", b""):
            self._world.violate(f"an unforeseen error: {message['body']!r}")
        if not message.get("more_body"):
            self.whole = True
            self.left.set()  # uvicorn tells the application so
        elif not self.reads:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(_STUCK_S, self.left.set)  # as the connection's watch does
            await self.left.wait()
            timer.cancel()


class World:
    """Everything of one seed."""

    def __init__(self, seed: int, *, trace: bool = False, harsh: bool = False) -> None:
        """`harsh`: one model that can sleep, much that goes wrong, callbacks in any order."""
        self.harsh = harsh
        self.seed = seed
        self.chance = random.Random(seed)
        self.weather = Weather(self.chance)
        self.loop = SimulatedLoop(self.chance, self._thread_s, self._check_step)
        if harsh:
            self.weather.bad, self.loop.disorder = 0.3, 1.0
        self.trace: list[str] = []
        self.violation: str | None = None
        self.cause: BaseException | None = None
        self._prints = trace
        self.steps = self.served = 0
        self.over = self.ending = False

    # --- set-up, on the loop

    def _build(self) -> None:
        sizes = [self.chance.choice((20, 40, 60)) for _ in NAMES]
        capacity = self.chance.choice((60, 100, 200))
        self.memory = Memory(self.chance.choice((1, 2)), capacity, self.chance)
        self.fleet = Fleet(self.weather, self.memory)
        self.fleet.died = self._ask_just_now
        self.fleet.worked = partial(self._ask_just_now, chance=_ASKED_AS_ONE_ENDS)
        models = [self._model(name, size) for name, size in zip(NAMES, sizes, strict=True)]
        drain_s = self.chance.choice((0.0, 5.0, 600.0))
        self.config = Config(
            file=Path("models.yaml"),
            server=ServerSpec(drain_timeout=drain_s),
            models=tuple(models[: 1 if self.harsh else self.chance.choice((1, 2, 3))]),
        )
        self.memory.planned(self.config, {})()
        metrics = Metrics()
        backend = VllmBackend(Path("/logs"), self.memory)
        fleet: Any = self.fleet
        backend._imported = _Modules(fleet, fleet)
        backend._threads = cast("ThreadPoolExecutor", SimulatedThreads(self.loop))
        self.pool = Pool(self.config.models, backend, metrics, self._on_change)
        self.control = ModelOperator(self.config.server, self.pool, backend, self._changed)
        self.services = Services(self.pool, metrics, self.control)
        self.app = app.build(self.services)
        self.exchanges: list[Exchange] = []
        self.serving: set[asyncio.Task[None]] = set()
        self.operating: set[asyncio.Task[None]] = set()
        self.accepts = True

    def _model(self, name: str, size: int) -> ModelSpec:
        chance = self.chance
        start = chance.choice(("eager", "eager", "lazy", "sleeping"))
        pinned = start == "eager" and chance.random() < 0.1
        idle = (
            IdleSpec()
            if pinned
            else chance.choice((IdleSpec(), IdleSpec(sleep_after=5.0), IdleSpec(stop_after=9.0)))
        )
        if self.harsh:
            pinned, idle = False, IdleSpec(sleep_after=1.0)
        return ModelSpec(
            name=name,
            model=str(_FOLDER),
            memory=size,
            engine=_ENGINE,
            replicas=chance.choice((1, 1, 1, 2)),
            dispatch=chance.choice(("lottery", "shortest_queue", "prefix_affinity")),
            max_in_flight=chance.choice((1, 1, 2, 8)),
            max_queue=chance.choice((3, 50)),
            timeout=chance.choice((None, None, 3.0, 60.0)),
            start=start,
            pinned=pinned,
            idle=idle,
        )

    def _changed(self) -> Config:
        """The registry as an operator has edited it."""
        chance = self.chance
        models = list(self.config.models)
        number = chance.randrange(len(models))
        spec = models[number]
        updates: dict[str, Callable[[], dict[str, Any]]] = {
            "live": lambda: {"max_in_flight": chance.choice((1, 2, 8))},
            "dispatch": lambda: {"dispatch": chance.choice(("lottery", "shortest_queue"))},
            "rebuild": lambda: {"sampling": SamplingSpec(temperature=chance.random())},
            "resize": lambda: {"replicas": chance.choice((1, 2, 3))},
            "restart": lambda: {"engine": _ENGINE | {"max_num_seqs": chance.randrange(1, 999)}},
        }
        kind = chance.choice(("live", "live", "dispatch", "rebuild", "resize", "restart", "new"))
        if kind in updates:
            models[number] = spec.model_copy(update=updates[kind]())
        elif len(models) > 1 and chance.random() < 0.5:
            del models[number]
        else:
            free = [name for name in NAMES if name not in {each.name for each in models}]
            models += [self._model(name, 20) for name in free[:1]]
        self.config = self.config.model_copy(update={"models": tuple(models)})
        return self.config

    def _thread_s(self, func: Any) -> float:
        call = func
        while isinstance(call, partial):  # also as `asyncio.to_thread` wraps it
            call = call.args[0] if call.args and callable(call.args[0]) else call.func
        if getattr(call, "__func__", None) is Fleet.start:
            return self.fleet.start_s()
        return self.chance.choice((0.0, 0.01, 0.3))

    # --- running

    def run(self) -> None:
        """Raises Violation with the seed and the end of the trace."""
        log = logging.getLogger("llmserve")
        watcher = _LogWatcher(self)
        level = log.level
        log.addHandler(watcher)
        log.setLevel(logging.DEBUG if self._prints else logging.ERROR)
        propagates, log.propagate = log.propagate, False
        self.loop.set_exception_handler(self._unhandled)
        random.seed(self.seed)  # of the lottery among replicas
        # Not the task with which sse-starlette polls for the end of uvicorn, for ever.
        sse_state = _get_shutdown_state()
        sse_state.watcher_started = True
        asyncio.set_event_loop(self.loop)
        try:
            with virtual_time(self.loop):
                self.loop.run_until_complete(self._live())
        except (Violation, RuntimeError):
            if self.violation is None:
                raise
        except AssertionError as error:
            self.violation = self.violation or f"{type(error).__name__}: {error}"
            self.cause = self.cause or error
        finally:
            log.removeHandler(watcher)
            log.setLevel(level)
            log.propagate = propagates
            sse_state.watcher_started = False
            with virtual_time(self.loop):
                self._discard()
            asyncio.set_event_loop(None)
        if self.violation is not None:
            tail = "\n".join(self.trace[-60:])
            raise Violation(f"seed {self.seed}: {self.violation}\n{tail}") from self.cause

    def _discard(self) -> None:
        """End what a run that failed has left, without a word."""
        self.over = True
        self.loop.set_exception_handler(lambda *_: None)
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        if tasks:
            with contextlib.suppress(Stuck, RuntimeError):
                self.loop.run_until_complete(asyncio.wait(tasks, timeout=1000))
        self.loop.close()

    async def _live(self) -> None:
        self._build()
        starting = self._spawn(self._start())
        watch = asyncio.create_task(HealthMonitor(self.pool, _TIMINGS).run())
        busy_s = self.chance.choice((5.0, 20.0, 60.0))
        self._plan(busy_s)
        await asyncio.sleep(self.chance.random() * busy_s)
        if self.chance.random() < 0.6:
            await asyncio.sleep(busy_s)
            await self._settle(starting)
        await self._end(starting, watch)

    async def _start(self) -> None:
        try:
            await self.pool.start()
        except StartupError as error:
            self.note(f"start: {error.message}")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.serving.discard(task)
        self.operating.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.violate(f"a task of the simulation raised {error!r}", error)

    def _plan(self, busy_s: float) -> None:
        """Who does what when, drawn ahead."""
        chance, loop = self.chance, self.loop
        for _ in range(chance.choice((5, 20, 40))):
            loop.call_later(chance.random() * busy_s, self._ask)
        for _ in range(chance.choice((0, 0, 3, 8))):
            loop.call_later(chance.random() * busy_s, self._operate)
        for _ in range(chance.choice((0, 1, 4)) if self.weather.bad else 0):
            loop.call_later(chance.random() * busy_s, self._strike)

    def _on_change(self, replica: Replica) -> None:
        self._ask_just_now(replica.model.name)

    def _ask_just_now(self, name: str, chance: float = 0.4) -> None:
        """Some requests come in the step in which something changes, where a fault would show."""
        if self.accepts and self.chance.random() < chance:
            self.loop.call_soon(self._ask, name)

    def _ask(self, name: str | None = None) -> None:
        if not self.accepts:
            return
        chance = self.chance
        body = {
            "stream": chance.random() < 0.4,
            "pieces": chance.choice((1, 2, 5)),
            "each_s": chance.choice((0.001, 0.1, 2.0)),
        }
        exchange = Exchange(self, name or chance.choice(NAMES), body)
        exchange.reads = chance.random() > 0.05
        self.exchanges.append(exchange)
        timeout = chance.choice((None, None, None, "0.5", "20"))
        self.note(f"{exchange.model} asked {body} timeout={timeout}")
        self.serving.add(self._spawn(exchange.run(timeout)))
        if chance.random() < 0.1:
            self.loop.call_later(chance.random() * 5, self._leave, exchange)
        if chance.random() < 0.3:  # a client that asks again at once
            self.loop.call_later(chance.choice((0.0, 0.001, 0.1)), self._ask)

    def _leave(self, exchange: Exchange) -> None:
        if not exchange.left.is_set():
            self.note(f"{exchange.model} client leaves")
            exchange.left.set()

    def _operate(self) -> None:
        if not self.accepts:
            return
        name = self.chance.choice(NAMES)
        what = self.chance.choice(("load", "unload", "unload_now", "sleep", "reload", "reload"))
        self.operating.add(self._spawn(self._operation(what, name)))

    async def _operation(self, what: str, name: str) -> None:
        self.note(f"operator {what} {name}")
        try:
            match what:
                case "load":
                    await self.control.load(name)
                case "unload":
                    await self.control.unload(name, drain=True)
                case "unload_now":
                    await self._unload_now(name)
                case "sleep":
                    await self.control.sleep(name)
                case _:
                    report = await self.control.reload(dry_run=False)
                    self.note(f"reloaded: {report['lines']}")
        except LLMServeError as error:
            self.note(f"operator {what} {name}: {error.message}")
        self.note(f"operator {what} {name} done")

    async def _unload_now(self, name: str) -> None:
        """It ends a start that is under way, and does not wait for it."""
        starts = all(each.state in _STARTS for each in self.pool.find(name).replicas)
        began = self.loop.time()
        await self.control.unload(name, drain=False)
        if starts and self.loop.time() - began > _AT_ONCE_S:
            self.violate(f"unload --now of {name}, which started, waited for it")

    def _strike(self) -> None:
        if living := [each for each in self.fleet.alive() if not each.dead]:
            engine = self.chance.choice(living)
            kind = self.chance.choice(("die", "die", "hang"))
            self.note(f"engine of {engine.spec.name} {kind}s")
            engine.die() if kind == "die" else engine.hang()

    # --- the end

    async def _settle(self, starting: asyncio.Task[None]) -> None:
        """Without new trouble everything that was asked for ends."""
        self.weather.bad = 0.0
        self.accepts = False
        tasks = {starting, *self.serving, *self.operating}
        _, late = await asyncio.wait(tasks, timeout=_PATIENCE_S)
        if late:
            self.violate(f"{len(late)} requests or commands wait forever: {self._standing()}")
        await asyncio.sleep(150)  # restarts, idle times and minimal stays are over
        for replica in self.pool.replicas:
            if replica.state not in _SETTLED or replica.transition_lock.locked():
                self.violate(f"{replica.name} stays {replica.state} ({replica.note})")
            dead = replica.running is not None and replica.running.dead
            if dead:
                self.violate(f"the engine of {replica.name} is dead, and it is {replica.state}")
        self._check_idle()
        owned = [each.running.engine for each in self.pool.replicas if each.running]  # type: ignore[attr-defined]
        if orphans := [each for each in self.fleet.alive() if each not in owned]:
            self.violate(f"{len(orphans)} engines have no owner")
        self._check_reservations()

    async def _end(self, starting: asyncio.Task[None], watch: asyncio.Task[None]) -> None:
        """As `server._Process` ends."""
        self.note("SIGTERM")
        self.ending = True  # a start that was given up may end in its thread
        self.accepts = False
        starting.cancel()
        await self.pool.drain(self.control.server.drain_timeout)
        await self._let_clients_go()
        watch.cancel()
        await self.pool.stop()
        if self.fleet.alive():
            # A start that was given up sits in its thread until its launcher notices.
            await asyncio.sleep(600)
        if alive := self.fleet.alive():
            self.violate(f"{len(alive)} engines are alive after the end")
        for task in self.operating:
            task.cancel()
        if rest := {*self.operating, *self.serving, watch, starting}:
            await asyncio.wait(rest, timeout=_PATIENCE_S)
        for _ in range(50):
            await asyncio.sleep(0)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if tasks:
            self.violate(f"tasks are left: {tasks}")
        self._check_idle()

    async def _let_clients_go(self) -> None:
        if self.serving:
            await asyncio.wait(self.serving, timeout=_LINGER_S)
        for exchange in self.exchanges:
            if not exchange.over and exchange.reads and not exchange.left.is_set():
                self.violate("a request was neither answered nor cut off in time")
            exchange.left.set()
        if self.serving:
            await asyncio.wait(self.serving, timeout=_PATIENCE_S)

    # --- invariants

    def _check_step(self) -> None:
        """After each callback of the loop."""
        self.steps += 1
        if self.over or not hasattr(self, "accepts"):
            return
        for entry in self.pool.models.values():
            slots = entry.slots
            if (
                slots._queue
                and slots.in_flight < slots.limit
                and any(each.running is not None and not each.running.dead for each in entry.ready)
            ):
                self.violate(f"{entry.name}: a request waits, a slot is free, a replica is ready")
            if not 0 <= slots.in_flight <= _LIMIT:
                self.violate(f"{entry.name} has {slots.in_flight} in flight")
        if self.fleet.overfull and not self.ending:
            self.violate(
                f"engines hold {self.fleet.most} of {self.memory.capacity}: "
                f"{[(each.spec.name, each.held) for each in self.fleet.alive()]}, "
                f"starting {self.memory.starting}, {self._standing()}"
            )

    def _check_idle(self) -> None:
        if self.pool.router.leases:
            self.violate(f"leases are left: {self.pool.router.leases}")
        for entry in self.pool._all:
            if entry.slots.in_flight or entry.slots.waiting():
                self.violate(f"{entry.name}: {self._standing()}")
            for replica in entry.replicas:
                if replica.load.requests or replica.load.tokens:
                    self.violate(f"{replica.name} has a load of {replica.load}")

    def _check_reservations(self) -> None:
        for replica, level in self.pool.life._reserved.items():
            if replica not in self.pool.replicas:
                self.violate(f"{replica.name} has left and has memory reserved")
            if level is not replica.level:
                self.violate(f"{replica.name} is at {replica.level!r} and has {level!r} reserved")
            engine = replica.running.engine if replica.running else None  # type: ignore[attr-defined]
            if engine is not None and engine.gpu not in replica.holds[Level.READY]:
                self.violate(f"{replica.name} runs on {engine.gpu}, and is placed elsewhere")
        missing = [
            each.name
            for each in self.pool.replicas
            if each.level is not Level.STOPPED and each not in self.pool.life._reserved
        ]
        if missing:
            self.violate(f"{missing} hold memory that is not reserved")

    def _standing(self) -> str:
        return "; ".join(
            f"{entry.name}: {entry.state}, {entry.slots.in_flight} of {entry.slots.limit} in flight, "
            f"{entry.slots.waiting()} wait, replicas "
            + ", ".join(f"{each.state} ({each.note})" for each in entry.replicas)
            for entry in self.pool._all
        )

    # --- the trace

    def note(self, text: str) -> None:
        line = f"{self.loop.time() - 1000:9.3f} {text}"
        self.trace.append(line)
        if self._prints:
            print(line)

    def violate(self, what: str, cause: BaseException | None = None) -> None:
        if self.over:
            return
        self.note(f"VIOLATION {what}")
        if self.violation is None:
            self.violation, self.cause = what, cause
        self.loop.stop()
        raise Violation(what)

    def _unhandled(self, _: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, Violation):
            self.note(f"UNHANDLED {context['message']} {error!r}")
            if self.violation is None:
                self.violation, self.cause = f"{context['message']}: {error!r}", error


class _LogWatcher(logging.Handler):
    """An unforeseen error in the log is a violation, unless an engine is the cause."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
        self._world.note(f"log {record.levelname} {text} {error or ''}")
        foreseen = isinstance(error, LLMServeError | RuntimeError | FileNotFoundError | ValueError)
        if record.levelno >= logging.ERROR and error is not None and not foreseen:
            self._world.violate(f"logged: {text}: {error!r}", error)
