"""Several transitions at once, with one end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable
    from typing import Any

T = TypeVar("T")


async def in_parallel(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results of `works`, in their order; raise the first error among them.

    All have ended then, also if the caller was cancelled. `asyncio.gather` alone returns at
    the first error or cancellation.
    """
    results = await asyncio.gather(*works, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
