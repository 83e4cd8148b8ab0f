"""The two sockets to an engine core, without the overhead of zmq.asyncio.

zmq.asyncio creates futures and timers and makes several system calls per message, even if the
message can be sent or has arrived. pyzmq's Socket combines its flags as enums for every frame,
which takes several times as long as its backend. vLLM awaits `send_multipart` and
`recv_multipart` only (vllm/v1/engine/core_client.py, AsyncMPClient), so these classes have these
two. Most messages of an engine are steps, which `StepHandler` handles at once.
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
    """Replace the sockets of a client without requests so far; its streams are in `flow`.

    vLLM's receiving task keeps the socket that it finds when it starts. vLLM closes its own.
    """
    core: Any = client.engine_core
    core.input_socket = EngineSender(core.input_socket, flow.schedule)
    own = core.resources.output_socket
    handle = StepHandler(client).handle if StepHandler.is_complete(client) else (lambda _: False)
    receiver = EngineReceiver(own, handle, flow)
    core.resources.output_socket = receiver
    try:
        await client.get_supported_tasks()  # the first call starts the task
    finally:
        core.resources.output_socket = own
        task = core.resources.output_queue_task
        if task is None:  # the engine has died
            receiver.close()
        else:
            task.add_done_callback(lambda _: receiver.close())


class EngineSender:
    """A socket that sends the messages of one event-loop iteration together.

    A wake-up of ZMQ's thread costs more than a message. Only a full socket makes a sender wait.
    """

    def __init__(self, socket: zmq.asyncio.Socket, schedule: Schedule = SCHEDULE) -> None:
        self._socket = socket
        self._limit = schedule.send_batch
        self._now = Socket(shadow=socket.underlying)
        self._held: list[tuple[Sequence[Any], bool]] = []
        self._queued = 0

    def send_multipart(self, message: Sequence[Any], *, copy: bool) -> Awaitable[Any]:
        if self._queued:  # messages keep their order
            return self._queue(message, copy=copy)
        if not self._held:
            asyncio.get_running_loop().call_soon(self._flush)
        self._held.append((message, copy))
        if len(self._held) >= self._limit:
            self._flush()
        return _DONE

    def _flush(self) -> None:
        held, self._held = self._held, []
        if held and self._socket.closed:  # the engine ended; vLLM fails its requests
            log.error("%d messages to an engine were not sent: the engine has ended", len(held))
            return
        for message, copy in held:
            try:
                if self._queued or not self._sent(message, copy=copy):
                    self._queue(message, copy=copy)
            except Exception:  # the other messages are sent
                log.exception("a message to an engine was not sent")

    def _sent(self, message: Sequence[Any], *, copy: bool) -> bool:
        send = self._now.send
        try:
            for part in message[:-1]:
                send(part, _MORE, copy)
            send(message[-1], _NOW, copy)
        except zmq.Again:  # only the first part raises it
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
    """A socket whose messages are handled where they arrive.

    The one receiving task gets those for which `handle` returns False. Text in `flow` leaves when
    all messages that have arrived are handled, or after `receive_s`.
    """

    def __init__(
        self,
        socket: zmq.asyncio.Socket,
        handle: Callable[[Sequence[Any]], bool],
        flow: FlushScheduler,
    ) -> None:
        self._socket = socket
        self._now = Socket(shadow=socket.underlying)
        # A descriptor of our own: vLLM closes the socket before it cancels the task.
        self._fd: int | None = os.dup(socket.FD)
        self._watched = False
        self._handle = handle
        self._flow = flow
        self._unhandled: deque[Sequence[Any] | Exception] = deque()
        self._waiting: asyncio.Future[None] | None = None

    async def recv_multipart(self, *, copy: bool) -> Sequence[Any]:
        """Return the frames of a message."""
        assert not copy  # noqa: S101  # AsyncMPClient passes False
        if not self._watched and self._fd is not None:
            self._watched = True
            asyncio.get_running_loop().add_reader(self._fd, self._receive)
        while not self._unhandled:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        message = self._unhandled.popleft()
        if isinstance(message, Exception):
            raise message
        return message

    def close(self) -> None:
        """End receiving."""
        if self._fd is not None:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None
            self._flow.release(more=False)

    def _receive(self) -> None:
        if self._fd is None:
            return
        if self._socket.closed:  # the task fails next
            self.close()
            return
        more = False
        self._flow.gather()
        try:
            more = self._receive_some()
        except Exception as error:  # the task raises it, and vLLM marks the engine as dead
            self._pass_on(error)
        if more:
            asyncio.get_running_loop().call_soon(self._receive)
        self._flow.release(more=more)

    def _receive_some(self) -> bool:
        """Handle messages for at most `receive_s`; return whether there are more."""
        get: Any = self._now.get
        until_s = time.monotonic() + self._flow.schedule.receive_s
        while get(_EVENTS) & _READABLE:  # an exception would cost more than a message
            if time.monotonic() > until_s:
                return True
            frames = [self._now.recv(_NOW, False)]
            while frames[-1].more:
                frames.append(self._now.recv(_NOW, False))
            if not self._handle(frames):
                self._pass_on(frames)
        return False

    def _pass_on(self, message: Sequence[Any] | Exception) -> None:
        self._unhandled.append(message)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


class _Done:
    """An awaitable that does not wait."""

    def __await__(self) -> Generator[Any, None, None]:
        return
        yield


_DONE = _Done()
