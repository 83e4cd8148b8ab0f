"""Steps, handled without vLLM's two tasks: what those do, on a fake core."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from vllm.v1.engine import EngineCoreOutputs, UtilityOutput
from vllm.v1.engine.core_client import AsyncMPClient, DPLBAsyncMPClient
from vllm.v1.metrics.stats import SchedulerStats

from llmserve.engine.fastpath.step_handler import StepHandler
from llmserve.engine.fastpath.zmq_sockets import EngineReceiver
from tests.contract.fast_path_box import FOX, assert_same, boxed, prompt, seen, user
from tests.contract.support import CHATS, COMPLETIONS, events
from tests.fakes import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.contract.fast_path_box import Box


@pytest.fixture
async def box() -> AsyncIterator[Box]:
    async with boxed() as made:
        yield made


async def test_no_step_waits_for_a_task(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    queued: list[Any] = []
    queue: Any = box.serving.engine.client.engine_core.outputs_queue
    monkeypatch.setattr(queue, "put_nowait", queued.append)
    for path, body in ((CHATS, user(FOX)), (COMPLETIONS, prompt(FOX))):
        for more in ({"stream": True}, {}, {"stream": True, "n": 2}, {"stop": ["never"]}):
            reply = await box.ask(path, body | {"max_tokens": 20} | more)
            assert reply.status_code == 200
    assert box.serving.engine.client.output_handler is not None  # vLLM's, should it be needed
    assert not queued


@pytest.mark.parametrize("more", [{}, {"stop": ["lazy"]}])
async def test_steps_handled_by_vllm_give_the_same_answer(
    box: Box, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    monkeypatch.setattr(StepHandler, "is_complete", staticmethod(lambda _: False))
    body = prompt(FOX) | {"max_tokens": 60, "stream": True} | more
    expected = seen(await box.ask(COMPLETIONS, body))
    async with boxed() as other:
        before = other.written
        for _ in range(2):  # the second one by template
            assert_same(seen(await other.ask(COMPLETIONS, body)), expected)
        assert other.written > before


async def test_step_that_fails_ends_all_requests(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    client = box.serving.engine.client
    process = client.output_processor.process_outputs
    steps: list[Any] = []

    def fails_once(*arguments: Any, **more: Any) -> Any:
        steps.append(arguments)
        if len(steps) == 1:
            raise RuntimeError("what is this")
        return process(*arguments, **more)

    asked = prompt(FOX) | {"max_tokens": 1900, "stream": True}
    before = box.written
    reading = asyncio.create_task(box.ask(COMPLETIONS, asked))
    await until(lambda: box.written != before)
    assert client.is_running
    monkeypatch.setattr(client.output_processor, "process_outputs", fails_once)
    *_, failure, done = events((await asyncio.wait_for(reading, 60)).text)
    assert failure["error"]["code"] == "engine_error"
    assert done == "[DONE]"
    assert not client.is_running
    assert len(steps) == 1  # none after the one that failed: a token would be missing


@pytest.mark.parametrize("end", ["cancelled", "dead engine"])
async def test_the_end_of_vllms_task_ends_the_reading(box: Box, end: str) -> None:
    core: Any = box.serving.engine.client.engine_core
    inboxes = [each for each in gc.get_objects() if isinstance(each, EngineReceiver)]
    (inbox,) = (each for each in inboxes if each._socket is core.resources.output_socket)
    assert inbox._fd is not None
    if end == "cancelled":
        core.resources.output_queue_task.cancel()
    else:
        inbox._pass_on([SimpleNamespace(buffer=b"ENGINE_CORE_DEAD")])
    await until(lambda: inbox._fd is None)
    assert core.resources.output_queue_task.done()


class Core:
    """An engine core as `StepHandler` knows it."""

    def __init__(self) -> None:
        self.decoder = msgspec.msgpack.Decoder(EngineCoreOutputs)
        self.outputs_queue: asyncio.Queue[Any] = asyncio.Queue()


def client(core: Any, images: object = None, logger: Any = None) -> Any:
    return SimpleNamespace(
        engine_core=core,
        output_processor=SimpleNamespace(update_scheduler_stats=lambda _: None),
        logger_manager=logger,
        log_stats=logger is not None,
        renderer=SimpleNamespace(mm_processor_cache=images),
    )


def test_what_is_no_step_is_left() -> None:
    steps = StepHandler(client(Core()))
    answer = EngineCoreOutputs(utility_output=UtilityOutput(call_id=1))
    assert not steps.handle(msgspec.msgpack.encode(answer))
    assert steps.handle(msgspec.msgpack.encode(EngineCoreOutputs()))
    assert not steps.handle(b"ENGINE_CORE_DEAD")


def test_step_without_outputs_records_scheduler_stats() -> None:
    recorded: list[Any] = []
    logger = SimpleNamespace(record=lambda **record: recorded.append(record))
    steps = StepHandler(client(Core(), logger=logger))
    for stats in (None, SchedulerStats(num_running_reqs=3)):
        steps._handle_step(EngineCoreOutputs(engine_index=1, scheduler_stats=stats))
    (one,) = recorded
    assert one["scheduler_stats"].num_running_reqs == 3
    assert (one["engine_idx"], one["iteration_stats"], one["mm_cache_stats"]) == (1, None, None)


def test_engines_with_more_to_do_are_left_to_vllm() -> None:
    assert StepHandler.is_complete(client(object.__new__(AsyncMPClient)))
    assert not StepHandler.is_complete(client(object.__new__(AsyncMPClient), images={}))
    assert not StepHandler.is_complete(client(object.__new__(DPLBAsyncMPClient)))
