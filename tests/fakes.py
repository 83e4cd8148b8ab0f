"""A model with scripted answers, and a backend that starts such models."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self, TypeVar

import orjson
from prometheus_client import CollectorRegistry
from starlette.responses import Response

from llmserve.api.context import RequestContext
from llmserve.api.endpoint_id import EndpointId
from llmserve.api.endpoints import ENDPOINTS
from llmserve.api.sse import EventStream, PeekableStream
from llmserve.errors import LLMServeError, StartupError
from llmserve.lifecycle.admission import Deadline, Releasable
from llmserve.lifecycle.health import HealthMonitor
from llmserve.lifecycle.lease import Lease, ModelRequest
from llmserve.lifecycle.placement import Level, Placement
from llmserve.lifecycle.pool import Pool
from llmserve.lifecycle.served_model import ServedModel
from llmserve.lifecycle.timings import LifecycleTimings
from llmserve.metrics import Metrics
from llmserve.registry.spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
    from contextlib import AbstractContextManager

    import httpx
    from starlette.requests import Request
    from starlette.types import Scope

    from llmserve.api.endpoints import Endpoint
    from llmserve.lifecycle.admission import QueuedRequest
    from llmserve.lifecycle.placement import Takes
    from llmserve.lifecycle.replica import MemoryBudget, Replica, Running, State
    from llmserve.lifecycle.response_store import ResponseStore
    from llmserve.registry.spec import Config


T = TypeVar("T")
H = TypeVar("H", bound=Releasable)


class Gate:
    """Where work waits until it is opened; `cancelled`: it was cancelled there."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()
        self.left = asyncio.Event()
        self.cancelled = False

    async def wait(self) -> None:
        self.reached.set()
        try:
            await self.opened.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        finally:
            self.left.set()

    async def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """The task of some work, once it waits here."""
        task = asyncio.create_task(work)
        await soon(self.reached.wait())
        return task

    async def open_for(self, work: Awaitable[T]) -> T:
        """Let all through; the result of work that waited for it."""
        self.opened.set()
        return await soon(work)


@dataclass
class Call:
    """A request that reached a model."""

    endpoint: EndpointId
    body: dict[str, Any]
    asked: str
    request_id: str | None = None
    context: RequestContext | None = None


Answer = Callable[[Call], Awaitable[Response]]


def plain(content: dict[str, Any] | None = None, gate: Gate | None = None) -> Answer:
    """A JSON answer, worked on until `gate` opens; by default the call itself."""

    async def answer(call: Call) -> Response:
        if gate is not None:
            await gate.wait()
        shown = {"asked": call.asked, "body": call.body} if content is None else content
        return Response(orjson.dumps(shown, default=str), media_type="application/json")

    return answer


def stream(*frames: bytes, gate: Gate | None = None, first_within_s: float = 0.0) -> Answer:
    """An event stream: `frames`, then, if there is a gate, an end only once it opens."""

    async def answer(_: Call) -> Response:
        source = PeekableStream(_frames(frames, gate), failure)
        await source.begin(first_within_s)
        return EventStream(source)

    return answer


def failure(error: LLMServeError, _sent: int = 0) -> bytes:
    """The last frame of a stream that failed."""
    return f"data: {error.code}\n\n".encode()


async def _frames(frames: tuple[bytes, ...], gate: Gate | None) -> AsyncGenerator[bytes, None]:
    for frame in frames:
        yield frame
    if gate is not None:
        await gate.wait()


def failing(error: Exception) -> Answer:
    async def answer(_: Call) -> Response:
        raise error

    return answer


def written(stored: Any) -> Response:
    """A stored response as an answer."""
    return Response(orjson.dumps(vars(stored)), media_type="application/json")


class FakeRunning:
    """A running model. Its `answer` can be changed at any time."""

    def __init__(
        self, answer: Answer | None = None, *, endpoints: frozenset[EndpointId] | None = None
    ) -> None:
        self.endpoints = endpoints or frozenset(EndpointId)
        self.took: Mapping[str, float] = {}
        self.max_model_len = 2048
        self.dead = False
        self.registry = CollectorRegistry()
        self.answer = answer or plain()
        self.calls: list[Call] = []
        self.handler: Any = SimpleNamespace()
        self.stopped = 0
        self.hangs = False
        self.stop_gate: Gate | None = None
        self.stop_error: Exception | None = None
        self.sleeps = False
        self.slept: list[Level] = []  # READY stands for a wake
        self.sleep_error: LLMServeError | None = None
        self.wake_error: LLMServeError | None = None
        self.prepared = 0
        self.pid = 4242
        self.log = Path("/logs/model-chat.log")

    def preparing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def try_fast_path(
        self, endpoint: EndpointId, body: dict[str, Any], asked: str, scope: Scope
    ) -> None:
        return None

    async def call(
        self, endpoint: EndpointId, body: dict[str, Any], asked: str, request: Request
    ) -> Response:
        call = Call(endpoint, body, asked, request.headers.get("x-request-id"))
        call.context = RequestContext.of(request.scope)
        self.calls.append(call)
        return await self.answer(call)

    def share(self, stored: ResponseStore) -> None:
        """As vLLM's handler stores answers: its dictionaries stay, those behind them change."""
        stored.keep_for(self.handler, written)

    async def responds(self, within_s: float) -> bool:
        if self.hangs:
            await asyncio.sleep(within_s)
        return not self.hangs

    async def prepare_sleep(self) -> None:
        self.prepared += 1

    async def sleep(self, level: Level) -> None:
        await asyncio.sleep(0)
        if self.sleep_error is not None:
            raise self.sleep_error
        self.slept.append(level)

    async def wake(self) -> None:
        await asyncio.sleep(0)
        if self.wake_error is not None:
            raise self.wake_error
        self.slept.append(Level.READY)

    async def changed(self, spec: ModelSpec) -> FakeRunning:
        self.spec = spec
        return self

    def kill(self) -> None:
        self.dead, self.hangs = True, False

    async def stop(self) -> None:
        self.stopped += 1
        if self.stop_gate is not None:
            await self.stop_gate.wait()
        if self.stop_error is not None:
            raise self.stop_error


@dataclass
class Plan:
    """How the start of one model goes: what it reports, where it waits, how it ends."""

    running: FakeRunning = field(default_factory=FakeRunning)
    reports: tuple[tuple[State, str], ...] = ()
    gate: Gate | None = None
    error: Exception | None = None


class FakeBackend:
    """Starts the replicas of its plans; one without a plan is ready at once. Its own memory.

    Their names are those of `Replica`.
    """

    def __init__(self, **plans: Plan) -> None:
        self.memory: MemoryBudget = self
        self.plans = plans
        self.started: list[str] = []
        self.expected: list[tuple[Placement, str]] = []
        self.killed = 0
        self.capacity: Takes = {}
        self.sizes: dict[str, Mapping[Level, Takes]] = {}  # by model; others hold nothing
        self.free_error: StartupError | None = None
        self.plan_error: LLMServeError | None = None
        self.plans_made: list[dict[str, list[Placement]]] = []  # the engines that were to stay

    def place(self, spec: ModelSpec, number: int) -> Placement:
        return Placement(number, self.sizes.get(spec.name, {Level.READY: {}}))

    @contextmanager
    def expecting(self, placement: Placement) -> Iterator[None]:
        self.expected.append((placement, "waits"))
        yield
        self.expected.append((placement, "ready"))

    @asynccontextmanager
    async def moves(
        self, placement: Placement, wakes_from: Level | None = None
    ) -> AsyncIterator[None]:
        if wakes_from is not None and self.free_error is not None:
            raise self.free_error
        yield

    def log_of(self, spec: ModelSpec, number: int) -> Path:
        return Path(f"/logs/{spec.name}+{number}")

    def planned(
        self, config: Config, kept: Mapping[str, Sequence[Placement]]
    ) -> Callable[[], None]:
        self.plans_made.append({name: list(there) for name, there in kept.items()})
        if self.plan_error is not None:
            raise self.plan_error
        return lambda: None

    def running(self, name: str) -> FakeRunning:
        return self.plans[name].running

    async def start(
        self, spec: ModelSpec, placement: Placement, report: Callable[[State, str], None]
    ) -> Running:
        name = f"{spec.name}/{placement.number}" if spec.replicas > 1 else spec.name
        plan = self.plans.setdefault(name, Plan())
        self.started.append(name)
        for state, note in plan.reports:
            report(state, note)
        if plan.gate is not None:
            await plan.gate.wait()
        if plan.error is not None:
            raise plan.error
        plan.running.dead = False
        return plan.running

    def kill(self) -> None:
        self.killed += 1


# Without a residency time, and with short pauses.
FAST = LifecycleTimings(
    health_check_s=0.002,
    busy_residency=0.0,
    min_busy_residency_s=0.0,
    max_residency_s=0.0,
    first_restart_s=0.001,
)
CHAT, EMBED = (
    next(endpoint for endpoint in ENDPOINTS if endpoint.id is id_)
    for id_ in (EndpointId.CHAT_COMPLETIONS, EndpointId.EMBEDDINGS)
)


class PoolBox:
    """A pool without a server, and what its metrics and requests show."""

    def __init__(
        self,
        specs: Iterable[ModelSpec],
        backend: FakeBackend,
        timings: LifecycleTimings = FAST,
    ) -> None:
        self.timings = timings
        self.metrics = Metrics()
        self.seen: list[tuple[str, State, str]] = []
        self._has_changed = asyncio.Event()
        self.pool = Pool(specs, backend, self.metrics, self._record, timings)

    def _record(self, replica: Replica) -> None:
        self.seen.append((replica.name, replica.state, replica.note))
        self._has_changed.set()

    async def started(self) -> Self:
        """The box, once all its models have started."""
        await soon(self.pool.start())
        return self

    async def starting(self, *gates: Gate) -> asyncio.Task[None]:
        """A start of all models that waits at these gates."""
        starting = asyncio.create_task(self.pool.start())
        for gate in gates:
            await soon(gate.reached.wait())
        return starting

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until `holds`, which is checked after each change of a replica."""
        async with asyncio.timeout(60):
            while not holds():
                self._has_changed.clear()
                await self._has_changed.wait()

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """While a health monitor runs."""
        watching = asyncio.create_task(HealthMonitor(self.pool, self.timings).run())
        try:
            yield
        finally:
            await cancel(watching)

    def replica(self, name: str, number: int = 0) -> Replica:
        return self.pool.models[name].replicas[number]

    def states(self) -> dict[str, str]:
        return {name: model.state.value for name, model in self.pool.models.items()}

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"llmserve_{name}", labels)

    async def ask(
        self, name: str, deadline: Deadline | None = None, task: asyncio.Task[None] | None = None
    ) -> Lease:
        """As a request does: it waits if it has to."""
        lease = self.pool.lease(request(name, deadline, task))
        return lease if isinstance(lease, Lease) else await lease_of(lease)

    async def asking(self, name: str, deadline: Deadline | None = None) -> asyncio.Task[Lease]:
        """A request that waits now."""
        task = asyncio.create_task(lease_of(self.queued(request(name, deadline))))
        await asyncio.sleep(0)
        return task

    def queued(self, wanted: ModelRequest) -> QueuedRequest[ModelRequest, Lease]:
        """A request that has joined the queue, and that no task awaits yet."""
        queued = self.pool.lease(wanted)
        assert not isinstance(queued, Lease)
        return queued

    async def use(self, *names: str) -> list[Running]:
        """A request to each, one after the other."""
        used: list[Running] = []
        for name in names:
            lease = await soon(self.ask(name))
            lease.release()
            used.append(lease.running)
        return used


def request(
    name: str,
    deadline: Deadline | None = None,
    task: asyncio.Future[None] | None = None,
    endpoint: Endpoint = CHAT,
    **body: Any,
) -> ModelRequest:
    return ModelRequest(name, endpoint, body, deadline or Deadline(), task)  # type: ignore[arg-type]  # any future


def with_code(code: str) -> Callable[[LLMServeError], bool]:
    """For `pytest.raises(..., check=with_code(...))`."""
    return lambda error: error.code == code


def broken(cause: str = "ValueError: no memory left") -> Plan:
    return Plan(error=StartupError(cause))


def spec(name: str = "chat", **more: Any) -> ModelSpec:
    return ModelSpec(name=name, **({"model": f"/models/{name}"} | more))


def replica(model: ModelSpec, number: int = 0) -> Replica:
    """A replica without an engine."""
    return ServedModel(model, [Placement(number, {})]).replicas[0]


def http_scope(
    request_id: str = "r1", endpoint: EndpointId | None = None, **more: Any
) -> dict[str, Any]:
    """The scope of a request that has reached the application."""
    scope: dict[str, Any] = {"type": "http", "headers": [], **more}
    RequestContext(request_id, endpoint).attach(scope)
    return scope


async def lease_of(place: QueuedRequest[Any, H]) -> H:
    """What a place in the queue is given; it is left if the wait is cancelled."""
    try:
        await asyncio.wait({place.given})
    except asyncio.CancelledError:
        place.cancel()
        raise
    return place.given.result()


def error_of(reply: httpx.Response) -> dict[str, Any]:
    """The error of an answer, which has the shape of all."""
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert error["message"].replace("\n", " ").isprintable()
    assert isinstance(error["type"], str)
    return error


async def released_in_order(line: Sequence[asyncio.Task[Lease]]) -> list[Running]:
    """The engines of queued requests, each released before the next one gets its lease."""
    used: list[Running] = []
    for number, each in enumerate(line):
        lease = await soon(each)
        assert not any(later.done() for later in line[number + 1 :])
        lease.release()
        used.append(lease.running)
    return used


async def cancel(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for its end."""
    task.cancel()
    await asyncio.wait({task})


async def some_ms() -> None:
    """Long enough for whatever would happen by mistake."""
    await asyncio.sleep(0.015)


async def until(holds: Callable[[], bool], within_s: float = 60.0) -> None:
    """Wait until `holds`, which must be soon."""
    for _ in range(int(within_s / 0.005)):
        if holds():
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"did not happen within {within_s} s")


async def soon(work: Awaitable[T], within_s: float = 60.0) -> T:
    """`work`, which must not hang."""
    return await asyncio.wait_for(work, within_s)
