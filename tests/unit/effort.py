"""How much a piece of work is, counted: seconds differ from machine to machine."""

from __future__ import annotations

import asyncio
import cProfile
import sys
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

T = TypeVar("T")


def calls(work: Callable[[], T]) -> tuple[T, int]:
    """What it returned and its function calls; a million take about half a second."""
    with cProfile.Profile() as profile:
        result = work()
    return result, sum(entry.callcount for entry in profile.getstats())


class LongestTurn:
    """`with LongestTurn() as turn`: the most calls that one callback of asyncio's loop makes.

    Only calls of this thread count, in Python and into C, whatever the length of each.
    """

    calls = 0

    def __enter__(self) -> LongestTurn:
        self._current = 0
        sys.setprofile(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _count(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is asyncio.Handle._run.__code__:
            self._current = 0
        elif event in {"call", "c_call"}:
            self._current += 1
            self.calls = max(self.calls, self._current)
