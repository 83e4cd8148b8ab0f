"""When Python looks for cycles: each look stalls every stream for as long as it takes."""

from __future__ import annotations

import asyncio
import gc

_THRESHOLD = (50_000, 10, 20)  # a burst of a thousand requests is no reason to look
_SOON_S = 1.0


def keep() -> None:
    """What is here now stays, vLLM's modules say: no later look walks through it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLD)


def look_soon() -> None:
    """An engine has ended: its client is one cycle, with threads, descriptors and buffers.

    Once nobody holds it any more.
    """
    asyncio.get_running_loop().call_later(_SOON_S, gc.collect)
