from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

from llmserve import hub
from llmserve.backend import VllmBackend
from tests.fakes import soon, spec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

    from llmserve.config import ModelSpec


async def test_replicas_do_not_download_the_same_side_by_side(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lock, running = threading.Lock(), Counter[str]()
    side_by_side: list[int] = []

    def download(wanted: ModelSpec, _: Callable[[int, int], None]) -> ModelSpec:
        with lock:
            running[wanted.name] += 1
            side_by_side.append(running[wanted.name])
        time.sleep(0.02)
        with lock:
            running[wanted.name] -= 1
        return wanted

    monkeypatch.setattr(hub, "download", download)
    specs = [spec(name, model=f"org/{name}", replicas=2) for name in ("one", "two")]
    backend = VllmBackend(4, tmp_path)
    starts = [backend._downloaded(each, lambda *_: None) for each in specs for _ in range(2)]
    assert await soon(asyncio.gather(*starts)) == [each for each in specs for _ in range(2)]
    assert side_by_side == [1, 1, 1, 1]
