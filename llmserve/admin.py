"""The operator's routes: what every model is doing, and how to steer it."""

from __future__ import annotations

import asyncio
import hmac
import re
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError
from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from llmserve.errors import (
    BodyTooLarge,
    ConfigError,
    Forbidden,
    LLMServeError,
    RequestError,
    RouteNotFound,
    Unauthorized,
    quoted,
)
from llmserve.protocol import error_body, parse_object
from llmserve.sse import EventStream, Frames, event
from llmserve.tail import Tail

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping
    from pathlib import Path

    from pydantic import SecretStr
    from starlette.requests import Request
    from starlette.types import Scope

_BODY_LIMIT = 64 * 2**10
_LINES_LIMIT = 100_000
_LOOK_S = 0.25  # how often a log is looked at for more
# A page's browser and a proxy say so; X-Forwarded-... is matched by its beginning.
_FROM_ELSEWHERE = frozenset({"origin", "forwarded", "via", "x-real-ip"})
_HOST = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[^:\[\]@/]+))(?::\d+)?", re.IGNORECASE)


class Operator(Protocol):
    """What can be seen and done. Whatever takes a model's name raises ModelNotFound."""

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


# --- access


def owns(path: str) -> bool:
    """Whether a path is the operator's: `check` instead of the API keys."""
    return path == "/admin" or path.startswith("/admin/")


def check(scope: Scope, admin_key: SecretStr | None) -> None:
    """Whether a request comes from an operator: with the key, or else from this machine.

    Raises Unauthorized or Forbidden.
    """
    headers = Headers(scope=scope)
    if admin_key is not None:
        _check_key(headers, admin_key.get_secret_value())
    elif why := _not_from_here(scope, headers):
        raise Forbidden(
            f"{why}. Without server.admin_key, /admin answers this machine's own clients alone; "
            "set that key in the registry and send it."
        )


def _check_key(headers: Headers, key: str) -> None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    if not given:
        raise Unauthorized("No admin key came; send `Authorization: Bearer KEY`.")
    # Headers come as latin-1, whatever bytes the client meant.
    if not hmac.compare_digest(given.encode("latin-1"), key.encode()):
        raise Unauthorized("The key is not server.admin_key; API keys do not open /admin.")


def _not_from_here(scope: Scope, headers: Headers) -> str | None:
    """Why a request may come from elsewhere, through a page in a browser or a proxy on this machine.

    A page reaches this machine's ports under its own origin, or, by a DNS name of its owner
    that leads here, under its own host.
    """
    client = scope.get("client")
    address = client[0] if client else "unknown"
    if not _is_loopback(address):
        return f"The client's address, {address}, is not a loopback address"
    for name in headers:
        if name in _FROM_ELSEWHERE or name.startswith("x-forwarded-"):
            return f"The request has the header {quoted(name)}, which a web page or a proxy sends"
    if headers.get("sec-fetch-site", "none") != "none":
        return "A web page sent the request"
    hosts = headers.getlist("host")
    if not hosts or not all(map(_is_local_host, hosts)):
        return f"The Host header, {quoted(', '.join(hosts))}, is no name of a loopback address"
    return None


def _is_local_host(header: str) -> bool:
    found = _HOST.fullmatch(header.strip())
    if found is None:
        return False
    name: str = found["v6"] or found["name"]
    return name.lower() == "localhost" or _is_loopback(name)


def _is_loopback(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


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
    return EventStream(Frames(_frames(_operator(request).events()), _failure))


async def _frames(happening: AsyncIterator[dict[str, Any]]) -> AsyncGenerator[bytes, None]:
    async for each in happening:
        yield event(each, "state")


def _failure(error: LLMServeError) -> bytes:
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
        _text(Tail(path, query.lines), follow=follow),
        media_type="text/plain",
        headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
    )


async def _text(tail: Tail, *, follow: bool) -> AsyncGenerator[bytes, None]:
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
