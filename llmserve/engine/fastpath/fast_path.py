"""The fast path of streamed chat and completions, in two parts.

- Tokens. vLLM's handler prepares the request. Its call of `generate` is captured instead of run,
  and a `TokenStream` carries the answer.
- Requests. The first request of a kind goes through vLLM's handler and input processor, and what
  they made of it becomes a `RequestTemplate`. A later body that differs only in its prompt needs
  its text rendered and tokenized and its `max_tokens` set. A template is kept only if it
  reproduces vLLM's request for that first body.

All other requests, and all errors, take vLLM's path: error messages are vLLM's.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
from vllm.v1.engine.detokenizer import uses_fast_detokenizer

from llmserve.api.context import RequestContext
from llmserve.api.token_stream import TokenStream
from llmserve.engine.fastpath import guards
from llmserve.engine.fastpath.chunk_templates import ChunkTemplate
from llmserve.engine.fastpath.output_processor import EngineStreamSource, GenerateCall
from llmserve.engine.fastpath.request_templates import (
    RequestTemplate,
    RequestTemplates,
    engine_request,
)
from llmserve.engine.fastpath.tokenizer import encoder

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from starlette.types import Scope
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM

    from llmserve.engine.engine import Engine
    from llmserve.engine.fastpath.endpoint_adapters import EndpointAdapter
    from llmserve.engine.fastpath.output_processor import PreparedRequest
    from llmserve.engine.fastpath.tokenizer import Encode
    from llmserve.errors import LLMServeError

log = logging.getLogger(__name__)

_KEY_LIMIT = 4096  # bytes of a body without its prompt
_SEED_LIMIT = 2**63
# Prefixes of the headers that vLLM's handlers read besides the request's id.
_HEADERS = (b"x-vllm-", b"x-data-parallel-", b"x-session-id", b"traceparent", b"tracestate")

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


@dataclass(frozen=True)
class StreamTerms:
    """How a stream maps exceptions, writes its error event, and removes nulls from an event."""

    translate: Callable[[Exception], LLMServeError]
    failure: Callable[[LLMServeError], bytes]
    prune: Callable[[bytes], bytes]


def encoder_of(client: AsyncLLM) -> Encode | None:
    """Return the encoder of an engine's model; None for a tokenizer without a fast backend."""
    tokenizer = client.renderer.tokenizer
    if not uses_fast_detokenizer(tokenizer):
        return None
    return encoder(tokenizer, str(client.model_config.served_model_name))


class FastPath:
    """The fast path of one endpoint of one model."""

    def __init__(
        self,
        adapter: EndpointAdapter,
        serving: Any,
        engine: Engine,
        encode: Encode | None,
        terms: StreamTerms,
    ) -> None:
        client = engine.client
        self._adapter = adapter
        self._serving = serving
        self._client = client
        self._flow = engine.flow
        self._terms = terms
        self._templates = RequestTemplates()
        self._encode = encode
        self.open = guards.is_open(serving, client)
        if self.open:
            serving.engine_client = CapturingEngine(client)

    def stream(self, body: dict[str, Any], public_name: str, scope: Scope) -> TokenStream | None:
        """Return the answer to a body that has a request template; None: use vLLM's handler."""
        if not (self.open and self._fits(body, scope)):
            return None
        prompt = self._adapter.plain(body.get(self._adapter.prompt))
        if prompt is None:
            return None
        template = self._templates.find(self._key(body, public_name))
        if template is None:
            return None
        try:
            request = template.request(prompt, body, RequestContext.of(scope).id)
        except Exception:
            log.debug("model=%s chat template failed", public_name, exc_info=True)
            return None  # vLLM's handler raises it again, with vLLM's message
        return None if request is None else self._stream_of(request, template.chunks)

    def _fits(self, body: dict[str, Any], scope: Scope) -> bool:
        """Whether only the body describes the request, and its numbers are plain."""
        limits = (body[name] for name in self._adapter.limits if name in body)
        seed = body.get("seed", 0)
        return (
            body.get("stream") is True
            and all(type(limit) is int and limit > 0 for limit in limits)
            and type(seed) is int
            and 0 <= seed < _SEED_LIMIT
            and not any(name.startswith(_HEADERS) for name, _ in scope["headers"])
        )

    def _key(self, body: dict[str, Any], public_name: str) -> bytes:
        """Return all of a body but the prompt and the values of its limits and its seed.

        Keys keep their order, on which a template's output can depend. Empty for a body that is
        nested too deeply for orjson.
        """
        given = (*self._adapter.limits, "seed")
        rest = {name: None if name in given else value for name, value in body.items()}
        del rest[self._adapter.prompt]
        try:
            return public_name.encode() + orjson.dumps(rest)
        except TypeError:
            return b""

    def carry(
        self,
        request: Any,
        body: dict[str, Any],
        public_name: str,
        scope: Scope,
        calls: list[GenerateCall],
    ) -> TokenStream | None:
        """Return the answer to a request that vLLM prepared; None: use vLLM's generator."""
        if not (self.open and len(calls) == 1 and guards.is_plain(request, calls[0].params)):
            return None
        if not self._adapter.can_stream(request):
            return None
        (call,) = calls
        name = self._serving.models.model_name(call.more.get("lora_request"))
        chunks = ChunkTemplate(self._adapter.chunks(request, name), self._terms.prune)
        if self._fits(body, scope) and guards.is_repeatable(request, call.prompt, call.params):
            self._learn(request, body, public_name, call, chunks)
        return self._stream_of(call, chunks)

    def _stream_of(
        self, call: GenerateCall | PreparedRequest, chunks: ChunkTemplate
    ) -> TokenStream:
        source = EngineStreamSource(self._client, call, self._terms.translate)
        frames = chunks.answer(call.request_id.removesuffix(self._adapter.suffix))
        return TokenStream(source, self._flow, frames, self._terms.failure)

    def _learn(
        self,
        request: Any,
        body: dict[str, Any],
        public_name: str,
        call: GenerateCall,
        chunks: ChunkTemplate,
    ) -> None:
        """Keep a request template if it reproduces vLLM's request for this body."""
        prompt = self._adapter.plain(body.get(self._adapter.prompt))
        key = self._key(body, public_name)
        if prompt is None or key in self._templates.kept or not 0 < len(key) <= _KEY_LIMIT:
            return
        expected = engine_request(self._client, call)
        if expected is None or self._encode is None or not guards.is_known(expected):
            return
        try:
            template = self._template(request, chunks, expected, self._encode)
            made = template.request(prompt, body, "")
        except Exception:
            log.info("model=%s no request template for this kind", public_name, exc_info=True)
            self._templates.keep(key, None)
            return
        if made is None:
            return  # too long for a template, which does not depend on its kind
        made.request.request_id = expected.request_id
        made.request.arrival_time = expected.arrival_time
        is_same = made.request == expected
        if not is_same:
            log.warning("model=%s a request template differs from vLLM: not used", public_name)
        self._templates.keep(key, template if is_same else None)

    def _template(
        self, request: Any, chunks: ChunkTemplate, first: EngineCoreRequest, encode: Encode
    ) -> RequestTemplate:
        """Raises an exception for a kind of request that cannot have a template."""
        return RequestTemplate(
            self._adapter,
            self._client,
            self._serving,
            chunks,
            self._adapter.text(request),
            encode,
            first,
            request.add_special_tokens,
            request.max_tokens,
        )
