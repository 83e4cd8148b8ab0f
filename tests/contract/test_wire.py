"""The ends of an engine's sockets, over real ZMQ sockets."""

from __future__ import annotations

import asyncio
import os
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import zmq
import zmq.asyncio

from llmserve.wire import Inbox, Outbox

if TYPE_CHECKING:
    from collections.abc import Iterator

COUNT = 2000


@contextmanager
def pair(limit: int = 0) -> Iterator[tuple[zmq.asyncio.Socket, zmq.asyncio.Socket]]:
    """Two connected sockets; `limit` messages wait on each side before a sender does."""
    with (
        zmq.asyncio.Context() as context,
        context.socket(zmq.PUSH) as push,
        context.socket(zmq.PULL) as pull,
    ):
        name = f"ipc://@llmserve-test-{uuid.uuid4().hex}"
        push.setsockopt(zmq.SNDHWM, limit)
        pull.setsockopt(zmq.RCVHWM, limit)
        pull.bind(name)
        push.connect(name)
        yield push, pull


async def test_messages_arrive_whole_and_in_order() -> None:
    with pair() as (push, pull):
        outbox, inbox = Outbox(push), Inbox(pull)

        async def send() -> None:
            for n in range(COUNT):
                await outbox.send_multipart((b"id", b"%d" % n), copy=False)
                if n % 100 == 0:
                    await asyncio.sleep(0)

        sending = asyncio.ensure_future(send())
        async with asyncio.timeout(20):
            got = [await inbox.recv_multipart(copy=True) for _ in range(COUNT)]
        await sending
    assert got == [[b"id", b"%d" % n] for n in range(COUNT)]


async def test_a_full_socket_is_waited_for() -> None:
    with pair(limit=10) as (push, pull):
        outbox, inbox = Outbox(push), Inbox(pull)

        async def send() -> None:
            for n in range(COUNT):
                await outbox.send_multipart((b"%d" % n,), copy=False)

        sending = asyncio.ensure_future(send())
        await asyncio.sleep(0.2)
        assert not sending.done()
        async with asyncio.timeout(20):
            got = [await inbox.recv_multipart(copy=True) for _ in range(COUNT)]
        await sending
    assert got == [[b"%d" % n] for n in range(COUNT)]


async def test_what_a_closed_socket_does_not_take_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pair() as (push, _):
        outbox = Outbox(push)
        push.close()  # as vLLM does at an engine's end
        for n in range(2):
            await outbox.send_multipart((b"%d" % n,), copy=False)
        await asyncio.sleep(0)
    assert caplog.text.count("a message to an engine was not sent") == 2


async def test_the_end_of_the_task_ends_the_watch() -> None:
    with pair() as (_, pull):
        inbox = Inbox(pull)
        waiting = asyncio.ensure_future(inbox.recv_multipart(copy=True))
        await asyncio.sleep(0.05)
        pull.close()  # as vLLM does, before it cancels the task
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(inbox._fd)
