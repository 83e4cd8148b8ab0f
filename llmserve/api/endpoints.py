"""The inference endpoints, and the error objects of both APIs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
from starlette.responses import Response

from llmserve.api import sse
from llmserve.api.endpoint_id import EndpointId
from llmserve.api.json_text import load
from llmserve.errors import LLMServeError, Overloaded, RequestError, quoted

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable, Mapping

    from starlette.types import ASGIApp, Receive, Scope, Send

    from llmserve.api.json_text import Buffer


@dataclass(frozen=True)
class Endpoint:
    """An endpoint of a model, on all of `paths`.

    `title` is its name in error messages. Dispatch counts an answer as `answer_tokens`, which
    is 0 without generated text.
    """

    id: EndpointId
    title: str
    paths: tuple[str, ...]
    multipart: bool = False  # an upload; all others are JSON
    answer_tokens: int = 0
    named_events: bool = False  # stream events have names; a failure is an `error` event


_ANSWER_TOKENS = 512  # of a typical answer

ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint(
        EndpointId.CHAT_COMPLETIONS,
        "chat completions",
        ("/v1/chat/completions",),
        answer_tokens=_ANSWER_TOKENS,
    ),
    Endpoint(
        EndpointId.COMPLETIONS, "completions", ("/v1/completions",), answer_tokens=_ANSWER_TOKENS
    ),
    Endpoint(EndpointId.RESPONSES, "responses", ("/v1/responses",), False, _ANSWER_TOKENS, True),
    Endpoint(EndpointId.MESSAGES, "messages", ("/v1/messages",), False, _ANSWER_TOKENS, True),
    Endpoint(EndpointId.TOKEN_COUNTS, "token counts", ("/v1/messages/count_tokens",)),
    Endpoint(EndpointId.EMBEDDINGS, "embeddings", ("/v1/embeddings",)),
    Endpoint(EndpointId.SCORES, "scores", ("/v1/score", "/score")),
    Endpoint(EndpointId.RERANKING, "reranking", ("/v1/rerank", "/rerank", "/v2/rerank")),
    Endpoint(EndpointId.POOLING, "pooling", ("/pooling",)),
    Endpoint(EndpointId.CLASSIFICATION, "classification", ("/classify",)),
    Endpoint(EndpointId.TOKENIZATION, "tokenization", ("/tokenize",)),
    Endpoint(EndpointId.DETOKENIZATION, "detokenization", ("/detokenize",)),
    Endpoint(
        EndpointId.TRANSCRIPTIONS,
        "transcriptions",
        ("/v1/audio/transcriptions",),
        True,
        _ANSWER_TOKENS,
    ),
    Endpoint(
        EndpointId.TRANSLATIONS, "translations", ("/v1/audio/translations",), True, _ANSWER_TOKENS
    ),
)


_ANTHROPIC = "/v1/messages/"
TITLES = {endpoint.id: endpoint.title for endpoint in ENDPOINTS}
NAMED_EVENTS = frozenset(endpoint.id for endpoint in ENDPOINTS if endpoint.named_events)


def failure(endpoint: EndpointId, error: LLMServeError, sent: int = 0) -> bytes:
    """Return the last events of a stream that failed after `sent` events."""
    if endpoint is EndpointId.MESSAGES:
        return last_event(endpoint, anthropic_error(error))
    if endpoint is EndpointId.RESPONSES:
        return last_event(endpoint, _response_error(error, sent))
    return last_event(endpoint, error_body(error))


def last_event(endpoint: EndpointId, body: dict[str, Any]) -> bytes:
    """Return an error object as the last events of a stream."""
    if endpoint in NAMED_EVENTS:
        return sse.event({"type": "error", **body}, "error")
    return sse.event(body) + sse.DONE


def _response_error(error: LLMServeError, sent: int) -> dict[str, Any]:
    """Return the keys of OpenAI's event and the error object of Open Responses."""
    flat = {"message": error.message, "param": error.param, "code": error.code}
    return {"sequence_number": sent, **flat, **error_body(error)}


class BackgroundAnswer:
    """An answer that is sent before its work is complete; `task` completes it."""

    def __init__(self, answer: ASGIApp, task: asyncio.Task[Any]) -> None:
        self._answer = answer
        self.task = task

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(scope, receive, send)


def error_body(error: LLMServeError) -> dict[str, Any]:
    """Return the error object. Source: OpenAI API reference, "Error codes"."""
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def anthropic_error(error: LLMServeError, request_id: str | None = None) -> dict[str, Any]:
    """Return Anthropic's error object. Source: Claude API reference, "Errors"."""
    kind = _ANTHROPIC_KINDS.get(error.status)
    if kind is None:
        kind = "invalid_request_error" if error.status < 500 else "api_error"
    if isinstance(error, Overloaded):
        kind = "overloaded_error"
    body = {"type": "error", "error": {"type": kind, "message": error.message}}
    return body | ({"request_id": request_id} if request_id else {})


_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}


def error_response(
    error: LLMServeError,
    path: str = "",
    request_id: str | None = None,
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> Response:
    """Return the error response of the API that the path or the request's `headers` belong to."""
    versions = (name for name, _ in headers if name == b"anthropic-version")
    anthropic = f"{path}/".startswith(_ANTHROPIC) or any(versions)
    body = anthropic_error(error, request_id) if anthropic else error_body(error)
    return json_response(body, error.status, error.headers())


def json_response(
    content: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


def parse_object(body: Buffer) -> dict[str, Any]:
    """Return a request body as a JSON object; see `json_text.load`.

    Raises RequestError, whose message has no text of the body, and BodyTooLarge.
    """
    if not body:
        raise RequestError("The body is empty; send a JSON object.", code="invalid_json")
    value = load(body)
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object.", code="invalid_json")
    return value


def cannot(model: str, endpoint: EndpointId, supported: Iterable[EndpointId]) -> str:
    """Return the error message for an endpoint that a model does not support."""
    titles = ", ".join(sorted(TITLES[each] for each in supported))
    return f"The model {quoted(model)} does not support {TITLES[endpoint]}; supported: {titles}."
