"""The ends of an engine's sockets, over real ZMQ sockets."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import zmq
import zmq.asyncio

from llmserve.api.token_stream import FlushScheduler
from llmserve.engine.fastpath.zmq_sockets import EngineReceiver, EngineSender

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

COUNT = 2000


class Turns(FlushScheduler):
    """Notes when text is gathered, and when it leaves."""

    def __init__(self) -> None:
        super().__init__(lambda _: None)
        self.seen: list[Any] = []

    def gather(self) -> None:
        self.seen.append("gather")

    def release(self, *, more: bool) -> None:
        self.seen.append("more" if more else "all")


def inbox_of(
    socket: zmq.asyncio.Socket,
    take: Callable[[list[bytes]], bool] = lambda _: False,
    flow: FlushScheduler | None = None,
) -> EngineReceiver:
    """`take` gets a message as bytes."""

    def taken(frames: Sequence[Any]) -> bool:
        return take([frame.bytes for frame in frames])

    return EngineReceiver(socket, taken, flow or Turns())


async def received(inbox: EngineReceiver) -> list[bytes]:
    return [frame.bytes for frame in await inbox.recv_multipart(copy=False)]


async def waits(inbox: EngineReceiver, flow: Turns) -> asyncio.Future[list[bytes]]:
    """For a first message; the connection has been made, which is a turn without one."""
    waiting = asyncio.ensure_future(received(inbox))
    await asyncio.sleep(0.05)
    flow.seen.clear()
    return waiting


@contextmanager
def pair(
    limit: int = 0, *, at_once: bool = False
) -> Iterator[tuple[zmq.asyncio.Socket, zmq.asyncio.Socket]]:
    """Two connected sockets; `limit` messages wait on each side before a sender does.

    `at_once`: what is sent is there, without a thread that carries it.
    """
    with (
        zmq.asyncio.Context() as context,
        context.socket(zmq.PUSH) as push,
        context.socket(zmq.PULL) as pull,
    ):
        name = f"{'inproc://' if at_once else 'ipc://@'}llmserve-test-{uuid.uuid4().hex}"
        push.setsockopt(zmq.LINGER, 0)  # a peer that is closed reads nothing
        push.setsockopt(zmq.SNDHWM, limit)
        pull.setsockopt(zmq.RCVHWM, limit)
        pull.bind(name)
        push.connect(name)
        yield push, pull


async def test_messages_arrive_whole_and_in_order() -> None:
    with pair() as (push, pull):
        outbox, inbox = EngineSender(push), inbox_of(pull)

        async def send() -> None:
            for n in range(COUNT):
                await outbox.send_multipart((b"id", b"%d" % n), copy=False)
                if n % 100 == 0:
                    await asyncio.sleep(0)

        sending = asyncio.ensure_future(send())
        async with asyncio.timeout(60):
            got = [await received(inbox) for _ in range(COUNT)]
        await sending
    assert got == [[b"id", b"%d" % n] for n in range(COUNT)]


async def test_a_full_socket_is_waited_for() -> None:
    with pair(limit=10) as (push, pull):
        outbox, inbox = EngineSender(push), inbox_of(pull)

        async def send() -> None:
            for n in range(COUNT):
                await outbox.send_multipart((b"%d" % n,), copy=False)

        sending = asyncio.ensure_future(send())
        await asyncio.sleep(0.2)
        assert not sending.done()
        async with asyncio.timeout(60):
            got = [await received(inbox) for _ in range(COUNT)]
        await sending
    assert got == [[b"%d" % n] for n in range(COUNT)]


async def test_sender_with_closed_socket_logs_lost_messages(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pair() as (push, _):
        outbox = EngineSender(push)
        push.close()  # as vLLM does at an engine's end
        for n in range(2):
            await outbox.send_multipart((b"%d" % n,), copy=False)
        await asyncio.sleep(0)
    assert "2 messages to an engine were not sent: the engine has ended" in caplog.text


class Breaking:
    """The end of a socket that one message breaks."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket

    def send(self, part: bytes, *rest: Any) -> None:
        if part == b"broken":
            raise RuntimeError("no such message")
        self._socket.send(part, *rest)


async def test_outbox_with_message_that_breaks_sends_the_rest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pair() as (push, pull):
        outbox, inbox = EngineSender(push), inbox_of(pull)
        outbox._now = Breaking(outbox._now)  # type: ignore[assignment]
        for message in (b"1", b"broken", b"2", b"broken", b"3"):
            await outbox.send_multipart((message,), copy=False)
        async with asyncio.timeout(60):
            assert [await received(inbox) for _ in range(3)] == [[b"1"], [b"2"], [b"3"]]
    assert caplog.text.count("a message to an engine was not sent") == 2


async def test_outbox_with_queued_message_that_breaks_logs_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pair() as (push, pull):
        outbox, inbox = EngineSender(push), inbox_of(pull)
        sent = outbox._queue(("no bytes",), copy=False)
        await asyncio.wait({asyncio.ensure_future(sent)})
        await outbox.send_multipart((b"1",), copy=False)
        assert await asyncio.wait_for(received(inbox), 60) == [b"1"]
    assert "a message to an engine was not sent" in caplog.text


async def test_receiver_hides_handled_messages_from_the_task() -> None:
    """And what has come together is one turn."""
    taken: list[bytes] = []

    def take(message: list[bytes]) -> bool:
        if not message[0].startswith(b"step"):
            return False
        taken.extend(message)
        return True

    with pair(at_once=True) as (push, pull):
        flow = Turns()
        inbox = inbox_of(pull, take, flow)
        waiting = await waits(inbox, flow)
        for message in (b"step 1", b"answer 1", b"step 2", b"answer 2"):
            await push.send(message)
        assert await asyncio.wait_for(waiting, 60) == [b"answer 1"]
        assert await received(inbox) == [b"answer 2"]
        assert taken == [b"step 1", b"step 2"]
        assert flow.seen == ["gather", "all"]


async def test_receiver_yields_to_the_event_loop_when_slow() -> None:
    def take(_: list[bytes]) -> bool:
        time.sleep(0.003)
        return True

    with pair(at_once=True) as (push, pull):
        flow = Turns()
        inbox = inbox_of(pull, take, flow)
        waiting = await waits(inbox, flow)
        for _ in range(5):
            await push.send(b"step")
        others = 0
        async with asyncio.timeout(60):
            while "all" not in flow.seen:
                others += 1
                await asyncio.sleep(0)
        assert flow.seen == [*["gather", "more"] * 4, "gather", "all"]
        assert others >= 5
        waiting.cancel()


async def test_a_closed_socket_is_not_read_before_the_task_hears_of_it() -> None:
    with pair() as (push, pull):
        flow = Turns()
        inbox = inbox_of(pull, flow=flow)
        waiting = await waits(inbox, flow)
        await push.send(b"too late")
        pull.close()
        for _ in range(2):  # what was to be received in this turn, and in the next
            inbox._receive()
        await asyncio.sleep(0.05)
        assert flow.seen == ["all"]
        assert not waiting.done()
        waiting.cancel()


async def test_what_fails_on_the_way_is_the_tasks_and_lets_text_go() -> None:
    def take(_: list[bytes]) -> bool:
        raise RuntimeError("no step can be taken")

    with pair() as (push, pull):
        flow = Turns()
        waiting = asyncio.ensure_future(received(inbox_of(pull, take, flow)))
        await push.send(b"step")
        with pytest.raises(RuntimeError, match="no step can be taken"):
            await asyncio.wait_for(waiting, 60)
        assert flow.seen[-2:] == ["gather", "all"]


async def test_closed_it_leaves_nothing() -> None:
    with pair() as (_, pull):
        inbox = inbox_of(pull)
        waiting = asyncio.ensure_future(received(inbox))
        await asyncio.sleep(0.05)
        descriptor = inbox._fd
        assert descriptor is not None
        for _ in range(2):
            inbox.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
        assert not asyncio.get_running_loop().remove_reader(descriptor)
        waiting.cancel()
