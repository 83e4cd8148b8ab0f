"""The routes under /admin: states of the models, commands, events and logs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool
from starlette.responses import StreamingResponse
from starlette.routing import Route

from llmserve.api.endpoints import error_body, json_response, parse_object
from llmserve.api.sse import EventStream, PeekableStream, event
from llmserve.errors import (
    BodyTooLarge,
    ConfigError,
    LLMServeError,
    RequestError,
    RouteNotFound,
    quoted,
)
from llmserve.http.body import validate_fields
from llmserve.http.log_tail import LogFollower

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from starlette.requests import Request
    from starlette.responses import Response

    from llmserve.lifecycle.operator import ModelOperator

_BODY_LIMIT = 64 * 2**10
_LINES_LIMIT = 100_000
_POLL_S = 0.25  # between two reads of a log that is followed


def table() -> list[Route]:
    model = "/admin/models/{name:path}"
    return [
        Route("/admin/models", models),
        Route("/admin/events", events),
        Route("/admin/reload", reload, methods=["POST"]),
        Route(f"{model}/load", load, methods=["POST"]),
        Route(f"{model}/unload", unload, methods=["POST"]),
        Route(f"{model}/sleep", sleep, methods=["POST"]),
        Route(f"{model}/wake", wake, methods=["POST"]),
        Route(f"{model}/logs", logs),
        Route(model, model_state),
    ]


# --- models


async def models(request: Request) -> Response:
    return json_response({"models": _operator(request).models()})


async def model_state(request: Request) -> Response:
    return json_response(_operator(request).model(_name(request)))


class _Nothing(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Unload(_Nothing):
    drain: StrictBool = True


async def load(request: Request) -> Response:
    await _body(request, _Nothing)
    await _operator(request).load(_name(request))
    return await model_state(request)


async def unload(request: Request) -> Response:
    body = await _body(request, _Unload)
    await _operator(request).unload(_name(request), drain=body.drain)
    return await model_state(request)


async def sleep(request: Request) -> Response:
    await _body(request, _Nothing)
    await _operator(request).sleep(_name(request))
    return await model_state(request)


async def wake(request: Request) -> Response:
    await _body(request, _Nothing)
    await _operator(request).wake(_name(request))
    return await model_state(request)


# --- the registry


class _Reload(_Nothing):
    dry_run: StrictBool = False


async def reload(request: Request) -> Response:
    body = await _body(request, _Reload)
    try:
        return json_response(await _operator(request).reload(dry_run=body.dry_run))
    except ConfigError as error:  # the file is the operator's: no 5xx
        raise RequestError(error.message, code="invalid_registry") from error


# --- events


async def events(request: Request) -> Response:
    return EventStream(PeekableStream(_frames(_operator(request).events()), _failure))


async def _frames(changes: AsyncIterator[dict[str, Any]]) -> AsyncGenerator[bytes, None]:
    async for change in changes:
        yield event(change, "state")


def _failure(error: LLMServeError, _: int) -> bytes:
    return event(error_body(error), "error")


# --- logs


class _Logs(_Nothing):
    """The query parameters of a log."""

    lines: Annotated[int, Field(ge=0, le=_LINES_LIMIT)] = 200
    replica: int = 0
    follow: bool = False


async def logs(request: Request) -> Response:
    """Stream the last lines of a log; with `follow`, also later lines, of later engines too."""
    query = validate_fields(_Logs, request.query_params)
    model = _operator(request).model(_name(request))
    numbers = [replica["number"] for replica in model["replicas"]]
    if query.replica not in numbers:
        raise RequestError(
            f"{quoted(model['name'])} has no replica {query.replica}; "
            f"it has {', '.join(map(str, numbers)) or 'none'}.",
            param="replica",
        )
    path = _operator(request).log_of(model["name"], query.replica)
    if not query.follow and not await asyncio.to_thread(path.is_file):
        raise RouteNotFound(
            f"{quoted(model['name'])} has no log yet; its engine writes one when it starts.",
            code="not_found",
        )
    follow = query.follow and request.method == "GET"  # HEAD would not end
    return StreamingResponse(
        _text(LogFollower(path, query.lines), follow=follow),
        media_type="text/plain",
        headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
    )


async def _text(log: LogFollower, *, follow: bool) -> AsyncGenerator[bytes, None]:
    while True:
        if part := await asyncio.to_thread(log.read):
            yield part
        elif follow:
            await asyncio.sleep(_POLL_S)
        else:
            return


# --- requests


def _operator(request: Request) -> ModelOperator:
    operator: ModelOperator = request.app.state.services.operator
    return operator


def _name(request: Request) -> str:
    name: str = request.path_params["name"]
    return name


B = TypeVar("B", bound=BaseModel)


async def _body(request: Request, kind: type[B]) -> B:
    """Return the body as a `kind`; an empty body has no keys."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _BODY_LIMIT:
            raise BodyTooLarge(f"The body has more than {_BODY_LIMIT} bytes, the limit.")
    return validate_fields(kind, parse_object(body) if body else {})
