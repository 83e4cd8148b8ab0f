"""One engine's endpoints, behind `call`.

vLLM's request classes validate a body and vLLM's handlers answer it, so an answer is vLLM's.
llmserve changes its model name, its error object, and nulls that OpenAI's schemas do not allow.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from starlette.responses import Response
from vllm.entrypoints.openai.responses.protocol import ResponsesResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.speech_to_text.base.utils import read_upload_with_limit

from llmserve.api import sse
from llmserve.api.context import RequestContext
from llmserve.api.endpoint_id import EndpointId
from llmserve.api.endpoints import BackgroundAnswer, cannot, failure
from llmserve.api.tool_choice import with_allowed_tools
from llmserve.engine import gc_policy, required_keys, token_count
from llmserve.engine.endpoint_handlers import (
    HANDLERS,
    EndpointHandler,
    drop_own_size,
    parse,
    without_usage_nulls,
)
from llmserve.engine.engine_arguments import request_defaults
from llmserve.engine.error_mapping import ErrorMapper, no_tool_parser
from llmserve.engine.fastpath import zmq_sockets
from llmserve.engine.fastpath.endpoint_adapters import (
    ChatAdapter,
    CompletionAdapter,
    EndpointAdapter,
)
from llmserve.engine.fastpath.fast_path import CapturedCalls, FastPath, StreamTerms, encoder_of
from llmserve.engine.handler_state import create_handlers, requested_name
from llmserve.engine.pacing import PacedRendering
from llmserve.engine.tool_parsers import has_calls
from llmserve.errors import LLMServeError, RequestError, Unsupported, quoted
from llmserve.lifecycle.response_store import ResponseStore, owned_by

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from prometheus_client import CollectorRegistry
    from starlette.datastructures import State
    from starlette.requests import Request
    from starlette.types import ASGIApp, Scope

    from llmserve.api.body_thread import BodyThread
    from llmserve.engine.engine import Engine
    from llmserve.engine.fastpath.tokenizer import Encode
    from llmserve.registry.spec import ModelSpec

# Endpoints whose bodies may hold a constraint.
_GENERATING = frozenset(
    {EndpointId.CHAT_COMPLETIONS, EndpointId.COMPLETIONS, EndpointId.RESPONSES, EndpointId.MESSAGES}
)
_ADAPTERS: dict[EndpointId, type[EndpointAdapter]] = {
    EndpointId.CHAT_COMPLETIONS: ChatAdapter,
    EndpointId.COMPLETIONS: CompletionAdapter,
}


class ModelHandlers:
    """The endpoints that one engine serves, and the engine's own operations."""

    def __init__(
        self, name: str, engine: Engine, state: State, encode: Encode | None, stored: ResponseStore
    ) -> None:
        self.name = name
        self.engine = engine
        self.log = engine.log
        self.sleeps = engine.sleeps
        self.responds = engine.responds
        self.prepare_sleep = engine.prepare_sleep
        self.sleep = engine.sleep
        self.wake = engine.wake
        self.kill = engine.kill
        self.preparing = engine.flow.preparing
        self.errors = ErrorMapper(name, engine)
        self._encode = encode
        self._stored = stored
        self.took: Mapping[str, float] = {}  # seconds of its start, by step
        self._state = state
        self.endpoints = frozenset(
            endpoint
            for endpoint, handler in HANDLERS.items()
            if getattr(state, handler.owner, None) is not None
        )
        self._fast_paths = {
            each: self._new_fast_path(each, encode) for each in _ADAPTERS if each in self.endpoints
        }

    @classmethod
    async def build(cls, spec: ModelSpec, engine: Engine) -> ModelHandlers:
        """Create the handlers of a started engine. Raises EngineError.

        This makes the first call into the engine, which finds an engine that died at once.
        """
        token_count.count_whole_prompts()
        await zmq_sockets.take_over(engine.client, engine.flow)
        add = engine.client.add_request
        engine.client.add_request = PacedRendering(add)  # type: ignore[method-assign]  # this one's
        # In a thread: it reads the tokenizer again and compares, while other models serve.
        encode = await asyncio.to_thread(encoder_of, engine.client)
        return await cls._create(spec, engine, ResponseStore(), encode)

    @classmethod
    async def _create(
        cls, spec: ModelSpec, engine: Engine, stored: ResponseStore, encode: Encode | None
    ) -> ModelHandlers:
        handlers = cls(spec.name, engine, await create_handlers(spec, engine), encode, stored)
        handlers.share(stored)
        return handlers

    def share(self, stored: ResponseStore) -> None:
        """Store answers of /v1/responses in `stored`, which a model's replicas share."""
        self._stored = stored
        responses = getattr(self._state, "openai_serving_responses", None)
        if responses is not None:
            stored.keep_for(responses, _stored_answer, required_keys.complete_end)

    async def changed(self, spec: ModelSpec) -> ModelHandlers:
        """Return new handlers on the same engine; requests in flight keep the old ones."""
        before = self.engine.defaults
        self.engine.defaults = request_defaults(spec)
        try:
            new = await self._create(spec, self.engine, self._stored, self._encode)
        except Exception:
            self.engine.defaults = before
            raise
        new.took = self.took
        return new

    def _new_fast_path(self, endpoint: EndpointId, encode: Encode | None) -> FastPath:
        handler = HANDLERS[endpoint]
        serving = getattr(self._state, handler.owner)
        terms = StreamTerms(self.errors.from_exception, partial(failure, endpoint), handler.pruned)
        return FastPath(_ADAPTERS[endpoint](serving), serving, self.engine, encode, terms)

    @property
    def max_model_len(self) -> int:
        return int(self.engine.client.model_config.max_model_len)

    @property
    def dead(self) -> bool:
        return self.engine.dead

    @property
    def registry(self) -> CollectorRegistry:
        return self.engine.registry

    @property
    def pid(self) -> int | None:
        return self.engine.pid

    def prepare_constraints(self) -> None:
        """Load what the first constraint needs, while the model serves."""
        if self.endpoints & _GENERATING:
            self.engine.client.prepare_constraints()

    async def stop(self) -> None:
        if (handler := self.engine.client.output_handler) is not None:
            handler.cancel()  # else it logs the end of its engine as a failure
        await self.engine.end()
        gc_policy.collect_soon()

    def try_fast_path(
        self, endpoint: EndpointId, body: dict[str, Any], asked: str, scope: Scope
    ) -> ASGIApp | None:
        """Return the answer of a known kind of request; None if it needs `call`."""
        fast_path = self._fast_paths.get(endpoint)
        return None if fast_path is None else fast_path.stream(body, asked, scope)

    async def call(
        self, endpoint: EndpointId, body: dict[str, Any], asked: str, request: Request
    ) -> ASGIApp:
        """Return the answer to a request for this model, which it names `asked`.

        Raises LLMServeError before the first byte; later failures are an error event.
        """
        if endpoint not in self.endpoints:
            raise Unsupported(cannot(self.name, endpoint, self.endpoints), param="model")
        requested_name.set(asked)
        if "request_id" in body:  # the server chooses it: it is an answer's id, and a key
            body = {name: value for name, value in body.items() if name != "request_id"}
        if endpoint in _GENERATING:
            await self.engine.client.check_explicit(body)
        thread = RequestContext.of(request.scope).body_thread  # for large bodies
        parsed = await thread.run(_parsed, endpoint, body) if thread else _parsed(endpoint, body)
        self._check_parser(endpoint, parsed)
        drop_own_size(parsed, self.engine.client.model_config)
        owner = RequestContext.of(request.scope).owner
        self._check_previous(parsed, owner)
        with CapturedCalls() as calls, owned_by(owner):
            result = await self.errors.mapped(self._handled(endpoint, parsed, request))
        for call in calls:  # before the headers: a parser may have derived a constraint
            await self.errors.mapped(self.engine.client.check(call.params))
        if endpoint is EndpointId.RESPONSES:
            if parsed.background and isinstance(result, AsyncGenerator):
                await result.aclose()
                result = self._stored.replay(parsed.request_id)
            result = _completed(result, parsed)
        fast_path = self._fast_paths.get(endpoint)
        if fast_path is not None and isinstance(result, AsyncGenerator):
            stream = fast_path.carry(parsed, body, asked, request.scope, calls)
            if stream is not None:
                return stream
        count = partial(_count_tokens, request)
        count(result)
        response = await self._respond(result, endpoint, count, thread)
        task = self._stored.task(getattr(parsed, "request_id", ""))
        return response if task is None else BackgroundAnswer(response, task)

    def _check_previous(self, parsed: Any, owner: str) -> None:
        """Raises RequestError for a response of another model or another API key."""
        previous = getattr(parsed, "previous_response_id", None)
        if previous is not None and not self._stored.has(previous, owner):
            error = RequestError(
                f"There is no stored response {quoted(previous)}.",
                param="previous_response_id",
                code="not_found",
            )
            error.status = 404
            raise error

    def _check_parser(self, endpoint: EndpointId, parsed: Any) -> None:
        """Raises RequestError for tools of a response whose calls vLLM would not find."""
        if endpoint is not EndpointId.RESPONSES or parsed.tool_choice == "none":
            return
        serving = self._state.openai_serving_responses
        parser = getattr(serving.parser, "tool_parser_cls", None)
        is_forced = parsed.tool_choice != "auto"
        if parser is None and not serving.use_harmony and (is_forced or has_calls(parsed.tools)):
            raise no_tool_parser(self.name)

    async def _handled(self, endpoint: EndpointId, parsed: Any, request: Request) -> Any:
        handler = HANDLERS[endpoint]
        method = getattr(getattr(self._state, handler.owner), handler.method)
        upload = [await read_upload_with_limit(parsed.file)] if hasattr(parsed, "file") else []
        return await method(*upload, parsed, request)

    async def _respond(
        self,
        result: Any,
        endpoint: EndpointId,
        count: Callable[[Any], None],
        thread: BodyThread | None = None,
    ) -> Response:
        """Return the response; `thread` writes the one to a large body."""
        handler = HANDLERS[endpoint]
        if isinstance(result, ErrorResponse):
            raise self.errors.from_info(result.error)
        if isinstance(result, Response):  # of vLLM's pooling handlers
            return without_usage_nulls(result) if handler.nulls is not None else result
        if isinstance(result, AsyncGenerator):
            # A failure before the first event is an error answer instead of a stream.
            frames = sse.PeekableStream(
                self._frames(result, handler, count), partial(failure, endpoint)
            )
            await frames.begin(self.engine.flow.schedule.headers_s)
            return sse.EventStream(frames)
        if isinstance(result, BaseModel):
            content = (
                await thread.run(handler.content, result) if thread else handler.content(result)
            )
            return Response(content, media_type="application/json")
        return Response(str(result), media_type="text/plain")  # a transcript as text, srt or vtt

    async def _frames(
        self,
        source: AsyncGenerator[Any, None],
        handler: EndpointHandler,
        count: Callable[[Any], None],
    ) -> AsyncGenerator[bytes, None]:
        """Yield vLLM's events as bytes; pass the last one to `count`.

        Raises LLMServeError in place of an error event.
        """
        async with contextlib.aclosing(source):
            item: Any = None
            try:
                async for item in source:
                    frame = (
                        handler.event(item)
                        if isinstance(item, BaseModel)
                        else handler.pruned(item.encode())
                    )
                    self.errors.check_event(frame)
                    yield frame
                count(item)
            except LLMServeError:
                raise
            except Exception as error:
                raise self.errors.from_exception(error) from error


def _parsed(endpoint: EndpointId, body: dict[str, Any]) -> Any:
    """Return a body as vLLM's request class, with the tools that it allows. Raises RequestError."""
    narrowed = with_allowed_tools(endpoint, body)
    parsed = parse(endpoint, narrowed)
    if narrowed is not body and endpoint is EndpointId.RESPONSES:  # the answer has the client's
        asked = parse(endpoint, body)
        parsed.echoed = {"tools": asked.tools, "tool_choice": asked.tool_choice}
    return parsed


def _count_tokens(request: Request, last: Any) -> None:
    """Record the usage of a whole answer, or of a stream from its `last` event.

    vLLM's handler stores it in the request's state, or in a response of /v1/responses.
    """
    context = RequestContext.of(request.scope)
    response = getattr(last, "response", last)
    if isinstance(response, ResponsesResponse) and response.usage is not None:
        context.count_tokens(response.usage.input_tokens, response.usage.output_tokens)
        return
    metadata = getattr(request.state, "request_metadata", None)
    usage = metadata.final_usage_info if metadata is not None else None
    if usage is not None:
        context.count_tokens(usage.prompt_tokens, usage.completion_tokens or 0)


def _completed(result: Any, request: Any) -> Any:
    """Return an answer of /v1/responses with what vLLM leaves out."""
    if isinstance(result, AsyncGenerator):
        return required_keys.complete_events(result, request)
    if isinstance(result, ResponsesResponse):
        required_keys.echo_request(result, request)
        required_keys.complete_end(result)
    return result


def _stored_answer(result: Any) -> Response:
    """Return a stored response, or its events, without an engine."""
    handler = HANDLERS[EndpointId.RESPONSES]
    if isinstance(result, BaseModel):
        return Response(handler.content(result), media_type="application/json")
    return sse.EventStream(
        sse.PeekableStream(_replayed(result, handler), partial(failure, EndpointId.RESPONSES))
    )


async def _replayed(
    events: AsyncGenerator[Any, None], handler: EndpointHandler
) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(required_keys.complete_events(events)) as completed:
        async for event in completed:
            yield handler.event(event)
