"""When Python looks for cycles: each look stalls every stream for as long as it takes."""

from __future__ import annotations

import asyncio
import gc

# A burst is no reason to look: each of its requests has some hundred objects while it is here,
# and a look at those of 512 takes 20 ms.
_THRESHOLD = (200_000, 10, 20)
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
