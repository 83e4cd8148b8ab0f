from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from llmserve import hub
from llmserve.backend import VllmBackend, _Clock, _Modules
from llmserve.child import log_file
from llmserve.config import Config, Download
from llmserve.errors import StartupError
from llmserve.hostspace import HostSpace
from llmserve.residency import Level
from tests.fakes import soon, spec, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from llmserve.backend import Memory
    from llmserve.config import ModelSpec
    from llmserve.replica import State
    from llmserve.residency import Takes


async def test_replicas_do_not_download_the_same_side_by_side(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lock, running = threading.Lock(), Counter[str]()
    side_by_side: list[int] = []

    def download(wanted: Download, _: Callable[[int, int], None]) -> str:
        with lock:
            running[wanted.repo] += 1
            side_by_side.append(running[wanted.repo])
        time.sleep(0.02)
        with lock:
            running[wanted.repo] -= 1
        return f"/cache/{wanted.repo}"

    monkeypatch.setattr(hub, "download", download)
    specs = [spec(name, model=f"org/{name}", replicas=2) for name in ("one", "two")]
    backend = VllmBackend(tmp_path, FakeSpace())
    starts = [backend._downloaded(each, lambda *_: None) for each in specs for _ in range(2)]
    assert await soon(asyncio.gather(*starts)) == [each for each in specs for _ in range(2)]
    assert side_by_side == [1, 1]  # one for each model: its replicas and revivals need no other


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[Download]:
    """What is asked of a hub, whose folders tell the repository and revision."""
    wanted: list[Download] = []

    def download(each: Download, _: Callable[[int, int], None]) -> str:
        wanted.append(each)
        return f"/cache/{each.repo}@{each.revision}"

    monkeypatch.setattr(hub, "download", download)
    return wanted


async def test_adapters_that_swap_their_names_keep_their_own_files(
    fetched: list[Download], tmp_path: Path
) -> None:
    backend = VllmBackend(tmp_path, FakeSpace())
    before = {"legal": "org/legal", "medical": "org/medical"}
    after = {"medical": "org/legal", "law": "org/medical"}
    loras = [
        (await soon(backend._downloaded(spec(model="org/m", loras=each), nothing))).loras
        for each in (before, after)
    ]
    assert loras == [
        {"legal": "/cache/org/legal@None", "medical": "/cache/org/medical@None"},
        {"medical": "/cache/org/legal@None", "law": "/cache/org/medical@None"},
    ]
    assert [each.repo for each in fetched] == ["org/m", "org/legal", "org/medical"]


@pytest.mark.parametrize("key", ["revision", "download_dir", "hf_token"])
async def test_a_download_that_differs_is_made_again(
    fetched: list[Download], tmp_path: Path, key: str
) -> None:
    backend = VllmBackend(tmp_path, FakeSpace())
    for value in ("one", "two", "one"):
        await soon(backend._downloaded(spec(model="org/m", engine={key: value}), nothing))
    assert len(set(fetched)) == len(fetched) == 2


# --- a start, with fakes of what imports vLLM


@dataclass
class FakeEngine:
    reports: Sequence[Mapping[str, Any]] = ({"seconds": {"weights": 0.0}, "bytes": {}},)
    fails: bool = False
    stopped: int = 0

    async def start_reports(self) -> Sequence[Mapping[str, Any]]:
        if self.fails:
            raise RuntimeError("the worker has no report")
        return self.reports

    def stop(self) -> None:
        self.stopped += 1


@dataclass
class FakeVllm:
    """The modules `engine` and `serving` and the launcher, as far as a start needs them."""

    engine: FakeEngine = field(default_factory=FakeEngine)
    refuses: bool = False  # to build what serves
    launched: list[tuple[ModelSpec, int]] = field(default_factory=list)
    sleeping: list[bool] = field(default_factory=list)  # whether launched so that it can
    built: list[ModelSpec] = field(default_factory=list)

    def modules(self, folder: Path) -> _Modules:
        def start(spec: ModelSpec, number: int, *, sleeps: bool) -> FakeEngine:
            self.launched.append((spec, number))
            self.sleeping.append(sleeps)
            return self.engine

        async def build(spec: ModelSpec, engine: FakeEngine) -> SimpleNamespace:
            self.built.append(spec)
            if self.refuses:
                raise ValueError("no such template")
            return SimpleNamespace(engine=engine, took={})

        def cause_of(error: Exception, log: Path) -> str:
            return f"{log.name}: {error}"

        return _Modules(
            engine=SimpleNamespace(phase_of=lambda log: None, cause_of=cause_of),
            serving=SimpleNamespace(Serving=SimpleNamespace(build=build)),
            launcher=SimpleNamespace(
                log_of=lambda spec, number: folder / f"{spec.name}.log", start=start
            ),
        )

    def backend(self, folder: Path, memory: Memory) -> VllmBackend:
        backend = VllmBackend(folder, memory)
        backend._imported = self.modules(folder)
        return backend


@dataclass
class FakeSpace:
    """One GPU's place, and what is reported from it."""

    events: list[str] = field(default_factory=list)
    reports: list[Any] = field(default_factory=list)
    sleepers: frozenset[str] = frozenset()
    capacity: Takes = field(default_factory=lambda: {0: 80, 1: 80})

    def holds(self, spec: ModelSpec, number: int) -> Mapping[Level, Takes]:
        return {Level.READY: {number: 50}}

    def sleeps(self, spec: ModelSpec, number: int) -> bool:
        return spec.name in self.sleepers

    @contextmanager
    def expecting(self, spec: ModelSpec, number: int) -> Iterator[None]:
        self.events.append(f"{spec.name}/{number} expected")
        yield

    @asynccontextmanager
    async def moves(
        self, spec: ModelSpec, number: int, wakes_from: Level | None
    ) -> AsyncIterator[None]:
        self.events.append(f"{spec.name}/{number} from {wakes_from!r}")
        yield

    def planned(self, config: Config, kept: Mapping[str, str]) -> Callable[[], None]:
        return lambda: self.events.append(f"{len(config.models)} models, kept {dict(kept)}")

    @asynccontextmanager
    async def start(self, spec: ModelSpec, number: int) -> AsyncIterator[tuple[ModelSpec, Any]]:
        self.events.append(f"{spec.name}/{number} in")
        try:
            yield spec.model_copy(update={"devices": (number,)}), self.reports.append
        finally:
            self.events.append(f"{spec.name}/{number} out")


def nothing(state: State, note: str) -> None:
    pass


async def test_a_replica_starts_on_the_gpus_of_the_plan(tmp_path: Path) -> None:
    vllm, space = FakeVllm(), FakeSpace()
    wanted = spec(replicas=2)
    running: Any = await soon(vllm.backend(tmp_path, space).start(wanted, 1, nothing))
    assert running.engine is vllm.engine
    ((launched, number),) = vllm.launched
    (built,) = vllm.built
    assert (launched.devices, number, built.devices) == ((1,), 1, (1,))
    assert space.events == ["chat/1 in", "chat/1 out"]
    assert space.reports == [vllm.engine.reports]
    assert vllm.engine.stopped == 0


async def test_on_a_cpu_the_entry_stays_as_it_is(tmp_path: Path) -> None:
    vllm = FakeVllm()
    memory = HostSpace(Config(file=tmp_path / "models.yaml", models=(spec(),)), {})
    await soon(vllm.backend(tmp_path, memory).start(spec(), 0, nothing))
    assert vllm.launched == [(spec(), 0)]
    assert vllm.sleeping == [False]


async def test_only_what_is_planned_to_sleep_is_started_so_that_it_can(tmp_path: Path) -> None:
    vllm = FakeVllm()
    backend = vllm.backend(tmp_path, FakeSpace(sleepers=frozenset({"b"})))
    for name in ("a", "b"):
        await soon(backend.start(spec(name), 0, nothing))
    assert vllm.sleeping == [False, True]


async def test_what_is_held_and_planned_is_asked_of_the_memory(tmp_path: Path) -> None:
    memory = FakeSpace()
    backend = FakeVllm().backend(tmp_path, memory)
    assert backend.capacity == {0: 80, 1: 80}
    assert backend.holds(spec(), 1) == {Level.READY: {1: 50}}
    with backend.expecting(spec(), 1):
        async with backend.moves(spec(), 1, Level.HOST), backend.moves(spec(), 0):
            pass
    adopt = backend.planned(Config(file=tmp_path / "m.yaml", models=(spec(),)), {"a": "b"})
    moves = ["chat/1 expected", f"chat/1 from {Level.HOST!r}", "chat/0 from None"]
    assert memory.events == moves  # nothing is adopted before it is said
    adopt()
    assert memory.events == [*moves, "1 models, kept {'a': 'b'}"]


def test_each_replica_has_a_log_of_its_own(tmp_path: Path) -> None:
    backend = FakeVllm().backend(tmp_path, FakeSpace())
    assert backend.log_of(spec(), 0) == log_file(tmp_path, "chat")
    several = {backend.log_of(spec(replicas=2), number) for number in (0, 1)}
    assert several == {log_file(tmp_path, "chat", number) for number in (0, 1)}
    assert len(several) == 2


async def test_a_replica_says_what_its_start_took(tmp_path: Path) -> None:
    side_by_side = [
        {"seconds": {"imports": 0.001, "weights": 0.002}, "bytes": {}},
        {"seconds": {"imports": 0.003, "weights": 0.001}, "bytes": {}},
    ]
    vllm = FakeVllm(FakeEngine(side_by_side))
    running = await soon(vllm.backend(tmp_path, FakeSpace()).start(spec(), 0, nothing))
    steps = ["download", "server_imports", "gpu_wait", "engine", "imports", "weights", "serving"]
    assert list(running.took) == steps
    assert (running.took["imports"], running.took["weights"]) == (0.003, 0.002)
    assert all(took >= 0 for took in running.took.values())


def test_inner_steps_are_taken_out_of_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 110.0, 140.0, 141.0])
    monkeypatch.setattr("llmserve.backend.time.monotonic", lambda: next(now))
    clock = _Clock()
    clock.lap("download")
    clock.lap("engine", [{"weights": 5.0, "graphs": 8.0}, {"weights": 7.0, "graphs": 6.0}])
    clock.lap("serving", [{"more": 2.0}])  # of another clock: never below nothing
    assert clock.took == {
        "download": 10.0,
        "engine": 15.0,
        "weights": 7.0,
        "graphs": 8.0,
        "serving": 0.0,
        "more": 2.0,
    }


async def test_an_engine_that_does_not_report_is_ended_and_leaves_its_gpus(
    tmp_path: Path,
) -> None:
    vllm, space = FakeVllm(FakeEngine(fails=True)), FakeSpace()
    with pytest.raises(StartupError) as failed:
        await soon(vllm.backend(tmp_path, space).start(spec(), 0, nothing))
    assert failed.value.message == "chat.log: the worker has no report"
    assert vllm.engine.stopped == 1
    assert space.events == ["chat/0 in", "chat/0 out"]
    assert space.reports == []


async def test_an_engine_that_cannot_be_served_is_ended(tmp_path: Path) -> None:
    vllm = FakeVllm(refuses=True)
    with pytest.raises(StartupError, match="no such template"):
        await soon(vllm.backend(tmp_path, FakeSpace()).start(spec(), 0, nothing))
    assert vllm.engine.stopped == 1


@pytest.mark.parametrize("when", ["while it starts", "while it is built"])
async def test_the_engine_of_a_cancelled_start_is_ended(tmp_path: Path, when: str) -> None:
    """Its thread cannot be interrupted, so it may come when the start has been given up."""
    vllm, reached, go_on = FakeVllm(), asyncio.Event(), threading.Event()
    backend = vllm.backend(tmp_path, FakeSpace())
    loop, modules = asyncio.get_running_loop(), backend._imported
    assert modules is not None
    launch, build = modules.launcher.start, modules.serving.Serving.build

    def launch_late(spec: ModelSpec, number: int, *, sleeps: bool) -> FakeEngine:
        loop.call_soon_threadsafe(reached.set)
        go_on.wait(3)
        return launch(spec, number, sleeps=sleeps)

    async def build_late(*arguments: Any) -> Any:
        reached.set()
        await asyncio.sleep(3)
        return await build(*arguments)

    if when == "while it starts":
        modules.launcher.start = launch_late
    else:
        modules.serving.Serving.build = build_late
    start = asyncio.create_task(backend.start(spec(), 0, nothing))
    await soon(reached.wait())
    start.cancel()
    await asyncio.wait({start})
    assert start.cancelled()
    go_on.set()
    await until(lambda: vllm.engine.stopped == 1)


async def test_a_log_that_cannot_be_read_fails_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = FakeVllm()
    backend = vllm.backend(tmp_path, FakeSpace())
    assert backend._imported is not None

    def renamed(_: Path) -> None:
        raise FileNotFoundError("renamed")

    backend._imported.engine.phase_of = renamed
    running: Any = await soon(backend.start(spec(), 0, nothing))
    assert running.engine is vllm.engine
