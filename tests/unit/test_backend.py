from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from llmserve.checkpoint import hub
from llmserve.engine import backend as starts
from llmserve.engine.backend import Patience, VllmBackend, _Clock, _Modules, _raise_if_flawed
from llmserve.engine.worker.plugin import log_file
from llmserve.errors import StartupError
from llmserve.lifecycle.host_memory import HostMemory
from llmserve.lifecycle.placement import Level, Place, Placement
from llmserve.lifecycle.replica import State
from llmserve.registry.spec import Config
from tests.fakes import Gate, soon, spec, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager, AbstractContextManager
    from pathlib import Path

    from llmserve.engine.backend import Memory
    from llmserve.lifecycle.placement import Takes
    from llmserve.registry.spec import ModelSpec


@pytest.fixture(autouse=True)
def _whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that are not there have models without a flaw."""
    monkeypatch.setattr(starts, "_raise_if_flawed", lambda _: None)


@dataclass
class FakeHub:
    """Its repositories become folders of their name and revision."""

    folder: Path
    fetched: list[hub.HubRevision] = field(default_factory=list)
    warning: str | None = None
    side_by_side: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock, self._running = threading.Lock(), Counter[str]()

    def download(self, wanted: hub.HubRevision, _: Callable[[int, int], None]) -> hub.HubFolder:
        with self._lock:
            self.fetched.append(wanted)
            self._running[wanted.repo] += 1
            self.side_by_side.append(self._running[wanted.repo])
        time.sleep(0.02)
        with self._lock:
            self._running[wanted.repo] -= 1
        return hub.HubFolder(str(self.there(wanted.repo, wanted.revision)), self.warning)

    def there(self, repo: str, revision: str | None = None) -> Path:
        made = self.folder / f"{repo}@{revision}"
        made.mkdir(parents=True, exist_ok=True)
        return made


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    made = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(hub, "download", made.download)
    return made


async def test_replicas_do_not_download_the_same_side_by_side(
    fake_hub: FakeHub, tmp_path: Path
) -> None:
    specs = [spec(name, model=f"org/{name}", replicas=2) for name in ("one", "two")]
    backend = VllmBackend(tmp_path, FakeSpace())
    starts = [backend._downloaded(each, nothing) for each in specs for _ in range(2)]
    assert await soon(asyncio.gather(*starts)) == [each for each in specs for _ in range(2)]
    assert fake_hub.side_by_side == [1, 1]  # one for each: replicas and revivals need no other


async def test_a_model_from_the_cache_alone_is_a_folder_to_vllm_and_told(
    fake_hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By its name vLLM would ask the hub once more."""
    caplog.set_level("WARNING")  # whatever other tests have left
    notes: list[str] = []
    backend, wanted = VllmBackend(tmp_path, FakeSpace()), spec(model="org/m")
    fake_hub.warning = (
        "org/m could not be downloaded: the hub answered 504; the copy in the cache is used"
    )
    placed = await soon(backend._downloaded(wanted, lambda _, note: notes.append(note)))
    assert placed.model == str(fake_hub.there("org/m"))
    assert notes == ["", fake_hub.warning]
    assert fake_hub.warning in caplog.text
    again = await soon(backend._downloaded(wanted, nothing))
    assert again == placed
    assert len(fake_hub.fetched) == 1


async def test_adapters_renamed_in_a_reload_have_their_own_folder(
    fake_hub: FakeHub, tmp_path: Path
) -> None:
    backend = VllmBackend(tmp_path, FakeSpace())
    legal, medical = "org/legal-lora", "org/medical-lora"
    for loras in (
        {"legal": legal, "medical": medical},
        {"legal": medical, "medical": legal},
        {"law": legal},
        {"law": legal, "local": "/loras/local"},
    ):
        found = await soon(backend._downloaded(spec(model="org/base", loras=loras), nothing))
        assert found.model == "org/base"
        assert found.loras == {
            name: source if source.startswith("/") else str(fake_hub.there(source))
            for name, source in loras.items()
        }
    assert [wanted.repo for wanted in fake_hub.fetched] == ["org/base", legal, medical]


@pytest.mark.parametrize(
    ("key", "value"), [("revision", "v2"), ("download_dir", "/big"), ("hf_token", "hf_b")]
)
async def test_a_download_depends_on_all_that_is_asked(
    fake_hub: FakeHub, tmp_path: Path, key: str, value: str
) -> None:
    backend = VllmBackend(tmp_path, FakeSpace())
    for engine in ({}, {key: value}, {}, {key: value}):
        await soon(backend._downloaded(spec(model="org/base", engine=engine), nothing))
    assert len(fake_hub.fetched) == 2
    assert value in fake_hub.fetched[1]


async def test_a_download_whose_folder_is_gone_is_fetched_again(
    fake_hub: FakeHub, tmp_path: Path
) -> None:
    backend = VllmBackend(tmp_path, FakeSpace())
    for times in (1, 1, 2):
        if times == 2:
            fake_hub.there("org/base").rmdir()
        await soon(backend._downloaded(spec(model="org/base"), nothing))
        assert len(fake_hub.fetched) == times


# --- a start, with fakes of what imports vLLM

turn = partial(asyncio.sleep, 0)


@dataclass
class FakeEngine:
    reports: Sequence[Mapping[str, Any]] = ({"seconds": {"weights": 0.0}, "bytes": {}},)
    fails: bool = False
    made: int = 0
    stopped: int = 0
    reporting: Callable[[], Awaitable[None]] = turn

    async def start_reports(self) -> Sequence[Mapping[str, Any]]:
        await self.reporting()
        if self.fails:
            raise RuntimeError("the worker has no report")
        return self.reports

    def stop(self) -> None:
        self.stopped += 1


PATIENCE = Patience(look_s=0.005)


@dataclass
class FakeWatch:
    pids: tuple[int, ...] = ()
    was_killed: threading.Event = field(default_factory=threading.Event)

    def kill(self) -> None:
        self.was_killed.set()


@dataclass
class FakeVllm:
    """The modules `engine` and `handlers` and the launcher, as far as a start needs them."""

    engine: FakeEngine = field(default_factory=FakeEngine)
    refuses: bool = False  # to build what serves
    launched: list[tuple[ModelSpec, int]] = field(default_factory=list)
    sleeping: list[bool] = field(default_factory=list)  # whether launched so that it can
    built: list[ModelSpec] = field(default_factory=list)

    building: Callable[[], Awaitable[None]] = turn
    launching: Callable[[FakeWatch], object] = lambda _: None  # what a start does
    watches: list[FakeWatch] = field(default_factory=list)

    def modules(self) -> _Modules:
        def start(spec: ModelSpec, number: int, *, sleeps: bool, watch: FakeWatch) -> FakeEngine:
            self.launched.append((spec, number))
            self.sleeping.append(sleeps)
            self.launching(watch)
            self.engine.made += 1
            return self.engine

        def new_watch() -> FakeWatch:
            self.watches.append(FakeWatch())
            return self.watches[-1]

        async def build(spec: ModelSpec, engine: FakeEngine) -> SimpleNamespace:
            await self.building()
            self.built.append(spec)
            if self.refuses:
                raise ValueError("no such template")
            return SimpleNamespace(engine=engine, took={}, prepare_constraints=lambda: None)

        return _Modules(
            handlers=SimpleNamespace(ModelHandlers=SimpleNamespace(build=build)),
            launcher=SimpleNamespace(start=start, new_watch=new_watch),
        )

    def backend(self, folder: Path, memory: Memory) -> VllmBackend:
        backend = VllmBackend(folder, memory, PATIENCE)
        backend._imported = self.modules()
        return backend


def place(number: int) -> Placement:
    return Placement(number, {Level.READY: {Place(number): 50}})


@dataclass
class FakeSpace:
    """One GPU's place, and what is reported from it."""

    events: list[str] = field(default_factory=list)
    reports: list[Any] = field(default_factory=list)
    capacity: Takes = field(default_factory=dict)

    def place(self, spec: ModelSpec, number: int) -> Placement:
        return place(number)

    def expecting(self, placement: Placement) -> AbstractContextManager[None]:
        return nullcontext()

    def moves(
        self, placement: Placement, wakes_from: Level | None = None
    ) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    def planned(
        self, config: Config, kept: Mapping[str, Sequence[Placement]]
    ) -> Callable[[], None]:
        return lambda: None

    @asynccontextmanager
    async def start(
        self, spec: ModelSpec, placement: Placement
    ) -> AsyncIterator[tuple[ModelSpec, Any]]:
        number = placement.number
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
    running: Any = await soon(vllm.backend(tmp_path, space).start(wanted, place(1), nothing))
    assert running.engine is vllm.engine
    ((launched, number),) = vllm.launched
    (built,) = vllm.built
    assert (launched.devices, number, built.devices) == ((1,), 1, (1,))
    assert space.events == ["chat/1 in", "chat/1 out"]
    assert space.reports == [vllm.engine.reports]
    assert vllm.engine.stopped == 0


async def test_on_a_cpu_the_entry_stays_as_it_is(tmp_path: Path) -> None:
    vllm = FakeVllm()
    memory = HostMemory(Config(file=tmp_path / "models.yaml", models=(spec(),)), {}, {})
    await soon(vllm.backend(tmp_path, memory).start(spec(), place(0), nothing))
    assert vllm.launched == [(spec(), 0)]
    assert vllm.sleeping == [False]


async def test_only_what_is_planned_to_sleep_is_started_so_that_it_can(tmp_path: Path) -> None:
    vllm = FakeVllm()
    backend = vllm.backend(tmp_path, FakeSpace())
    for placement in (
        place(0),
        Placement(0, {Level.READY: {Place(0): 50}, Level.HOST: {Place(0): 5}}),
    ):
        await soon(backend.start(spec(), placement, nothing))
    assert vllm.sleeping == [False, True]


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
    running = await soon(vllm.backend(tmp_path, FakeSpace()).start(spec(), place(0), nothing))
    steps = ["download", "server_imports", "gpu_wait", "engine", "imports", "weights", "serving"]
    assert list(running.took) == steps
    assert (running.took["imports"], running.took["weights"]) == (0.003, 0.002)
    assert all(took >= 0 for took in running.took.values())


def test_inner_steps_are_taken_out_of_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 110.0, 140.0, 141.0])
    monkeypatch.setattr("llmserve.engine.backend.time.monotonic", lambda: next(now))
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
        await soon(vllm.backend(tmp_path, space).start(spec(), place(0), nothing))
    assert failed.value.message == "RuntimeError: the worker has no report"
    assert vllm.engine.stopped == 1
    assert space.events == ["chat/0 in", "chat/0 out"]
    assert space.reports == []


async def test_an_engine_that_cannot_be_served_is_ended(tmp_path: Path) -> None:
    vllm = FakeVllm(refuses=True)
    with pytest.raises(StartupError, match="no such template"):
        await soon(vllm.backend(tmp_path, FakeSpace()).start(spec(), place(0), nothing))
    assert vllm.engine.stopped == 1


# --- a start that is given up


def ended(vllm: FakeVllm) -> bool:
    cut = all(watch.was_killed.is_set() for watch in vllm.watches)
    return cut and vllm.engine.stopped == vllm.engine.made


@pytest.mark.parametrize("at", ["launching", "reporting", "building"])
async def test_a_start_cancelled_leaves_no_engine(tmp_path: Path, at: str) -> None:
    vllm, gate, reached = FakeVllm(), Gate(), threading.Event()

    def launching(watch: FakeWatch) -> None:
        reached.set()
        watch.was_killed.wait(60)

    if at == "launching":
        vllm.launching = launching
    elif at == "reporting":
        vllm.engine.reporting = gate.wait
    else:
        vllm.building = gate.wait
    start = asyncio.create_task(
        vllm.backend(tmp_path, FakeSpace()).start(spec(), place(0), nothing)
    )
    await until(lambda: reached.is_set() or gate.reached.is_set())
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(start)
    await until(lambda: vllm.engine.made == 1 and ended(vllm))


async def test_a_start_cancelled_at_any_turn_leaves_no_engine(tmp_path: Path) -> None:
    for turns in range(60):
        vllm = FakeVllm()
        start = asyncio.create_task(
            vllm.backend(tmp_path, FakeSpace()).start(spec(), place(0), nothing)
        )
        for _ in range(turns):
            await asyncio.sleep(0.0002)
        start.cancel()
        try:
            await soon(start)
        except asyncio.CancelledError:
            await until(lambda vllm=vllm: ended(vllm))  # type: ignore[misc]
        else:
            assert vllm.engine.stopped == 0


async def test_a_start_whose_report_fails_leaves_no_engine(tmp_path: Path) -> None:
    """Whatever goes wrong while it is looked at."""
    vllm = FakeVllm()
    vllm.launching = lambda watch: (
        (tmp_path / "model-chat.log").write_text("Warming up\n") and (watch.was_killed.wait(60))
    )

    def report(state: State, _: str) -> None:
        if state is State.WARMING:
            raise KeyError(state)

    with pytest.raises(StartupError):
        await soon(vllm.backend(tmp_path, FakeSpace()).start(spec(), place(0), report))
    await until(lambda: ended(vllm))
    assert vllm.engine.made == 1


async def test_a_start_without_sign_of_life_is_ended(tmp_path: Path) -> None:
    vllm = FakeVllm()
    vllm.launching = lambda watch: watch.was_killed.wait(60)
    backend = vllm.backend(tmp_path, FakeSpace())
    backend._patience = Patience(look_s=0.005, quiet_s=0.02)
    with pytest.raises(StartupError, match=r"hung, with no log line and no work for 0\.02 s"):
        await soon(backend.start(spec(), place(0), nothing))
    assert ended(vllm)


async def test_a_start_that_writes_is_not_ended_before_its_bound(tmp_path: Path) -> None:
    vllm = FakeVllm()
    lines = 0

    def launching(watch: FakeWatch) -> None:
        nonlocal lines
        while not watch.was_killed.wait(0.002):
            lines += 1
            with (tmp_path / "model-chat.log").open("a") as log:
                log.write("line\n")

    vllm.launching = launching
    backend = vllm.backend(tmp_path, FakeSpace())
    backend._patience = Patience(look_s=0.005, quiet_s=0.5, at_most_s=1.5)
    with pytest.raises(StartupError, match=r"not ready after 1\.5 s"):
        await soon(backend.start(spec(), place(0), nothing))
    assert lines > 1
    assert ended(vllm)


async def test_a_start_again_is_not_warming_at_once(tmp_path: Path) -> None:
    log = log_file(tmp_path, "chat")
    log.write_text("Warming up\n")
    states: list[State] = []
    vllm = FakeVllm(launching=lambda _: time.sleep(0.05))
    await soon(
        vllm.backend(tmp_path, FakeSpace()).start(
            spec(), place(0), lambda state, _: states.append(state)
        )
    )
    assert State.WARMING not in states
    assert log.with_name(f"{log.name}.1").read_text() == "Warming up\n"


@pytest.mark.parametrize(
    ("files", "flaw"),
    [
        ({}, "has no config.json"),
        ({"adapter_config.json": b"{}"}, "is an adapter and not a model"),
        ({"config.json": b"{}", "model.safetensors": b"x"}, "is not a complete safetensors file"),
    ],
)
def test_files_that_no_engine_could_load_are_told_before_one_starts(
    tmp_path: Path, files: dict[str, bytes], flaw: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(StartupError, match=flaw):
        _raise_if_flawed(spec(model=str(tmp_path)))


def test_what_only_vllm_understands_is_left_to_it(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_bytes(b"{}")
    (tmp_path / "model.pt").write_bytes(b"x")
    _raise_if_flawed(spec(model=str(tmp_path)))
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    _raise_if_flawed(spec(model=str(tmp_path), engine={"load_format": "dummy"}))
    _raise_if_flawed(spec(model="org/nowhere"))
