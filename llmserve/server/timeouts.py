"""Time limits of one connection, checked by a sweep over all connections.

Hot paths neither read a clock nor set a timer: they count, and the sweep compares.
"""

from __future__ import annotations

import socket
import struct
from enum import Enum
from typing import TYPE_CHECKING

from llmserve.errors import RequestTimeout

if TYPE_CHECKING:
    import asyncio

    from llmserve.server.limits import Limits

_BYTES_ACKED = 120  # offset of tcpi_bytes_acked in struct tcp_info, linux/tcp.h


class Wait(Enum):
    """What a connection waits for."""

    HEAD = "head"
    REQUEST = "request"
    BODY = "body"
    END = "end"  # of what the client sends after its answer
    ANSWER = "answer"


class Timeouts:
    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._wait = Wait.REQUEST, -1
        self._wait_s = self._read_s = self._acked_s = 0.0  # when the values beside them changed
        self._reads = self._acked = -1

    def is_over(self, now: float, wait: Wait, messages: int, reads: int) -> bool:
        """Whether to close the connection, which waits for `wait` of its message `messages`.

        `reads` counts reads from the socket. Raises RequestTimeout for the client.
        """
        if (wait, messages) != self._wait:
            self._wait, self._wait_s, self._read_s = (wait, messages), now, now
        if reads != self._reads:
            self._reads, self._read_s = reads, now
        limits, total_s = self._limits, now - self._wait_s
        if wait is Wait.HEAD:
            _check("headers", total_s, limits.head_s)
        elif wait is Wait.BODY:
            _check("next byte of the body", now - self._read_s, limits.body_idle_s)
            _check("body", total_s, limits.body_s)
        elif wait is Wait.END:
            return total_s > limits.linger_s
        elif wait is Wait.REQUEST:
            return total_s > (limits.keep_alive_s if messages else limits.head_s)
        return False

    def is_stuck(self, now: float, transport: asyncio.Transport) -> bool:
        """Whether the client accepts no bytes of the answers that wait for it."""
        if not transport.get_write_buffer_size():
            self._acked = -1
            return False
        acked = _acknowledged(transport)
        if self._acked < 0 or acked - self._acked >= self._limits.stuck_bytes:
            self._acked, self._acked_s = acked, now
        return now - self._acked_s > self._limits.stuck_s


def _check(awaited: str, waited_s: float, limit_s: float) -> None:
    if waited_s > limit_s:
        raise RequestTimeout(
            f"The {awaited} did not arrive within {limit_s:g} seconds. Send the request again."
        )


def _acknowledged(transport: asyncio.Transport) -> int:
    """Bytes that the client's machine has acknowledged; 0 for a closed connection."""
    try:
        raw = transport.get_extra_info("socket")
        info = raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED + 8)
    except OSError:
        return 0
    (acked,) = struct.unpack_from("=Q", info, _BYTES_ACKED)
    return int(acked)
