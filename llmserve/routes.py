"""A function per endpoint; those of ENDPOINTS share one, `serve`."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import orjson
from pydantic import BaseModel, Field, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from llmserve import __version__, metrics
from llmserve.constraints import check_constraints
from llmserve.errors import BodyTooLarge, LLMServeError, RequestError, RouteNotFound, quoted
from llmserve.pool import STARTING, State, cut_off
from llmserve.protocol import (
    ENDPOINTS,
    Endpoint,
    Ongoing,
    model_card,
    parse_object,
    requested_model,
)
from llmserve.sse import EventStream
from llmserve.stream import TokenStream

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from llmserve.config import Config
    from llmserve.metrics import Metrics
    from llmserve.pool import Entry, Lease, Pool


@dataclass(frozen=True)
class Services:
    """What the routes work with; one per server, in `request.app.state.services`."""

    config: Config
    pool: Pool
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))


def table() -> list[Route]:
    """Every route there is."""
    served = [
        Route(path, _serving(endpoint), methods=["POST"])
        for endpoint in ENDPOINTS
        for path in endpoint.paths
    ]
    return [
        Route("/health", health),
        Route("/ready", ready),
        Route("/version", version),
        Route("/metrics", figures),
        Route("/openapi.json", openapi),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/responses/{response_id}", fetch_response),
        Route("/v1/responses/{response_id}/cancel", cancel_response, methods=["POST"]),
        *served,
    ]


# --- a model's work


def _serving(endpoint: Endpoint) -> Any:
    async def serve(request: Request) -> Response:
        services = _services(request)
        limit = services.config.server.max_body
        bounded = Request(request.scope, _counted(request.receive, limit))
        try:
            body = await _body(bounded, endpoint, limit)
            return await _answer(request, endpoint, body, services.pool)
        finally:
            await bounded.close()  # an upload's temporary file

    return serve


async def _answer(
    request: Request, endpoint: Endpoint, body: dict[str, Any], pool: Pool
) -> Response:
    check_constraints(body)
    name = requested_model(body, pool.registry)
    request.state.model = pool.registry.find(name).name  # for the metrics, refused or not
    lease = pool.lease(name, asyncio.current_task())
    try:
        answer = lease.running.express(endpoint.name, body, name, request)
        if answer is None:
            work = lease.running.call(endpoint.name, body, name, request)
            answer = await _unless_gone(request, work)
        return Leased(answer, lease)
    except BaseException as error:
        lease.release()
        if lease.was_cut and isinstance(error, asyncio.CancelledError):
            raise cut_off() from None
        raise


class Leased(Response):
    """Gives its lease back when the work is done, also when no byte was sent."""

    def __init__(self, response: ASGIApp, lease: Lease) -> None:
        super().__init__()
        self._response = response
        self._lease = lease

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = False

        async def watched(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            await self._response(scope, receive, watched)
        except asyncio.CancelledError:
            if not self._lease.was_cut:
                raise
            if not began:
                raise cut_off() from None
            await self._end_early(send)
        finally:
            if isinstance(self._response, Ongoing):
                self._response.task.add_done_callback(lambda _: self._lease.release())
            else:
                self._lease.release()

    async def _end_early(self, send: Send) -> None:
        streamed = isinstance(self._response, EventStream | TokenStream)
        last = self._response.failure(cut_off()) if streamed else b""
        await send({"type": "http.response.body", "body": last, "more_body": False})


async def _body(request: Request, endpoint: Endpoint, limit: int) -> dict[str, Any]:
    length = request.headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:20]) > limit:
        raise BodyTooLarge(f"The body has {length[:20]} bytes; server.max_body is {limit}.")
    return await _form(request) if endpoint.multipart else parse_object(await request.body())


def _counted(receive: Receive, limit: int) -> Receive:
    received = 0

    async def counting() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise BodyTooLarge(f"The body is larger than server.max_body, {limit} bytes.")
        return message

    return counting


async def _form(request: Request) -> dict[str, Any]:
    """An upload's fields; a name that ends in [] is a list."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise RequestError("Send the audio as multipart/form-data.", param="file")
    form = await request.form()
    return {key: form.getlist(key) if key.endswith("[]") else form[key] for key in form}


async def _unless_gone(request: Request, work: Awaitable[ASGIApp]) -> ASGIApp:
    """Do `work`, but stop it when the client leaves.

    Starlette watches for that in streams only; a plain answer can take as long.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def fetch_response(request: Request) -> Response:
    """A stored answer of /v1/responses, whichever model gave it."""
    return await _of_response(request, "fetch_response", _Fetch.of(request).model_dump())


class _Fetch(BaseModel):
    """The query of a stored response."""

    stream: bool = False
    starting_after: Annotated[int, Field(ge=0)] | None = None

    @classmethod
    def of(cls, request: Request) -> _Fetch:
        try:
            return cls.model_validate(dict(request.query_params))
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise RequestError(f"{name}: {first['msg']}", param=name) from None


async def cancel_response(request: Request) -> Response:
    return await _of_response(request, "cancel_response")


async def _of_response(request: Request, action: str, *arguments: Any) -> Response:
    response_id = request.path_params["response_id"]
    for entry in _services(request).pool.ready():
        if entry.running is None or "responses" not in entry.running.able:
            continue
        try:
            act = getattr(entry.running, action)
            response: Response = await act(response_id, *arguments)
        except LLMServeError as error:
            if error.status != 404:
                raise
        else:
            return response
    raise RouteNotFound(
        f"There is no stored response {quoted(response_id)}.", param="response_id", code="not_found"
    )


# --- the server's own


async def health(_: Request) -> Response:
    """The process answers; says nothing of models."""
    return _json({"status": "ok"})


async def ready(request: Request) -> Response:
    """200 when every model is ready, else 503; each model's state either way."""
    entries = _services(request).pool.entries.values()
    states = {entry.name: {"state": entry.state.value} | _progress(entry) for entry in entries}
    all_ready = all(entry.state is State.READY for entry in entries)
    return _json({"ready": all_ready, "models": states}, 200 if all_ready else 503)


def _progress(entry: Entry) -> dict[str, str]:
    """Of a download, say; why a model failed is for the operator's terminal and log."""
    return {"note": entry.note} if entry.note and entry.state in STARTING else {}


async def version(_: Request) -> Response:
    return _json({"version": __version__})


async def figures(request: Request) -> Response:
    services = _services(request)
    page = services.metrics.page(services.pool.registries())
    return Response(page, media_type=metrics.CONTENT_TYPE)


async def models(request: Request) -> Response:
    services = _services(request)
    names = services.pool.registry.public_names()
    return _json({"object": "list", "data": [_card(services, name) for name in names]})


async def model(request: Request) -> Response:
    return _json(_card(_services(request), request.path_params["name"]))


async def openapi(_: Request) -> Response:
    from llmserve.openapi import document  # noqa: PLC0415  # needs vLLM's request classes: seconds

    return _json(await asyncio.to_thread(document, table()))


def _card(services: Services, name: str) -> dict[str, Any]:
    found = services.pool.registry.find(name)
    running = services.pool.entries[found.name].running
    return model_card(name, found, services.created, running)


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services
