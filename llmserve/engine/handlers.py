"""vLLM's serving objects of one model, behind `call`.

Requests are validated by vLLM's request classes and answered by vLLM's handlers, so
that an answer is what vLLM would give. Ours are the name it carries, the error object,
and the nulls that OpenAI's schemas do not allow.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import threading
from argparse import Namespace
from collections.abc import AsyncGenerator, Awaitable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import orjson
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.datastructures import State
from starlette.responses import Response
from vllm.entrypoints.anthropic.protocol import (
    AnthropicCountTokensRequest,
    AnthropicMessagesRequest,
    AnthropicStreamEvent,
)
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionStreamResponse
from vllm.entrypoints.openai.models.protocol import LoRAModulePath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.pooling.classify.protocol import ClassificationRequest
from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest
from vllm.entrypoints.pooling.pooling.protocol import PoolingRequest
from vllm.entrypoints.pooling.scoring.protocol import RerankRequest, ScoreRequest
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeRequest
from vllm.entrypoints.speech_to_text.base.utils import read_upload_with_limit
from vllm.entrypoints.speech_to_text.transcription.protocol import (
    TranscriptionRequest,
    TranscriptionStreamResponse,
)
from vllm.entrypoints.speech_to_text.translation.protocol import (
    TranslationRequest,
    TranslationStreamResponse,
)
from vllm.exceptions import VLLMError, VLLMValidationError
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

import llmserve.engine.media  # noqa: F401  # registers what fetches the URLs of images
from llmserve.api import sse
from llmserve.api.body_limits import check_choices
from llmserve.api.context import RequestContext
from llmserve.api.endpoint_id import EndpointId
from llmserve.api.endpoints import TITLES, BackgroundAnswer, cannot, failure
from llmserve.api.validation_errors import mistake
from llmserve.engine import gc_policy, response_history, token_count
from llmserve.engine import required_keys as required
from llmserve.engine.cli_args import FrontendArgs
from llmserve.engine.engine import request_defaults
from llmserve.engine.fastpath import zmq_sockets
from llmserve.engine.fastpath.fast_path import (
    CapturedCalls,
    Chat,
    Completions,
    FastPath,
    StreamTerms,
    encoder_of,
)
from llmserve.engine.pacing import PacedRendering
from llmserve.engine.request_validation import bounded, shape_of
from llmserve.engine.schema_nulls import schema_of, without_nulls
from llmserve.engine.structured_output.checked_client import Refused
from llmserve.engine.tool_parsers import mend_parsers
from llmserve.errors import (
    ContextTooLong,
    EngineDead,
    EngineError,
    LLMServeError,
    Overloaded,
    RequestError,
    Unsupported,
    quoted,
)
from llmserve.lifecycle.response_store import ResponseStore, owned_by

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from prometheus_client import CollectorRegistry
    from pydantic_core import SchemaValidator
    from starlette.requests import Request
    from starlette.types import ASGIApp, Scope
    from vllm.lora.request import LoRARequest

    from llmserve.engine.engine import Engine
    from llmserve.engine.fastpath.tokenizer import Encode
    from llmserve.lifecycle.placement import Level
    from llmserve.registry.spec import ModelSpec

log = logging.getLogger(__name__)

# str() of VLLMValidationError: "... (parameter=temperature, value=-1)"
_APPENDED = re.compile(r" \((?:parameter|value)=.*$", re.DOTALL)
_WRONG = re.compile(r"\b([a-z_]+) must be ")
_PARAMETERS = frozenset({*SamplingParams.__struct_fields__, *PoolingParams.__struct_fields__})
# What vLLM says of a prompt that does not fit; it has no class for that.
TOO_LONG = (
    "maximum context length",
    "maximum model length",
    "exceeds the max_model_len",
)

# OpenAI's words of it, by which LiteLLM and others tell it from other refusals.
_CONTEXT = "This model's maximum context length is"

# The name that the running request used for its model.
_asked: ContextVar[str] = ContextVar("asked")


class PublicNames(OpenAIServingModels):
    """Answers carry the name that was asked for, not the model's first one."""

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        return _asked.get(super().model_name(lora_request))


def _whole(answer: dict[str, Any]) -> dict[str, Any]:
    return answer


@dataclass(frozen=True)
class Handler:
    """How one endpoint is served: the State's object, its method, the request's type.

    `nulls` are the keys that may be null in OpenAI's schema; None leaves the answer as
    it is, where there is no such schema. `events` are the classes of events that vLLM writes
    as text; the others come as what they are. `required` adds the keys that vLLM leaves out;
    a frame that needs it has one of `marks`.
    """

    owner: str
    method: str
    request: TypeAdapter[Any]
    nulls: frozenset[str] | None = None
    events: tuple[type[BaseModel], ...] = ()
    required: Callable[[dict[str, Any]], dict[str, Any]] = _whole
    marks: tuple[bytes, ...] = ()

    @cached_property
    def shape(self) -> SchemaValidator:
        return shape_of(self.request)

    def pruned(self, frame: bytes) -> bytes:
        """An event that came as text, without nulls."""
        if self.nulls is None:
            return frame
        if b":null" not in frame and not any(mark in frame for mark in self.marks):
            return frame
        payload = sse.payload(frame)
        if payload is None:
            return frame
        pruned = without_nulls(payload, schema_of(*self.events), self.nulls)
        return sse.with_payload(frame, self.required(pruned))

    def content(self, answer: BaseModel) -> bytes:
        """An answer, or an event that came as an object, as JSON without nulls."""
        content = answer.model_dump(mode="json", by_alias=True)
        if self.nulls is not None:
            content = without_nulls(content, schema_of(type(answer)), self.nulls)
        return _json(self.required(content))


_CHAT_NULLS = frozenset({"content", "refusal", "logprobs", "finish_reason", "usage"})
_COMPLETION_NULLS = frozenset({"logprobs", "finish_reason"})
_RESPONSE_NULLS = frozenset(
    {"error", "incomplete_details", "instructions", "metadata", "temperature", "top_p"}
    | {"previous_response_id", "reasoning", "background", "max_output_tokens"}
    | {"max_tool_calls", "truncation", "prompt", "service_tier", "conversation"}
    | {"effort", "summary", "encrypted_content"}
)
_NONE: frozenset[str] = frozenset()

HANDLERS: dict[EndpointId, Handler] = {
    EndpointId.CHAT_COMPLETIONS: Handler(
        "openai_serving_chat",
        "create_chat_completion",
        bounded(ChatCompletionRequest),
        _CHAT_NULLS,
        (ChatCompletionStreamResponse,),
        required.of_chat,
        (b'"logprobs":{',),
    ),
    EndpointId.COMPLETIONS: Handler(
        "openai_serving_completion",
        "create_completion",
        bounded(CompletionRequest),
        _COMPLETION_NULLS,
        (CompletionStreamResponse,),
    ),
    EndpointId.RESPONSES: Handler(
        "openai_serving_responses",
        "create_responses",
        bounded(ResponsesRequest),
        _RESPONSE_NULLS,
        required=required.of_response,
    ),
    EndpointId.MESSAGES: Handler(
        "anthropic_serving_messages",
        "create_messages",
        bounded(AnthropicMessagesRequest),
        frozenset({"stop_reason", "stop_sequence"}),
        (AnthropicStreamEvent,),
        required.of_message,
        (b'"usage":{', b'"content_block":{'),
    ),
    EndpointId.TOKEN_COUNTS: Handler(
        "anthropic_serving_messages",
        "count_tokens",
        bounded(AnthropicCountTokensRequest),
        _NONE,
    ),
    EndpointId.EMBEDDINGS: Handler(
        "serving_embedding", "__call__", bounded(EmbeddingRequest), _NONE
    ),
    EndpointId.SCORES: Handler("serving_scores", "__call__", bounded(ScoreRequest)),
    EndpointId.RERANKING: Handler("serving_scores", "__call__", bounded(RerankRequest)),
    EndpointId.POOLING: Handler("serving_pooling", "__call__", bounded(PoolingRequest)),
    EndpointId.CLASSIFICATION: Handler(
        "serving_classification", "__call__", bounded(ClassificationRequest)
    ),
    EndpointId.TOKENIZATION: Handler(
        "serving_tokenization", "create_tokenize", bounded(TokenizeRequest)
    ),
    EndpointId.DETOKENIZATION: Handler(
        "serving_tokenization", "create_detokenize", bounded(DetokenizeRequest)
    ),
    EndpointId.TRANSCRIPTIONS: Handler(
        "openai_serving_transcription",
        "create_transcription",
        bounded(TranscriptionRequest),
        _NONE,
        (TranscriptionStreamResponse,),
    ),
    EndpointId.TRANSLATIONS: Handler(
        "openai_serving_translation",
        "create_translation",
        bounded(TranslationRequest),
        _NONE,
        (TranslationStreamResponse,),
    ),
}


# Endpoints whose bodies may hold a constraint.
_GENERATING = frozenset(
    {
        EndpointId.CHAT_COMPLETIONS,
        EndpointId.COMPLETIONS,
        EndpointId.RESPONSES,
        EndpointId.MESSAGES,
    }
)
LANES: dict[EndpointId, type[Chat | Completions]] = {
    EndpointId.CHAT_COMPLETIONS: Chat,
    EndpointId.COMPLETIONS: Completions,
}


class ModelHandlers:
    """What one engine answers."""

    def __init__(
        self, name: str, engine: Engine, state: State, encode: Encode | None, stored: ResponseStore
    ) -> None:
        self.name = name
        self.engine = engine
        self._encode = encode
        self._stored = stored
        self.took: Mapping[str, float] = {}  # seconds of its start, by step
        self._state = state
        self.able = frozenset(
            endpoint
            for endpoint, handler in HANDLERS.items()
            if getattr(state, handler.owner, None) is not None
        )
        self._express = {each: self._opened(each, encode) for each in LANES if each in self.able}

    @classmethod
    async def build(cls, spec: ModelSpec, engine: Engine) -> ModelHandlers:
        """Also the first call into the engine: one that died at once is noticed here."""
        token_count.count_whole_prompts()
        await zmq_sockets.take_over(engine.client, engine.flow)
        add = engine.client.add_request
        engine.client.add_request = PacedRendering(add)  # type: ignore[method-assign]  # this one's
        # Reads the tokenizer again and compares: the other models go on meanwhile.
        encode = await asyncio.to_thread(encoder_of, engine.client)
        return await cls._of(spec, engine, ResponseStore(), encode)

    @classmethod
    async def _of(
        cls, spec: ModelSpec, engine: Engine, stored: ResponseStore, encode: Encode | None
    ) -> ModelHandlers:
        state = State()
        async with engine.within("answer its tasks"):
            tasks = await engine.client.get_supported_tasks()
            await _init_state(engine, state, spec, tasks)
        # init_app_state makes this object itself; no argument of it sets the class.
        state.openai_serving_models.__class__ = PublicNames
        mend_parsers(state)
        responses = getattr(state, "openai_serving_responses", None)  # absent in models that embed
        if responses is not None:
            response_history.keep_calls(responses)
        if spec.sampling.max_tokens is not None:
            _default_not_limit(state)
        for processor in _processors(state):
            processor.render_async = PacedRendering(processor.render_async)
        serving = cls(spec.name, engine, state, encode, stored)
        serving.share(stored)
        return serving

    def share(self, stored: ResponseStore) -> None:
        """Store answers of /v1/responses there: a model's replicas share them."""
        self._stored = stored
        responses = getattr(self._state, "openai_serving_responses", None)
        if responses is not None:
            stored.keep_for(responses, _stored_answer, required.ended)

    async def changed(self, spec: ModelSpec) -> ModelHandlers:
        """The same engine under new serving objects; requests under way keep theirs."""
        before = self.engine.defaults
        self.engine.defaults = request_defaults(spec)
        try:
            new = await self._of(spec, self.engine, self._stored, self._encode)
        except Exception:
            self.engine.defaults = before
            raise
        new.took = self.took
        return new

    def _opened(self, endpoint: EndpointId, encode: Encode | None) -> FastPath:
        handler = HANDLERS[endpoint]
        served = getattr(self._state, handler.owner)
        terms = StreamTerms(
            self._translated,
            partial(failure, endpoint),
            handler.pruned,
        )
        return FastPath(LANES[endpoint](served), served, self.engine, encode, terms)

    @property
    def max_model_len(self) -> int:
        return int(self.engine.client.model_config.max_model_len)

    @property
    def dead(self) -> bool:
        return self.engine.dead

    @property
    def log(self) -> Path:
        return self.engine.log

    @property
    def registry(self) -> CollectorRegistry:
        return self.engine.registry

    @property
    def pid(self) -> int | None:
        return self.engine.pid

    @property
    def sleeps(self) -> bool:
        return self.engine.sleeps

    async def responds(self, within_s: float) -> bool:
        return await self.engine.responds(within_s)

    def prepare_constraints(self) -> None:
        """What the first constraint would take long for, done ahead while the model serves."""
        if self.able & _GENERATING:
            self.engine.client.prepare_constraints()

    async def prepare_sleep(self) -> None:
        await self.engine.prepare_sleep()

    async def sleep(self, level: Level) -> None:
        await self.engine.sleep(level)

    async def wake(self) -> None:
        await self.engine.wake()

    def kill(self) -> None:
        self.engine.kill()

    async def stop(self) -> None:
        if (handler := self.engine.client.output_handler) is not None:
            handler.cancel()  # else it reports the end of its engine as a failure
        await self.engine.end()
        gc_policy.look_soon()

    def coming(self) -> contextlib.AbstractContextManager[None]:
        return self.engine.flow.coming()

    def express(
        self, endpoint: EndpointId, body: dict[str, Any], asked: str, scope: Scope
    ) -> ASGIApp | None:
        """The answer to a request like an earlier one; None if it needs `call`."""
        express = self._express.get(endpoint)
        return None if express is None else express.stream(body, asked, scope)

    async def call(
        self, endpoint: EndpointId, body: dict[str, Any], asked: str, request: Request
    ) -> ASGIApp:
        """Answer a request whose model has been found.

        Raises LLMServeError before the first byte; later failures are an error event.
        The response of a stream is where tokens leave the process.
        """
        if endpoint not in self.able:
            raise Unsupported(cannot(self.name, endpoint, self.able), param="model")
        handler = HANDLERS[endpoint]
        _asked.set(asked)
        if "request_id" in body:  # the server's to choose: it is an answer's id, and a key
            body = {name: value for name, value in body.items() if name != "request_id"}
        if endpoint in _GENERATING:
            await self.engine.client.check_explicit(body)
        parsed = await _validated(handler, body, endpoint, request.scope)
        without_own_size(parsed, self.engine.client.model_config)
        owner = RequestContext.of(request.scope).owner
        self._check_previous(parsed, owner)
        with CapturedCalls() as calls, owned_by(owner):
            result = await self._translating(self._handled(handler, parsed, request))
        for noted in calls:  # before the headers: a parser may have derived a constraint
            await self._translating(self.engine.client.check(noted.params))
        if endpoint is EndpointId.RESPONSES:
            if parsed.background and isinstance(result, AsyncGenerator):
                await result.aclose()
                result = self._stored.replay(parsed.request_id)
            result = _whole_response(result, parsed)
        express = self._express.get(endpoint)
        if express is not None and isinstance(result, AsyncGenerator):
            stream = express.carry(parsed, body, asked, request.scope, calls)
            if stream is not None:
                return stream
        count = partial(_count_tokens, request)
        count(result)
        response = await self._respond(result, endpoint, count)
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

    async def _handled(self, handler: Handler, parsed: Any, request: Request) -> Any:
        method = getattr(getattr(self._state, handler.owner), handler.method)
        upload = [await read_upload_with_limit(parsed.file)] if hasattr(parsed, "file") else []
        return await method(*upload, parsed, request)

    async def _respond(
        self, result: Any, endpoint: EndpointId, count: Callable[[Any], None]
    ) -> Response:
        handler = HANDLERS[endpoint]
        if isinstance(result, ErrorResponse):
            raise self._refusal(result.error)
        if isinstance(result, Response):  # vLLM's pooling handlers answer whole
            return _pruned(result) if handler.nulls is not None else result
        if isinstance(result, AsyncGenerator):
            return await self._stream(result, endpoint, count)
        if isinstance(result, BaseModel):
            return Response(handler.content(result), media_type="application/json")
        return Response(str(result), media_type="text/plain")  # a transcript as text, srt or vtt

    # --- streams

    async def _stream(
        self, source: AsyncGenerator[Any, None], endpoint: EndpointId, count: Callable[[Any], None]
    ) -> Response:
        """An event stream; what fails at once is an error answer instead."""
        written = self._frames(source, HANDLERS[endpoint], count)
        frames = sse.PeekableStream(written, partial(failure, endpoint))
        await frames.begin(self.engine.flow.schedule.headers_s)
        return sse.EventStream(frames)

    async def _frames(
        self, source: AsyncGenerator[Any, None], handler: Handler, count: Callable[[Any], None]
    ) -> AsyncGenerator[bytes, None]:
        """vLLM's events as bytes; the last goes to `count`.

        Raises LLMServeError in place of an error event.
        """
        async with contextlib.aclosing(source):
            item: Any = None
            try:
                async for item in source:
                    frame = (
                        _event_of(item, handler)
                        if isinstance(item, BaseModel)
                        else handler.pruned(item.encode())
                    )
                    self._raise_error_in(frame)
                    yield frame
                count(item)
            except LLMServeError:
                raise
            except Exception as error:
                raise self._translated(error) from error

    def _raise_error_in(self, frame: bytes) -> None:
        if b'"error":{' not in frame and b'"error": {' not in frame:
            return
        payload = sse.payload(frame)
        info = payload.get("error") if isinstance(payload, dict) else None
        if not isinstance(info, dict) or "message" not in info or "choices" in payload:
            return
        code = info.get("code")
        raise self._refusal(
            ErrorInfo(
                message=info["message"],
                type=info.get("type") or "",
                param=info.get("param"),
                code=code if isinstance(code, int) else 500,
            )
        )

    # --- errors

    async def _translating(self, work: Awaitable[Any]) -> Any:
        try:
            return await work
        except LLMServeError:
            raise
        except Exception as error:
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> LLMServeError:
        """Any exception of vLLM's in our terms; what it did not foresee keeps its words."""
        if isinstance(error, EngineDeadError) or self.dead:
            return self._dead()
        if isinstance(error, Refused):
            return error.refusal
        if isinstance(error, ValidationError):  # of a class that vLLM makes of a part of a body
            found = mistake(error.errors(include_url=False), None)
            found.param = None  # where that part is in the body is not known here
            return found
        refusal = self._refusal(create_error_response(error).error)
        foreseen = isinstance(error, VLLMError | ValueError)
        if isinstance(refusal, EngineError) or not foreseen:
            log.error("model=%s request failed", self.name, exc_info=error)
        if isinstance(error, TypeError | OverflowError):  # Python's words
            refusal.message = (
                f"A value in the body has a type that {quoted(self.name)} cannot take."
            )
        if foreseen or refusal.status != 500:
            return refusal
        return EngineError(f"{quoted(self.name)} failed on this request.")

    def _dead(self) -> EngineDead:
        return EngineDead(f"The engine of {quoted(self.name)} has died; its requests are lost.")

    def _refusal(self, info: ErrorInfo) -> LLMServeError:
        """vLLM's error object in our terms."""
        message = _short(info.message) or f"{quoted(self.name)} failed on this request."
        if info.code >= 500:
            return self._failure_of(info.code, message)
        if any(phrase in message for phrase in TOO_LONG):
            return ContextTooLong(self._too_long(message), param=info.param or "input_tokens")
        error = RequestError(
            message,
            param=info.param or _parameter_in(message),
            code="not_found" if info.code == 404 else None,
        )
        error.status = info.code
        return error

    def _too_long(self, message: str) -> str:
        """With the words by which clients know such a refusal, and no more than is known."""
        if not message.startswith(_CONTEXT):
            message = f"{_CONTEXT} {self.max_model_len} tokens. {message}"
        return token_count.exact(message)

    def _failure_of(self, status: int, message: str) -> LLMServeError:
        if self.dead:
            return self._dead()
        if status == 503:
            return Overloaded(message, retry_after_s=1)
        if status == 501:
            return Unsupported(message, param="model")
        return EngineError(message)


# vLLM makes counters of the whole process where there are none yet.
_initializing = threading.Lock()


async def _init_state(engine: Engine, state: State, spec: ModelSpec, tasks: Any) -> None:
    """vLLM's `init_app_state`, in a thread: parsers and templates take tenths of a second.

    Adapters alone ask the engine, which belongs to the calling loop.
    """
    arguments = _frontend_arguments(spec, engine)
    adapters = _adapters(spec)
    lora_config = engine.client.vllm_config.lora_config
    if lora_config is not None and lora_config.default_mm_loras:  # adapters of vLLM's own
        arguments.lora_modules = adapters
        await init_app_state(engine.client, state, arguments, tasks)
        return

    def init() -> None:
        with _initializing:
            asyncio.run(init_app_state(engine.client, state, arguments, tasks))

    await asyncio.to_thread(init)
    state.openai_serving_models.static_lora_modules = adapters
    await state.openai_serving_models.init_static_loras()


def _adapters(spec: ModelSpec) -> list[LoRAModulePath]:
    """In an order of their own: an adapter's id is its place, and the engine keeps it."""
    return [LoRAModulePath(*each) for each in sorted(spec.loras.items())]


def _frontend_arguments(spec: ModelSpec, engine: Engine) -> Namespace:
    """What vLLM's server takes from its command line: engine and front-end arguments."""
    frontend = FrontendArgs(
        chat_template=spec.chat_template,
        default_chat_template_kwargs=spec.chat_template_kwargs or None,
        tool_call_parser=spec.tool_call_parser,
        enable_auto_tool_choice=spec.tool_call_parser is not None,
    )
    names = {"served_model_name": list(spec.names)}
    return Namespace(**vars(frontend) | vars(engine.arguments) | names)


def _processors(state: State) -> list[Any]:
    """What prepares the inputs of pooling requests, each in a call of its own."""
    owners = {handler.owner for handler in HANDLERS.values()}
    found: list[Any] = []
    for serving in filter(None, (getattr(state, owner, None) for owner in sorted(owners))):
        found += getattr(serving, "io_processors", {}).values()
        found += filter(None, [getattr(serving, "io_processor", None)])
    return found


def _default_not_limit(state: State) -> None:
    """vLLM takes a max_new_tokens of override_generation_config for a limit as well."""
    for owner in (
        "openai_serving_chat",
        "openai_serving_completion",
        "openai_serving_responses",
        "anthropic_serving_messages",
    ):
        serving = getattr(state, owner, None)
        if serving is not None:
            serving.override_max_tokens = None


async def _validated(
    handler: Handler, body: dict[str, Any], endpoint: EndpointId, scope: Scope
) -> Any:
    """A large body is validated beside the loop."""
    thread = RequestContext.of(scope).body_thread
    if thread is None:
        return _validate(handler, body, endpoint)
    return await thread.run(_validate, handler, body, endpoint)


def _validate(handler: Handler, body: dict[str, Any], endpoint: EndpointId) -> Any:
    """A body as vLLM's request class. Raises RequestError, short, with the deepest mistake."""
    try:
        parsed = handler.request.validate_python(body)
    except ValidationError as error:
        raise mistake(error.errors(include_url=False), body) from None
    except VLLMValidationError as error:
        raise RequestError(_short(error.args[0]), param=error.parameter) from None
    except (TypeError, ValueError, AttributeError, KeyError):
        # vLLM's validators read the body before its types are checked.
        raise _misread(handler, body, endpoint) from None
    check_choices("n", getattr(parsed, "n", None) or 1, _prompts_of(parsed))
    return parsed


def _prompts_of(parsed: Any) -> int:
    prompt = getattr(parsed, "prompt", None)
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return len(prompt)
    return 1


def _misread(handler: Handler, body: dict[str, Any], endpoint: EndpointId) -> RequestError:
    """What is wrong with the types of a body that one of vLLM's validators failed on."""
    try:
        handler.shape.validate_python(body)
    except ValidationError as error:
        return mistake(error.errors(include_url=False), body)
    return RequestError(f"The body is not that of a request for {TITLES[endpoint]}.")


def _parameter_in(message: str) -> str | None:
    """The parameter that is wrong, from vLLM's words; some of its errors have no field for it."""
    return next((name for name in _WRONG.findall(message) if name in _PARAMETERS), None)


def _short(message: str, limit: int = 500) -> str:
    """One bounded line, without what vLLM appends: parts of the request."""
    line = " ".join(_APPENDED.sub("", str(message)).split())
    return line if len(line) <= limit else line[:limit] + "..."


def without_own_size(request: Any, model_config: Any) -> None:
    """A model's own dimensions ask for nothing; vLLM refuses any number for most models."""
    dimensions = getattr(request, "dimensions", None)
    if dimensions is not None and dimensions == model_config.embedding_size:
        request.dimensions = None


def _count_tokens(request: Request, last: Any) -> None:
    """Enter the usage that vLLM's handler leaves with a whole answer or the `last` event of one.

    In the request's state, or in a response of /v1/responses; other answers are not counted.
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


def _whole_response(result: Any, request: Any) -> Any:
    if isinstance(result, AsyncGenerator):
        return required.with_ends(result, request)
    if isinstance(result, ResponsesResponse):
        required.echo(result, request)
        required.ended(result)
    return result


def _event_of(item: BaseModel, handler: Handler) -> bytes:
    name = getattr(item, "type", "unknown")
    return f"event: {name}\n".encode() + b"data: " + handler.content(item) + b"\n\n"


def _stored_answer(result: Any) -> Response:
    """A stored response, or its events again; no engine is asked."""
    handler = HANDLERS[EndpointId.RESPONSES]
    if isinstance(result, BaseModel):
        return Response(handler.content(result), media_type="application/json")
    return sse.EventStream(
        sse.PeekableStream(_replayed(result, handler), partial(failure, EndpointId.RESPONSES))
    )


async def _replayed(
    events: AsyncGenerator[Any, None], handler: Handler
) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(required.with_ends(events)) as whole:
        async for event in whole:
            yield _event_of(event, handler)


def _json(content: Any) -> bytes:
    """A model's own data may have integers and text that are not UTF-8's and orjson's."""
    try:
        return orjson.dumps(content)
    except TypeError:
        return json.dumps(content, separators=(",", ":")).encode()


def _pruned(response: Response) -> Response:
    """A JSON answer of a pooling handler without the nulls of its `usage`.

    Only names are looked at: an answer can hold millions of numbers.
    """
    body = getattr(response, "body", None)
    if isinstance(body, bytes) and b'_details":null' in body:
        for key in (b"prompt_tokens_details", b"completion_tokens_details"):
            body = body.replace(b',"' + key + b'":null', b"")
        return Response(body, response.status_code, media_type=response.media_type)
    return response
