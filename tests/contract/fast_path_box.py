"""A server on a fake core, with its three ways to an answer, and what a client receives."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from llmserve.http import app
from llmserve.lifecycle.timings import TIMINGS, LifecycleTimings
from llmserve.registry.spec import ModelSpec
from tests.contract.support import CHAT, on_fake_core, services_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from llmserve.api.endpoint_id import EndpointId
    from llmserve.engine.handlers import ModelHandlers
    from llmserve.http.services import Services

STEP_S = 0.001
FOX = "The quick brown fox jumps over the lazy dog."
EMOJI = "👨‍👩‍👧‍👦 met 🇩🇪🇯🇵 and 👍🏽 at 🏳️‍🌈 🙂🙃"
_TEXT = re.compile(rb'"(content|text)":("(?:[^"\\]|\\.)*")')


class Box:
    """A server on a fake core, and the three ways through it."""

    def __init__(self, services: Services, serving: ModelHandlers) -> None:
        self.services, self.serving = services, serving
        self.app = app.build(services)
        transport = httpx.ASGITransport(self.app)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60)

    async def ask(self, path: str, body: dict[str, Any]) -> httpx.Response:
        # The id of an answer is made of the request's.
        headers = {"x-request-id": "same"}
        return await self.client.post(path, json={"model": "chat"} | body, headers=headers)

    async def core(self, method: str) -> Any:
        return await self.serving.engine.client.engine_core.call_utility_async(method)

    async def until_core(self, method: str, *, differs_from: int) -> None:
        """Wait until one of the core's counts is another."""
        async with asyncio.timeout(60):
            while await self.core(method) == differs_from:
                await asyncio.sleep(0.01)

    def forget(self) -> None:
        """No template is known."""
        for fast_path in self.serving._fast_paths.values():
            fast_path._templates.kept.clear()

    @property
    def written(self) -> float:
        """Grows with what leaves by the fast path."""
        return self.figures()["llmserve_stream_lag_seconds_count"]

    def figures(self) -> dict[str, float]:
        """Each sample of the engine's registry, those of one name and reason as one."""
        sums: dict[str, float] = {}
        for family in self.serving.registry.collect():
            for sample in family.samples:
                reason = sample.labels.get("finished_reason", "")
                name = f"{sample.name} {reason}".rstrip()
                if "le" not in sample.labels:
                    sums[name] = sums.get(name, 0.0) + sample.value
        return sums

    @contextlib.contextmanager
    def vllm_path(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for fast_path in self.serving._fast_paths.values():
                patch.setattr(fast_path, "open", False)
            yield

    @contextlib.contextmanager
    def handler_calls(self) -> Iterator[list[str]]:
        """The endpoints of requests that went through vLLM's handlers meanwhile."""
        calls: list[str] = []
        call = self.serving.call

        async def counted(endpoint: EndpointId, *rest: Any) -> Any:
            calls.append(endpoint)
            return await call(endpoint, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.serving, "call", counted)
            yield calls


@asynccontextmanager
async def boxed(
    step_s: float = STEP_S, timings: LifecycleTimings = TIMINGS, **more: Any
) -> AsyncIterator[Box]:
    spec = ModelSpec(
        name="chat", model=str(CHAT), aliases=("alias",), engine={"max_model_len": 2048}, **more
    )
    async with on_fake_core(spec, step_s) as (serving, _):
        box = Box(await services_of([spec], {"chat": serving}, timings), serving)
        async with box.client:
            yield box


@dataclass
class Seen:
    """An answer, but for its time and where its text is cut into pieces.

    Text may wait for more on any way, at last for the event of the end: a short answer
    can do without `middles`.
    """

    status: int
    headers: dict[str, str]
    frames: list[bytes]
    middles: set[bytes] = field(compare=False)
    text: str


def seen(reply: httpx.Response) -> Seen:
    found = Seen(reply.status_code, dict(reply.headers), [], set(), "")
    assert reply.content.endswith(b"\n\n"), reply.text
    for frame in reply.content.removesuffix(b"\n\n").split(b"\n\n"):
        for _, text in _TEXT.findall(frame):
            found.text += json.loads(text)
        masked = re.sub(rb'"created":\d+', b'"created":0', _TEXT.sub(rb'"\1":TEXT', frame))
        # Through a parser the end of a text that has left before has none.
        masked = masked.replace(b'"delta":{}', b'"delta":{"content":TEXT}')
        if b"TEXT" in masked and b'"finish_reason":null' in masked and b'"role"' not in masked:
            assert b'finish_reason":"' not in b"".join(found.frames), "text after the end"
            found.middles.add(masked)
        else:
            found.frames.append(masked)
    assert len(found.middles) <= 1, found.middles
    return found


def assert_same(got: Seen, expected: Seen) -> None:
    assert got == expected
    assert got.middles == expected.middles or not (got.middles and expected.middles)


def user(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 100}


def prompt(text: str) -> dict[str, Any]:
    return {"prompt": text, "max_tokens": 60}
