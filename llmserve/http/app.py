"""The ASGI application: route table, access, request ids, CORS, and the error handler."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from typing import TYPE_CHECKING, cast
from urllib.parse import quote, unquote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Match, Route

from llmserve.api.context import RequestContext
from llmserve.api.endpoints import ENDPOINTS, error_response
from llmserve.errors import (
    LLMServeError,
    MethodNotAllowed,
    RequestError,
    RouteNotFound,
    nearest,
    quoted,
)
from llmserve.http import auth, routes
from llmserve.http.inference import InferenceEndpoint

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.datastructures import Headers
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from llmserve.http.services import Services
    from llmserve.registry.spec import ServerSpec

log = logging.getLogger(__name__)

_SLASHES = re.compile(rb"/{2,}")
_ID = b"x-request-id"
_ENDPOINT_OF = {path: endpoint.id for endpoint in ENDPOINTS for path in endpoint.paths}


def build(services: Services) -> ASGIApp:
    app = Starlette(
        routes=routes.table(),
        exception_handlers={
            HTTPException: _unrouted_response,
            LLMServeError: _response,
            Exception: _response,
        },
    )
    app.router.redirect_slashes = False  # a 404 with the nearest route instead
    app.state.services = services
    handler = _ErrorHandler(_Access(_Dispatch(app), services))
    return _WithContext(_Cors.from_spec(handler, services.operator.server), services)


class _Dispatch:
    """Calls the endpoint of an inference request; other requests take Starlette's router.

    The router compares the path with every route and wraps every message.
    """

    def __init__(self, app: Starlette) -> None:
        self._app = app
        self._endpoints = {
            route.path: route.app
            for route in app.routes
            if isinstance(route, Route) and isinstance(route.app, InferenceEndpoint)
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self._endpoints.get(scope["path"])
            if endpoint is not None:
                scope["app"] = self._app
                await endpoint(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _ErrorHandler:
    """Sends an error response for an exception before the first byte."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except ClientDisconnect:
            return  # also after the first byte
        except Exception as error:
            if scope["type"] != "http" or RequestContext.of(scope).has_begun:
                raise
            await _error_app(error, scope)(scope, receive, send)


def _error_app(error: Exception, scope: Scope) -> ASGIApp:
    if isinstance(error, ClientDisconnect):
        return _no_response
    if isinstance(error, HTTPException):  # a form that Starlette cannot read
        return _error_response(_request_error(error), scope)
    if isinstance(error, LLMServeError):
        return _error_response(error, scope)
    log.error("path=%s unforeseen error", quoted(scope["path"]), exc_info=error)
    internal = LLMServeError(
        "Internal error; its cause is in the server's log.", code="internal_error"
    )
    return _error_response(internal, scope)


def _error_response(error: LLMServeError, scope: Scope) -> Response:
    return error_response(error, scope["path"], RequestContext.of(scope).id, scope["headers"])


async def _no_response(_: Scope, __: Receive, ___: Send) -> None:
    """Send nothing: the client has disconnected."""


class _Cors(CORSMiddleware):
    """Starlette's middleware, with our error object for a refused preflight.

    It is outside access and errors: pages can read errors, and a preflight needs no key.
    """

    @classmethod
    def from_spec(cls, app: ASGIApp, server: ServerSpec) -> _Cors:
        return cls(
            app,
            allow_origins=server.allowed_origins,
            allow_methods=server.allowed_methods,
            allow_headers=server.allowed_headers,
            allow_credentials=server.allow_credentials,
            expose_headers=[_ID.decode()],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.allow_origins or scope.get("method") == "OPTIONS":
            await super().__call__(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        refusal = error_response(RequestError(self._reason(request_headers), code="cors_refused"))
        for name in set(response.headers) - {"content-type", "content-length"}:
            refusal.headers[name] = response.headers[name]
        return refusal

    def _reason(self, headers: Headers) -> str:
        origin, method = headers["origin"], headers["access-control-request-method"]
        if not self.is_allowed_origin(origin):
            return _unlisted("origin", origin, "allowed_origins", self.allow_origins)
        if method not in self.allow_methods:
            return _unlisted("method", method, "allowed_methods", self.allow_methods)
        names = headers.get("access-control-request-headers", "")
        return _unlisted("headers", names, "allowed_headers", self.allow_headers)


def _unlisted(what: str, value: str, setting: str, allowed: Iterable[str]) -> str:
    return (
        f"The {what} {quoted(value)} of the preflight must be in server.{setting}; "
        f"allowed: {', '.join(map(quoted, allowed)) or 'none'}. "
        "Add it to the list and restart the server."
    )


class _WithContext:
    """Creates the context of each request and counts it by model, endpoint and status."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._metrics = services.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _merge_slashes(scope)
        context = RequestContext(_request_id(scope), _ENDPOINT_OF.get(scope["path"]))
        context.attach(scope)
        named = (_ID, context.id.encode("ascii"))
        # vLLM's handlers use this header as the id of the answer.
        scope["headers"] = [*(h for h in scope["headers"] if h[0] != _ID), named]

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.begin(message["status"])
                message = {**message, "headers": [*message["headers"], named]}
            else:
                context.is_complete = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, with_id)
        finally:
            context.end()
            self._count(context)

    def _count(self, context: RequestContext) -> None:
        model, endpoint = context.model, context.endpoint
        if endpoint is None:
            return
        self._metrics.requests.labels(model, endpoint, context.status).inc()
        if not context.is_complete:
            self._metrics.disconnects.labels(model, endpoint).inc()


def _merge_slashes(scope: Scope) -> None:
    """Change `/v1//models/` to `/v1/models`: clients join a base URL and a path.

    A slash of a model's name is written `%2F` and does not change.
    """
    path = scope["path"]
    if path[-1:] == "/" or "//" in path:
        raw = scope.get("raw_path") or quote(path).encode("ascii")
        scope["raw_path"] = raw = _SLASHES.sub(b"/", raw).rstrip(b"/") or b"/"
        scope["path"] = unquote(raw.decode("ascii"))


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == _ID), b"").decode("latin-1")
    is_valid = 0 < len(given) <= 128 and given.isascii() and given.isprintable()
    return given if is_valid else os.urandom(16).hex()


class _Access:
    """Refuses requests without access, and sets the owner of the others."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            key = auth.check(scope, self._services.operator.server)
            if key is not None:
                RequestContext.of(scope).owner = hashlib.sha256(key).hexdigest()
        await self._app(scope, receive, send)


# --- errors


async def _response(request: Request, error: Exception) -> Response:
    return cast("Response", _error_app(error, request.scope))


async def _unrouted_response(request: Request, error: Exception) -> Response:
    """Return our error for one of Starlette's: unknown route, wrong method."""
    error = cast("HTTPException", error)
    allowed = _methods(request)
    if error.status_code == 405 and allowed:
        refusal: RequestError = MethodNotAllowed(
            f"{quoted(request.url.path)} does not support {request.method}; "
            f"supported: {', '.join(allowed)}.",
            allowed,
        )
    elif error.status_code in {404, 405}:
        refusal = _no_route(request)
    else:
        refusal = _request_error(error)
    return _error_response(refusal, request.scope)


def _request_error(error: HTTPException) -> RequestError:
    request_error = RequestError(str(error.detail))
    request_error.status = error.status_code
    return request_error


def _methods(request: Request) -> list[str]:
    """Return the methods of the path, without POST to an id: /v1/responses/compact is no id."""
    found = [
        route
        for route in request.app.routes
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
    ]
    if request.method == "POST":
        found = [route for route in found if not route.path.endswith("}")]
    return sorted({method for route in found for method in route.methods or ()})


def _no_route(request: Request) -> RouteNotFound:
    known = [route.path for route in request.app.routes if isinstance(route, Route)]
    near = nearest(request.url.path, known)
    hint = f"did you mean {near}?" if near else "GET /openapi.json lists all routes."
    return RouteNotFound(f"There is no route {quoted(request.url.path)}; {hint}")
