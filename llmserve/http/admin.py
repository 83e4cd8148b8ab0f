"""The operator's routes: what every model is doing, and how to steer it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from llmserve.api.endpoints import error_body, parse_object
from llmserve.api.sse import EventStream, PeekableStream, event
from llmserve.errors import (
    BodyTooLarge,
    ConfigError,
    LLMServeError,
    RequestError,
    RouteNotFound,
    quoted,
)
from llmserve.http.log_tail import LogFollower

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping
    from pathlib import Path

    from starlette.requests import Request

    from llmserve.registry.config import ServerSpec

_BODY_LIMIT = 64 * 2**10
_LINES_LIMIT = 100_000
_LOOK_S = 0.25  # how often a log is looked at for more


class Operator(Protocol):
    """What can be seen and done. Whatever takes a model's name raises ModelNotFound."""

    server: ServerSpec  # the section in force

    def models(self) -> list[dict[str, Any]]:
        """A dictionary for each model, fit for JSON.

        Keys: name, aliases, start, pinned, priority, state, level, in_flight, queued, idle_s, swaps,
        deaths, note, replicas: number, state, level, note, devices, since_s, start_s, wake_s,
        gpu_bytes, host_bytes, pid.
        """
        ...

    def model(self, name: str) -> dict[str, Any]:
        """One of them, by any of its names."""
        ...

    async def load(self, name: str) -> None:
        """Until it is ready. Raises LLMServeError."""
        ...

    async def unload(self, name: str, *, drain: bool) -> None:
        """Until it has stopped; `drain`: its requests end first, else they are cut off."""
        ...

    async def sleep(self, name: str) -> None: ...
    async def wake(self, name: str) -> None: ...
    async def reload(self, *, dry_run: bool) -> dict[str, Any]:
        """The registry's file again: `changed`, and `lines` that tell what.

        Raises ConfigError with every problem; then all is as before.
        """
        ...

    def events(self) -> AsyncIterator[dict[str, Any]]:
        """From now on: at (unix time), model, replica, from, to, note."""
        ...

    def log_of(self, name: str, replica: int) -> Path: ...


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
    return _json({"models": _operator(request).models()})


async def model_state(request: Request) -> Response:
    return _json(_operator(request).model(_name(request)))


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
        return _json(await _operator(request).reload(dry_run=body.dry_run))
    except ConfigError as error:  # of the file, and so not the server's fault
        raise RequestError(error.message, code="invalid_registry") from error


# --- what happens


async def events(request: Request) -> Response:
    return EventStream(PeekableStream(_frames(_operator(request).events()), _failure))


async def _frames(happening: AsyncIterator[dict[str, Any]]) -> AsyncGenerator[bytes, None]:
    async for each in happening:
        yield event(each, "state")


def _failure(error: LLMServeError, _: int) -> bytes:
    return event(error_body(error), "error")


# --- logs


class _Logs(_Nothing):
    """The query of a log."""

    lines: Annotated[int, Field(ge=0, le=_LINES_LIMIT)] = 200
    replica: int = 0
    follow: bool = False


async def logs(request: Request) -> Response:
    """The last lines; with `follow`, also those to come, of later engines too."""
    query = _valid(_Logs, request.query_params)
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


async def _text(tail: LogFollower, *, follow: bool) -> AsyncGenerator[bytes, None]:
    while True:
        if part := await asyncio.to_thread(tail.read):
            yield part
        elif follow:
            await asyncio.sleep(_LOOK_S)
        else:
            return


# --- requests


def _operator(request: Request) -> Operator:
    operator: Operator = request.app.state.services.operator
    return operator


def _name(request: Request) -> str:
    name: str = request.path_params["name"]
    return name


B = TypeVar("B", bound=BaseModel)


async def _body(request: Request, kind: type[B]) -> B:
    """A JSON object; no body is an empty one."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _BODY_LIMIT:
            raise BodyTooLarge(f"The body is larger than {_BODY_LIMIT} bytes.")
    return _valid(kind, parse_object(body) if body else {})


def _valid(kind: type[B], values: Mapping[str, Any]) -> B:
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        problems = [(str(each["loc"][0]), each["msg"]) for each in error.errors()]
        raise RequestError(
            "; ".join(f"{quoted(name)}: {message}" for name, message in problems)
            + f". It takes {', '.join(kind.model_fields) or 'no keys'}.",
            param=problems[0][0],
        ) from None


def _json(content: dict[str, Any]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
