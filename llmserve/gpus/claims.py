"""Claims: the right to start, sleep or wake on certain GPUs.

Engines of known memory start side by side. One that is measured, sleeps or wakes has its GPUs
alone, because vLLM and llmserve then read the free memory of the whole device.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Hashable


@dataclass(eq=False)
class _Claim:
    places: frozenset[Hashable]
    alone: bool

    def excludes(self, other: _Claim) -> bool:
        return (self.alone or other.alone) and bool(self.places & other.places)


class GpuClaims:
    """Claims in order of arrival; claims on different GPUs do not wait for each other."""

    def __init__(self) -> None:
        self._claims: list[_Claim] = []  # held and waiting, in order of arrival
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def hold(self, places: Collection[Hashable], *, alone: bool) -> AsyncIterator[None]:
        """Wait for the GPUs; `alone` excludes all other claims on them."""
        claim = _Claim(frozenset(places), alone)
        async with self._changed:
            self._claims.append(claim)
            try:
                await self._changed.wait_for(lambda: self._is_next(claim))
            except BaseException:
                self._remove(claim)
                raise
        try:
            yield
        finally:
            async with self._changed:
                self._remove(claim)

    def _is_next(self, claim: _Claim) -> bool:
        before = self._claims[: self._claims.index(claim)]
        return not any(claim.excludes(earlier) for earlier in before)

    def _remove(self, claim: _Claim) -> None:
        self._claims.remove(claim)
        self._changed.notify_all()
