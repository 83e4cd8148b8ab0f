"""One streamed request over a connection of its own, timed where the bytes arrive.

A load client must cost less than what it measures: a protocol on the loop, no HTTP
library, no JSON per event. What is taken from an event is whether it carries text.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import orjson

# An event with text in it: chat's `"content":"x`, a completion's `"text":"x`.
_TEXT = re.compile(rb'"(?:content|text)":\s?"(?!")')
_USAGE = re.compile(rb'"completion_tokens":\s?(\d+)')
_EVENT, _DONE = b"data: ", b"data: [DONE]"
_END = 48  # bytes of a read that can hold the stream's end and what frames it


@dataclass(slots=True)
class Answer:
    """What came, and when. Times are `time.monotonic()`."""

    sent_s: float = 0.0
    reads_s: list[float] = field(default_factory=list)  # reads that carried text
    done_s: float = 0.0  # the end of the stream
    events: int = 0
    tokens: int = 0  # by the answer's own usage, where it was asked for
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """To the first text: an early chunk that only names the role is no token."""
        return self.reads_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.reads_s, self.reads_s[1:], strict=False)]

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.reads_s[-1] - self.reads_s[0]) / max(1, self.tokens - 1)


async def ask(host: str, port: int, path: str, body: dict[str, Any]) -> Answer:
    """Send `body` and read the stream to its end. A failure is in `Answer.error`."""
    payload = orjson.dumps(body)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    answer = Answer(sent_s=time.monotonic())
    ended = asyncio.get_running_loop().create_future()
    try:
        transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: _Reading(head.encode() + payload, answer, ended), host, port
        )
    except OSError as error:
        answer.error = str(error)
        return answer
    try:
        await ended
    finally:
        transport.abort()
    return answer


class _Reading(asyncio.Protocol):
    def __init__(self, request: bytes, answer: Answer, ended: asyncio.Future[None]) -> None:
        self._request = request
        self._answer = answer
        self._ended = ended
        self._tail = b""
        self._last: deque[bytes] = deque(maxlen=8)  # the last reads: usage is in them
        self._started = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        answer, whole = self._answer, self._tail + data
        if not self._started:
            self._started = True
            if b" 200 " not in data[:16]:
                answer.error = data.partition(b"\r\n")[0].decode("latin-1")
        if _TEXT.search(whole):
            answer.reads_s.append(now)
        answer.events += whole.count(_EVENT) - self._tail.count(_EVENT)
        # What may be the first half of a name or a marker comes again with the next read.
        self._tail = whole[-24:]
        self._last.append(data)
        if _DONE in whole[-_END:]:
            answer.done_s = now
            if usage := _USAGE.search(b"".join(self._last)):
                answer.tokens = int(usage[1])
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._answer.done_s and not self._answer.error:
            self._answer.error = f"the stream ended early: {exc or 'closed'}"
        self._end()

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)
