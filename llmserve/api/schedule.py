"""Shares of an event-loop iteration. docs/event-loop.md has its time line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Schedule:
    """Times in seconds (`_s`) and counts."""

    # New requests: http/request_batcher.py.
    first_batch: int = 4
    largest_batch: int = 64
    batch_s: float = 0.008  # longest time from the first request of a batch to its last

    # Prompts that vLLM prepares: engine/pacing.py.
    renders: int = 64  # prompts that begin in one iteration

    # Messages of one engine: engine/fastpath/zmq_sockets.py.
    send_batch: int = 64  # messages held until the end of the iteration, at most
    receive_s: float = 0.002  # share of an iteration

    # Text of the streams of one engine: FlushScheduler.
    collect_s: float = 0.1  # longest time before text is written
    flush_s: float = 0.001  # share of an iteration for ends and later text
    short_s: float = 0.001  # longest short iteration
    short_iterations: int = 4  # after a request or an end, before ends and later text

    # Streams without text.
    tend_s: float = 0.5  # between two passes over all streams
    headers_s: float = 2.0  # longest time before the headers: an earlier error has its own status
    ping_s: float = 15.0  # idle time before a comment, for proxies
    comment_s: float = 5.0  # between comments to a queued request


SCHEDULE = Schedule()
