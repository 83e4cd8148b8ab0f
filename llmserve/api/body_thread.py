"""Work on large bodies, beside the event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple, Unpack

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class BodyThread:
    """One thread: each further one would compete with the loop for the GIL.

    The loop waits for the GIL as long as one call into C takes. Work that runs here is
    made of calls that are short, or release the GIL.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="body")

    async def run(self, work: Callable[[Unpack[Ts]], T], *arguments: *Ts) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, work, *arguments)
