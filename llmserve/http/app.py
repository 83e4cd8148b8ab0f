"""Wiring: the route table, access, request ids, and the one error handler."""

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
    from llmserve.registry.config import ServerSpec

log = logging.getLogger(__name__)

_SLASHES = re.compile(rb"/{2,}")
_ID = b"x-request-id"
_ENDPOINT_OF = {path: endpoint.id for endpoint in ENDPOINTS for path in endpoint.paths}


def build(services: Services) -> ASGIApp:
    app = Starlette(
        routes=routes.table(),
        exception_handlers={
            HTTPException: _unrouted,
            LLMServeError: _answered,
            Exception: _answered,
        },
    )
    app.router.redirect_slashes = False  # a 404 that says what was meant
    app.state.services = services
    answering = _Answering(_Access(_Dispatch(app), services))
    return _WithContext(_Cors.of(answering, services.operator.server), services)


class _Dispatch:
    """A model's work goes straight to its endpoint: it is most of what comes.

    Starlette would compare the path with every route and wrap every message.
    """

    def __init__(self, app: Starlette) -> None:
        self._app = app
        self._work = {
            route.path: route.app
            for route in app.routes
            if isinstance(route, Route) and isinstance(route.app, InferenceEndpoint)
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            work = self._work.get(scope["path"])
            if work is not None:
                scope["app"] = self._app
                await work(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Answering:
    """The one error handler: what is raised before the first byte is an answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except ClientDisconnect:
            return  # also after the first byte: there is no client to answer
        except Exception as error:
            if scope["type"] != "http" or RequestContext.of(scope).has_begun:
                raise
            await _answer_to(error, scope)(scope, receive, send)


def _answer_to(error: Exception, scope: Scope) -> ASGIApp:
    if isinstance(error, ClientDisconnect):
        return _nobody
    if isinstance(error, HTTPException):  # a form that Starlette cannot read
        return _error_response(_refusal(error), scope)
    if isinstance(error, LLMServeError):
        return _error_response(error, scope)
    log.error("path=%s unforeseen", quoted(scope["path"]), exc_info=error)
    unforeseen = LLMServeError("Something went wrong in the server.", code="internal_error")
    return _error_response(unforeseen, scope)


def _error_response(error: LLMServeError, scope: Scope) -> Response:
    return error_response(error, scope["path"], RequestContext.of(scope).id)


async def _nobody(_: Scope, __: Receive, ___: Send) -> None:
    """There is nobody to answer."""


class _Cors(CORSMiddleware):
    """Starlette's, with our error object where it refuses a page.

    It is around everything, so that a page can read errors too, and a preflight needs no key.
    """

    @classmethod
    def of(cls, app: ASGIApp, server: ServerSpec) -> _Cors:
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
        refusal = error_response(RequestError(self._why(request_headers), code="cors_refused"))
        for name in set(response.headers) - {"content-type", "content-length"}:
            refusal.headers[name] = response.headers[name]
        return refusal

    def _why(self, headers: Headers) -> str:
        origin, method = headers["origin"], headers["access-control-request-method"]
        if not self.is_allowed_origin(origin):
            return _unlisted("origin", origin, "allowed_origins", self.allow_origins)
        if method not in self.allow_methods:
            return _unlisted("method", method, "allowed_methods", self.allow_methods)
        asked = headers.get("access-control-request-headers", "")
        return _unlisted("headers", asked, "allowed_headers", self.allow_headers)


def _unlisted(what: str, came: str, setting: str, allowed: Iterable[str]) -> str:
    """Why a preflight is refused."""
    listed = ", ".join(map(quoted, allowed)) or "empty"
    return (
        f"The preflight asks for the {what} {quoted(came)}, which server.{setting} does not hold; "
        f"it is {listed}. Add what is missing there and restart the server."
    )


class _WithContext:
    """Creates the context of every request, and counts it by model, endpoint and status."""

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
        # vLLM's handlers take the id of an answer from here.
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
    """Take `/v1//models/` for `/v1/models`, as clients join a base URL and a path.

    A slash that is part of a model's name is written `%2F`, and stays.
    """
    path = scope["path"]
    if path[-1:] == "/" or "//" in path:
        raw = scope.get("raw_path") or quote(path).encode("ascii")
        scope["raw_path"] = raw = _SLASHES.sub(b"/", raw).rstrip(b"/") or b"/"
        scope["path"] = unquote(raw.decode("ascii"))


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == _ID), b"").decode("latin-1")
    fit = 0 < len(given) <= 128 and given.isascii() and given.isprintable()
    return given if fit else os.urandom(16).hex()


class _Access:
    """Lets in who has a key, or may do without."""

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


async def _answered(request: Request, error: Exception) -> Response:
    return cast("Response", _answer_to(error, request.scope))


async def _unrouted(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such route, wrong method."""
    error = cast("HTTPException", error)
    allowed = _methods(request)
    if error.status_code == 405 and allowed:
        refusal: RequestError = MethodNotAllowed(
            f"{quoted(request.url.path)} does not take {request.method}; "
            f"it takes {', '.join(allowed)}.",
            allowed,
        )
    elif error.status_code in {404, 405}:
        refusal = _no_route(request)
    else:
        refusal = _refusal(error)
    return _error_response(refusal, request.scope)


def _refusal(error: HTTPException) -> RequestError:
    refusal = RequestError(str(error.detail))
    refusal.status = error.status_code
    return refusal


def _methods(request: Request) -> list[str]:
    """What the path takes. Nothing is posted to an id: POST /v1/responses/compact is a route."""
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
