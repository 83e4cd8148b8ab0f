"""Calls of `AsyncLLM.generate` that vLLM's handlers make, captured instead of run."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from llmserve.engine.fastpath.output_processor import GenerateCall

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from vllm.v1.engine.async_llm import AsyncLLM

_captured: ContextVar[list[GenerateCall] | None] = ContextVar("captured", default=None)


class CapturingEngine:
    """An engine for vLLM's handlers that captures calls of `generate` inside `CapturedCalls`.

    `AsyncLLM.generate` does nothing before its result is read, so a captured call whose result
    is never read has no effect.
    """

    def __init__(self, client: AsyncLLM) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **more: Any
    ) -> AsyncGenerator[Any, None]:
        captured = _captured.get()
        if captured is not None:
            captured.append(GenerateCall(prompt, sampling_params, request_id, more))
        result: AsyncGenerator[Any, None] = self._client.generate(
            prompt, sampling_params, request_id, **more
        )
        return result


class CapturedCalls:
    """`with CapturedCalls() as calls`: the calls of `generate` made inside."""

    def __enter__(self) -> list[GenerateCall]:
        self._calls: list[GenerateCall] = []
        self._token = _captured.set(self._calls)
        return self._calls

    def __exit__(self, *_: object) -> None:
        _captured.reset(self._token)
