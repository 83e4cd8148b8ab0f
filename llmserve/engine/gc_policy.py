"""When Python collects reference cycles: a collection stalls all streams while it runs."""

from __future__ import annotations

import asyncio
import gc

# A burst of requests must not start a collection: each request has some hundred objects in
# flight, and a collection over 512 requests takes 20 ms.
_THRESHOLD = (200_000, 10, 20)
_SOON_S = 1.0


def freeze() -> None:
    """Exclude all present objects, such as vLLM's modules, from later collections."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLD)


def collect_soon() -> None:
    """Collect an ended engine's client, a cycle with threads, descriptors and buffers.

    After a delay, in which the last references to it are dropped.
    """
    asyncio.get_running_loop().call_later(_SOON_S, gc.collect)
