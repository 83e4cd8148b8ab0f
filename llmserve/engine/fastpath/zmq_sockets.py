"""The two sockets to an engine core, without what zmq.asyncio does around each message.

zmq.asyncio makes futures, timers and several system calls per message, also when it can
be sent or is here already, and pyzmq's own Socket combines its flags as enums for every
frame, which takes several times as long as its backend. vLLM only awaits `send_multipart` and
`recv_multipart` (vllm/v1/engine/core_client.py, AsyncMPClient), so these two offer that. Most of
what an engine says is a step, which `StepHandler` handles at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import zmq
import zmq.asyncio
from zmq.backend import Socket

from llmserve.api.schedule import SCHEDULE
from llmserve.engine.fastpath.step_handler import StepHandler

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Sequence

    from vllm.v1.engine.async_llm import AsyncLLM

    from llmserve.api.schedule import Schedule
    from llmserve.api.token_stream import FlushScheduler

log = logging.getLogger(__name__)

_NOW, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENTS, _READABLE = int(zmq.EVENTS), int(zmq.POLLIN)


async def take_over(client: AsyncLLM, flow: FlushScheduler) -> None:
    """Replace the sockets of a client that has had no request yet; its streams are in `flow`.

    vLLM's receiving task keeps the socket that it finds when it starts; what vLLM closes in
    the end is its own.
    """
    core: Any = client.engine_core
    core.input_socket = EngineSender(core.input_socket, flow.schedule)
    own = core.resources.output_socket
    take = StepHandler(client).take if StepHandler.all_there_is(client) else _nothing
    inbox = EngineReceiver(own, take, flow)
    core.resources.output_socket = inbox
    try:
        await client.get_supported_tasks()  # a first message back and forth starts the task
    finally:
        core.resources.output_socket = own
        task = core.resources.output_queue_task
        if task is None:  # that engine has died
            inbox.close()
        else:
            task.add_done_callback(lambda _: inbox.close())


class EngineSender:
    """A socket that sends the messages of one iteration of the loop in one go.

    Each wake-up of ZMQ's thread costs more than a message. Only a full socket waits.
    """

    def __init__(self, socket: zmq.asyncio.Socket, schedule: Schedule = SCHEDULE) -> None:
        self._socket = socket
        self._limit = schedule.send_batch
        self._now = Socket(shadow=socket.underlying)
        self._held: list[tuple[Sequence[Any], bool]] = []
        self._queued = 0

    def send_multipart(self, message: Sequence[Any], *, copy: bool) -> Awaitable[Any]:
        if self._queued:  # else it would overtake them
            return self._queue(message, copy=copy)
        if not self._held:
            asyncio.get_running_loop().call_soon(self._flush)
        self._held.append((message, copy))
        if len(self._held) >= self._limit:
            self._flush()
        return _DONE

    def _flush(self) -> None:
        held, self._held = self._held, []
        if held and self._socket.closed:  # the engine's end; its requests are told by vLLM
            log.error("%d messages to an engine were not sent: it has ended", len(held))
            return
        for message, copy in held:
            try:
                if self._queued or not self._sent(message, copy=copy):
                    self._queue(message, copy=copy)
            except Exception:  # this one's; the others are sent
                log.exception("a message to an engine was not sent")

    def _sent(self, message: Sequence[Any], *, copy: bool) -> bool:
        send = self._now.send
        try:
            for part in message[:-1]:
                send(part, _MORE, copy)
            send(message[-1], _NOW, copy)
        except zmq.Again:  # at the first part, if at all
            return False
        return True

    def _queue(self, message: Sequence[Any], *, copy: bool) -> Awaitable[Any]:
        sent = asyncio.ensure_future(self._socket.send_multipart(message, copy=copy))
        self._queued += 1
        sent.add_done_callback(self._dequeue)
        return sent

    def _dequeue(self, sent: asyncio.Future[Any]) -> None:
        self._queued -= 1
        if not sent.cancelled() and (error := sent.exception()) is not None:
            log.error("a message to an engine was not sent", exc_info=error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


class EngineReceiver:
    """A socket whose messages are handled where they come.

    Those that `take` refuses are for the one task that receives. What they brought to `flow`
    leaves when all that have come are handled, or after `receive_s`, when
    the loop goes on.
    """

    def __init__(
        self,
        socket: zmq.asyncio.Socket,
        take: Callable[[Sequence[Any]], bool],
        flow: FlushScheduler,
    ) -> None:
        self._socket = socket
        self._now = Socket(shadow=socket.underlying)
        # A descriptor of our own: vLLM closes the socket before it cancels the task.
        self._fd: int | None = os.dup(socket.FD)
        self._watched = False
        self._take = take
        self._flow = flow
        self._left: deque[Sequence[Any] | Exception] = deque()
        self._waiting: asyncio.Future[None] | None = None

    async def recv_multipart(self, *, copy: bool) -> Sequence[Any]:
        """A message as frames."""
        assert not copy  # noqa: S101  # as AsyncMPClient asks
        if not self._watched and self._fd is not None:
            self._watched = True
            asyncio.get_running_loop().add_reader(self._fd, self._receive)
        while not self._left:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        message = self._left.popleft()
        if isinstance(message, Exception):
            raise message
        return message

    def close(self) -> None:
        """Nobody receives any more."""
        if self._fd is not None:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None
            self._flow.release(more=False)

    def _receive(self) -> None:
        if self._fd is None:
            return
        if self._socket.closed:  # the task is about to hear of it
            self.close()
            return
        more = False
        self._flow.gather()
        try:
            more = self._receive_some()
        except Exception as error:  # the task is told: vLLM takes the engine for dead
            self._leave(error)
        if more:
            asyncio.get_running_loop().call_soon(self._receive)
        self._flow.release(more=more)

    def _receive_some(self) -> bool:
        """Whether there are more."""
        get: Any = self._now.get
        until_s = time.monotonic() + self._flow.schedule.receive_s
        while get(_EVENTS) & _READABLE:  # an exception would cost more than a message
            if time.monotonic() > until_s:
                return True
            frames = [self._now.recv(_NOW, False)]
            while frames[-1].more:
                frames.append(self._now.recv(_NOW, False))
            if not self._take(frames):
                self._leave(frames)
        return False

    def _leave(self, message: Sequence[Any] | Exception) -> None:
        self._left.append(message)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


def _nothing(_: Sequence[Any]) -> bool:
    return False


class _Done:
    """An awaitable that does not wait."""

    def __await__(self) -> Generator[Any, None, None]:
        return
        yield


_DONE = _Done()
