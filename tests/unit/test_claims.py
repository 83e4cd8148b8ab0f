"""Which starts on a GPU wait for which."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from llmserve.gpus.claims import GpuClaims

if TYPE_CHECKING:
    from collections.abc import Collection


class Starts:
    """Starts that hold until released, and the order in which they got their GPUs."""

    def __init__(self) -> None:
        self.locks = GpuClaims()
        self.running: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def begin(self, name: str, devices: Collection[int], *, alone: bool = False) -> None:
        self._ends[name] = asyncio.Event()
        self._tasks[name] = asyncio.create_task(self._hold(name, devices, alone))
        await self.settle()

    async def _hold(self, name: str, devices: Collection[int], alone: bool) -> None:
        async with self.locks.hold(devices, alone=alone):
            self.running.append(name)
            try:
                await self._ends[name].wait()
            finally:
                self.running.remove(name)

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await self.settle()

    async def cancel(self, name: str) -> None:
        self._tasks[name].cancel()
        await self.settle()

    @staticmethod
    async def settle() -> None:
        for _ in range(10):
            await asyncio.sleep(0)


async def test_known_engines_share_a_gpu() -> None:
    starts = Starts()
    await starts.begin("a", [0])
    await starts.begin("b", [0, 1])
    assert starts.running == ["a", "b"]


async def test_a_measured_start_has_its_gpus_for_itself() -> None:
    starts = Starts()
    await starts.begin("a", [0], alone=True)
    await starts.begin("b", [0, 1])
    await starts.begin("c", [2], alone=True)
    assert starts.running == ["a", "c"]
    await starts.end("a")
    assert starts.running == ["c", "b"]


async def test_claim_alone_keeps_its_place_in_the_queue() -> None:
    starts = Starts()
    await starts.begin("a", [0])
    await starts.begin("b", [0], alone=True)
    await starts.begin("c", [0])
    assert starts.running == ["a"]
    await starts.end("a")
    assert starts.running == ["b"]
    await starts.end("b")
    assert starts.running == ["c"]


@pytest.mark.parametrize("held", [True, False])
async def test_a_start_that_is_given_up_leaves_its_gpus(held: bool) -> None:
    starts = Starts()
    await starts.begin("a", [0], alone=True)
    await starts.begin("b", [0], alone=True)
    await starts.begin("c", [0], alone=True)
    await starts.cancel("a" if held else "b")
    await starts.end("a")
    assert starts.running == (["b"] if held else ["c"])
