"""vLLM's handler of each endpoint, with its request class and the JSON of its answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import orjson
from pydantic import ValidationError
from starlette.responses import Response
from vllm.entrypoints.anthropic.protocol import (
    AnthropicCountTokensRequest,
    AnthropicMessagesRequest,
    AnthropicStreamEvent,
)
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionStreamResponse
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.pooling.classify.protocol import ClassificationRequest
from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest
from vllm.entrypoints.pooling.pooling.protocol import PoolingRequest
from vllm.entrypoints.pooling.scoring.protocol import RerankRequest, ScoreRequest
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeRequest
from vllm.entrypoints.speech_to_text.transcription.protocol import (
    TranscriptionRequest,
    TranscriptionStreamResponse,
)
from vllm.entrypoints.speech_to_text.translation.protocol import (
    TranslationRequest,
    TranslationStreamResponse,
)
from vllm.exceptions import VLLMValidationError

from llmserve.api import sse
from llmserve.api.body_limits import check_choices
from llmserve.api.endpoint_id import EndpointId
from llmserve.api.endpoints import TITLES
from llmserve.api.validation_errors import mistake
from llmserve.engine import required_keys
from llmserve.engine.beam_search import check_beam_search
from llmserve.engine.error_mapping import bounded_line
from llmserve.engine.request_validation import bounded, shape_of
from llmserve.engine.schema_nulls import schema_of, without_nulls
from llmserve.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pydantic import BaseModel, TypeAdapter
    from pydantic_core import SchemaValidator


def _unchanged(answer: dict[str, Any]) -> dict[str, Any]:
    return answer


def _whole(event: dict[str, Any]) -> Sequence[dict[str, Any]]:
    return (event,)


@dataclass(frozen=True)
class EndpointHandler:
    """The handler of one endpoint: an attribute of vLLM's State, its method, the request's type.

    `nulls` are the keys that may be null in OpenAI's schema; None: there is no such schema, and
    answers stay as they are. `events` are the classes of the events that vLLM writes as text.
    `complete` adds the keys that vLLM omits, `split` divides an event; one that needs either
    contains one of `marks`.
    """

    owner: str
    method: str
    request: TypeAdapter[Any]
    nulls: frozenset[str] | None = None
    events: tuple[type[BaseModel], ...] = ()
    complete: Callable[[dict[str, Any]], dict[str, Any]] = _unchanged
    marks: tuple[bytes, ...] = ()
    split: Callable[[dict[str, Any]], Sequence[dict[str, Any]]] = _whole

    @cached_property
    def shape(self) -> SchemaValidator:
        return shape_of(self.request)

    def pruned(self, frame: bytes) -> bytes:
        """Return an event of vLLM's text as one or more without nulls."""
        if self.nulls is None:
            return frame
        if b":null" not in frame and not any(mark in frame for mark in self.marks):
            return frame
        payload = sse.payload(frame)
        if payload is None:
            return frame
        pruned = without_nulls(payload, schema_of(*self.events), self.nulls)
        parts = self.split(self.complete(pruned))
        return b"".join(sse.with_payload(frame, part) for part in parts)

    def content(self, answer: BaseModel) -> bytes:
        """Return an answer or event, given as a model, as JSON without nulls."""
        content = answer.model_dump(mode="json", by_alias=True)
        if self.nulls is not None:
            content = without_nulls(content, schema_of(type(answer)), self.nulls)
        return _json(self.complete(content))

    def event(self, item: BaseModel) -> bytes:
        """Return an event, given as a model, as bytes."""
        name = getattr(item, "type", "unknown")
        return f"event: {name}\n".encode() + b"data: " + self.content(item) + b"\n\n"


_CHAT_NULLS = frozenset({"content", "refusal", "logprobs", "finish_reason", "usage"})
_COMPLETION_NULLS = frozenset({"logprobs", "finish_reason"})
_RESPONSE_NULLS = frozenset(
    {"error", "incomplete_details", "instructions", "metadata", "temperature", "top_p"}
    | {"previous_response_id", "reasoning", "background", "max_output_tokens"}
    | {"max_tool_calls", "truncation", "prompt", "service_tier", "conversation"}
    | {"effort", "summary", "encrypted_content"}
)
_NO_NULLS: frozenset[str] = frozenset()

HANDLERS: dict[EndpointId, EndpointHandler] = {
    EndpointId.CHAT_COMPLETIONS: EndpointHandler(
        "openai_serving_chat",
        "create_chat_completion",
        bounded(ChatCompletionRequest),
        _CHAT_NULLS,
        (ChatCompletionStreamResponse,),
        required_keys.complete_chat,
        (b'"logprobs":{', b'"finish_reason":"'),
        required_keys.split_end,
    ),
    EndpointId.COMPLETIONS: EndpointHandler(
        "openai_serving_completion",
        "create_completion",
        bounded(CompletionRequest),
        _COMPLETION_NULLS,
        (CompletionStreamResponse,),
    ),
    EndpointId.RESPONSES: EndpointHandler(
        "openai_serving_responses",
        "create_responses",
        bounded(ResponsesRequest),
        _RESPONSE_NULLS,
        complete=required_keys.complete_response,
    ),
    EndpointId.MESSAGES: EndpointHandler(
        "anthropic_serving_messages",
        "create_messages",
        bounded(AnthropicMessagesRequest),
        frozenset({"stop_reason", "stop_sequence"}),
        (AnthropicStreamEvent,),
        required_keys.complete_message,
        (b'"usage":{', b'"content_block":{'),
    ),
    EndpointId.TOKEN_COUNTS: EndpointHandler(
        "anthropic_serving_messages",
        "count_tokens",
        bounded(AnthropicCountTokensRequest),
        _NO_NULLS,
    ),
    EndpointId.EMBEDDINGS: EndpointHandler(
        "serving_embedding", "__call__", bounded(EmbeddingRequest), _NO_NULLS
    ),
    EndpointId.SCORES: EndpointHandler("serving_scores", "__call__", bounded(ScoreRequest)),
    EndpointId.RERANKING: EndpointHandler("serving_scores", "__call__", bounded(RerankRequest)),
    EndpointId.POOLING: EndpointHandler("serving_pooling", "__call__", bounded(PoolingRequest)),
    EndpointId.CLASSIFICATION: EndpointHandler(
        "serving_classification", "__call__", bounded(ClassificationRequest)
    ),
    EndpointId.TOKENIZATION: EndpointHandler(
        "serving_tokenization", "create_tokenize", bounded(TokenizeRequest)
    ),
    EndpointId.DETOKENIZATION: EndpointHandler(
        "serving_tokenization", "create_detokenize", bounded(DetokenizeRequest)
    ),
    EndpointId.TRANSCRIPTIONS: EndpointHandler(
        "openai_serving_transcription",
        "create_transcription",
        bounded(TranscriptionRequest),
        _NO_NULLS,
        (TranscriptionStreamResponse,),
    ),
    EndpointId.TRANSLATIONS: EndpointHandler(
        "openai_serving_translation",
        "create_translation",
        bounded(TranslationRequest),
        _NO_NULLS,
        (TranslationStreamResponse,),
    ),
}


def parse(endpoint: EndpointId, body: dict[str, Any]) -> Any:
    """Return a body as vLLM's request class.

    Raises RequestError with one bounded line about the deepest mistake.
    """
    handler = HANDLERS[endpoint]
    try:
        parsed = handler.request.validate_python(body)
    except ValidationError as error:
        raise mistake(error.errors(include_url=False), body) from None
    except VLLMValidationError as error:
        raise RequestError(bounded_line(error.args[0]), param=error.parameter) from None
    except (TypeError, ValueError, AttributeError, KeyError):
        # One of vLLM's validators, which read the body before its types are checked.
        try:
            handler.shape.validate_python(body)
        except ValidationError as error:
            raise mistake(error.errors(include_url=False), body) from None
        raise RequestError(f"The body is not a valid request for {TITLES[endpoint]}.") from None
    check_choices("n", getattr(parsed, "n", None) or 1, _count_prompts(parsed))
    check_beam_search(parsed)
    return parsed


def _count_prompts(parsed: Any) -> int:
    prompt = getattr(parsed, "prompt", None)
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return len(prompt)
    return 1


def drop_own_size(request: Any, model_config: Any) -> None:
    """Unset `dimensions` if it is the model's own size: vLLM refuses it for most models."""
    dimensions = getattr(request, "dimensions", None)
    if dimensions is not None and dimensions == model_config.embedding_size:
        request.dimensions = None


def without_usage_nulls(response: Response) -> Response:
    """Return the JSON answer of a pooling handler without the nulls of its `usage`.

    The text is searched instead of parsed: an answer can hold millions of numbers.
    """
    body = getattr(response, "body", None)
    if isinstance(body, bytes) and b'_details":null' in body:
        for key in (b"prompt_tokens_details", b"completion_tokens_details"):
            body = body.replace(b',"' + key + b'":null', b"")
        return Response(body, response.status_code, media_type=response.media_type)
    return response


def _json(content: Any) -> bytes:
    """Encode as JSON, including integers and text that orjson refuses: a model may have both."""
    try:
        return orjson.dumps(content)
    except TypeError:
        return json.dumps(content, separators=(",", ":")).encode()
