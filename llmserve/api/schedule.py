"""How the event loop divides its time. docs/event-loop.md has the time line of an iteration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Schedule:
    """Times in seconds; the rest are counts."""

    # New requests: http/request_batcher.py.
    first_batch: int = 4
    largest_batch: int = 64
    batch_s: float = 0.008  # from the first request of a batch to the last, at most

    # Prompts that vLLM prepares: engine/pacing.py.
    renders: int = 64  # that begin in one iteration

    # Messages of one engine: engine/fastpath/zmq_sockets.py.
    send_batch: int = 64  # that are held until the end of the iteration, at most
    receive_s: float = 0.002  # of an iteration

    # Text of the streams of one engine: FlushScheduler.
    collect_s: float = 0.1  # text is collected for at most this long before it is written
    flush_s: float = 0.001  # of an iteration, for text that is neither a first nor a last one
    short_s: float = 0.001  # a longer iteration had more to do than to write
    short_iterations: int = 4  # after a request or an end, before collected text is written

    # Streams without text.
    tend_s: float = 0.5  # between two looks at all of them
    headers_s: float = 2.0  # the headers wait so long for what could still be an error
    ping_s: float = 15.0  # without a byte, before a comment: proxies keep the connection
    comment_s: float = 5.0  # between comments to a request that is queued


SCHEDULE = Schedule()
