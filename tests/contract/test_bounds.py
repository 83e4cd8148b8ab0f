"""Whatever is asked of an engine returns or raises within a bound, and a hung one is killed."""

from __future__ import annotations

import asyncio
import signal
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from subprocess import Popen
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from llmserve.engine.parent_watch import ParentWatch
from llmserve.errors import EngineError
from llmserve.lifecycle.placement import Level
from llmserve.registry.spec import ModelSpec
from tests import watched_server
from tests.contract.support import CHAT, on_fake_core
from tests.fakes import soon

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator


class Hung:
    """AsyncLLM of an engine that answers nothing, once it has been told to be `silent`."""

    def __init__(self) -> None:
        self.errored = False
        self.engine_core = self
        self.asked: list[str] = []
        self.stops = threading.Event()
        self.stops.set()

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def never(*_: Any, **__: Any) -> None:
            self.asked.append(name)
            await asyncio.Event().wait()

        return never

    def shutdown(self, timeout: float) -> None:
        self.asked.append("shutdown")
        self.stops.wait()


@pytest.fixture
def client() -> Hung:
    return Hung()


@pytest.fixture
def engine(client: Hung) -> Iterator[Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs

    from llmserve.engine.engine import Bounds, Engine
    from llmserve.engine.metrics import EngineMetrics

    arguments = AsyncEngineArgs(model="m", enable_sleep_mode=True)
    hung: Any = client
    watch = ParentWatch()
    made = Engine(hung, arguments, EngineMetrics("chat"), watch, Path("model-chat.log"))
    made.bounds = Bounds(
        answer_s=0.02, silence_s=0.5, stop_s=0.05, copied_per_s=1e12, read_per_s=1e12
    )
    yield made
    watch.kill()


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda engine: engine.start_reports(), "report its start"),
        (lambda engine: engine.prepare_sleep(), "prepare for sleep"),
        *(
            (lambda engine, level=level: engine.sleep(level), f"sleep at level {level.name}")
            for level in (Level.KV_RELEASED, Level.HOST, Level.DISK)
        ),
    ],
)
async def test_engine_hung_in_a_call_is_killed(
    engine: Any, client: Hung, call: Callable[[Any], Awaitable[None]], what: str
) -> None:
    process = watched_server.start(engine._watch)
    with pytest.raises(EngineError) as raised:
        await soon(call(engine))
    assert raised.value.message == (
        f"the engine did not {what} within 0.02 s and was killed; its log: model-chat.log"
    )
    assert engine.dead
    assert len(client.asked) == 1
    await asyncio.to_thread(process.join, 60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("level", [Level.KV_RELEASED, Level.HOST, Level.DISK])
async def test_engine_hung_as_it_wakes_is_killed(engine: Any, level: Level) -> None:
    engine.level = level
    with pytest.raises(EngineError, match=r"did not wake within 0\.02 s and was killed"):
        await soon(engine.wake())
    assert engine.dead


async def test_engine_cannot_be_built_on_a_hung_one(engine: Any) -> None:
    from llmserve.engine.handler_state import create_handlers

    with pytest.raises(EngineError, match=r"did not report its tasks within 0\.02 s"):
        await soon(create_handlers(ModelSpec(name="chat", model=str(CHAT)), engine))
    assert engine.dead


async def test_engine_that_refuses_is_not_killed(engine: Any, client: Any) -> None:
    async def collective_rpc(_: str) -> None:
        raise TimeoutError("of its own")

    client.collective_rpc = collective_rpc
    with pytest.raises(EngineError, match="could not prepare for sleep: TimeoutError: of its own"):
        await soon(engine.prepare_sleep())
    assert not engine.dead


async def test_engine_that_does_not_stop_is_killed(engine: Any, client: Hung) -> None:
    client.stops.clear()
    try:
        await soon(engine.end())
        assert client.asked == ["shutdown"]
        assert engine.dead
    finally:
        client.stops.set()


async def test_engine_that_stops_leaves_no_process(engine: Any) -> None:
    process = watched_server.start(engine._watch)
    await soon(engine.end())
    await asyncio.to_thread(process.join, 60)
    assert process.exitcode == -signal.SIGKILL


def test_bounds_grow_with_what_is_moved() -> None:
    from llmserve.engine.engine import Bounds

    bounds = Bounds()
    assert bounds.answer_s < bounds.copy_s(70 << 30) < bounds.read_s(70 << 30)
    assert bounds.read_s(140 << 30) > 140 * 2**30 / (50 << 20)  # a slow disk


async def test_engine_s_weights_decide_its_bounds(engine: Any, client: Any) -> None:
    async def collective_rpc(_: str) -> list[dict[str, Any]]:
        return [{"seconds": {}, "bytes": {"weights": 10**11}} for _ in range(2)]

    client.collective_rpc = collective_rpc
    await engine.start_reports()
    assert engine.bounds.read_s(engine._weight_bytes) == pytest.approx(0.22)


# --- whether it works


@contextmanager
def process_of(engine: Any, code: str) -> Iterator[Popen[bytes]]:
    with Popen(["sh", "-c", code]) as process:
        engine._watch._started.append(SimpleNamespace(pid=process.pid))
        try:
            yield process
        finally:
            process.kill()


WORKS = "while :; do :; done"


async def test_engine_silent_and_idle_is_hung(engine: Any) -> None:
    with process_of(engine, "sleep 60"):
        assert await soon(engine.responds(0.2)) is False


async def test_engine_silent_that_works_is_hung_once_it_stops(engine: Any) -> None:
    engine.bounds = replace(engine.bounds, silence_s=600.0)
    with process_of(engine, WORKS) as process:
        asked = asyncio.create_task(engine.responds(0.4))
        done, _ = await asyncio.wait({asked}, timeout=1.5)
        assert not done
        process.kill()
        assert await soon(asked) is False


async def test_engine_that_works_without_end_is_hung_at_last(engine: Any) -> None:
    with process_of(engine, WORKS):
        assert await soon(engine.responds(0.2)) is False


async def test_engine_dead_has_answered() -> None:
    spec = ModelSpec(name="chat", model=str(CHAT), engine={"max_model_len": 512})
    async with on_fake_core(spec) as (serving, _):
        serving.engine.client.engine_core.resources.engine_dead = True
        assert await serving.responds(5)


async def test_engine_s_handlers_are_built_outside_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state

    threads: list[threading.Thread] = []

    async def noted(*arguments: Any) -> None:
        threads.append(threading.current_thread())
        await init_app_state(*arguments)

    monkeypatch.setattr("llmserve.engine.handler_state.init_app_state", noted)
    spec = ModelSpec(name="chat", model=str(CHAT), engine={"max_model_len": 512})
    async with on_fake_core(spec) as (serving, _):
        changed = await serving.changed(spec.model_copy(update={"tool_call_parser": "hermes"}))
        assert changed.endpoints == serving.endpoints
    assert len(threads) == 2
    assert threading.current_thread() not in threads
