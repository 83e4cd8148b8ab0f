"""Every route there is: the models' work, and the server's own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import orjson
from pydantic import BaseModel, Field, ValidationError
from starlette.responses import Response
from starlette.routing import Route

from llmserve import __version__, metrics
from llmserve.api.context import RequestContext
from llmserve.api.endpoints import ENDPOINTS
from llmserve.errors import RequestError, RouteNotFound, quoted
from llmserve.http import admin
from llmserve.http.inference import InferenceEndpoint
from llmserve.http.models import model_card, model_list
from llmserve.lifecycle.replica import STARTING

if TYPE_CHECKING:
    from starlette.requests import Request

    from llmserve.http.services import Services
    from llmserve.lifecycle.replica import Replica
    from llmserve.lifecycle.response_store import ResponseStore
    from llmserve.lifecycle.served_model import ServedModel


def table() -> list[Route]:
    """Every route there is."""
    served = [
        Route(path, InferenceEndpoint(endpoint), methods=["POST"], name=endpoint.id)
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
        Route("/v1/responses/{response_id}", delete_response, methods=["DELETE"]),
        Route("/v1/responses/{response_id}/cancel", cancel_response, methods=["POST"]),
        *admin.table(),
        *served,
    ]


# --- stored responses


async def fetch_response(request: Request) -> Response:
    """A stored answer of /v1/responses, whichever model gave it, running or not."""
    query = _Fetch.of(request)
    stored, response_id = _stored(request)
    return stored.fetch(response_id, stream=query.stream, starting_after=query.starting_after)


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


async def delete_response(request: Request) -> Response:
    """A stored answer is forgotten, and ended if it runs in the background."""
    stored, response_id = _stored(request)
    await stored.delete(response_id)
    return _json({"id": response_id, "object": "response", "deleted": True})


async def cancel_response(request: Request) -> Response:
    stored, response_id = _stored(request)
    return await stored.cancel(response_id)


def _stored(request: Request) -> tuple[ResponseStore, str]:
    """Where the response of the path is. Raises RouteNotFound, also for another key's."""
    response_id = request.path_params["response_id"]
    owner = RequestContext.of(request.scope).owner
    for entry in _services(request).pool.models.values():
        if entry.responses.has(response_id, owner):
            return entry.responses, response_id
    raise RouteNotFound(
        f"There is no stored response {quoted(response_id)}.", param="response_id", code="not_found"
    )


# --- the server's own


async def health(_: Request) -> Response:
    """The process answers; says nothing of models."""
    return _json({"status": "ok"})


async def ready(request: Request) -> Response:
    """200 while every model answers, or would when it is asked; each model's state either way."""
    entries = _services(request).pool.models.values()
    states = {entry.name: _shown(entry) for entry in entries}
    all_ready = all(entry.ready or entry.queues_requests for entry in entries)
    return _json({"ready": all_ready, "models": states}, 200 if all_ready else 503)


def _shown(entry: ServedModel) -> dict[str, Any]:
    """A model's state, and, if it has several replicas, the state of each."""
    replicas = [_state_of(replica) for replica in entry.replicas]
    return _state_of(entry) | ({"replicas": replicas} if len(replicas) > 1 else {})


def _state_of(one: ServedModel | Replica) -> dict[str, str]:
    """With progress, of a download say; why it failed is for the operator's terminal and log."""
    progress = {"note": one.note} if one.note and one.state in STARTING else {}
    return {"state": one.state.value} | progress


async def version(_: Request) -> Response:
    return _json({"version": __version__})


async def figures(request: Request) -> Response:
    services = _services(request)
    page = services.metrics.page(services.pool.collectors())
    return Response(page, media_type=metrics.CONTENT_TYPE)


async def models(request: Request) -> Response:
    services = _services(request)
    names = services.pool.registry.public_names()
    return _json(model_list([_card(services, name) for name in names]))


async def model(request: Request) -> Response:
    return _json(_card(_services(request), request.path_params["name"]))


async def openapi(_: Request) -> Response:
    from llmserve.http.openapi import document  # noqa: PLC0415  # needs vLLM's request classes: seconds

    return _json(await asyncio.to_thread(document, table()))


def _card(services: Services, name: str) -> dict[str, Any]:
    found = services.pool.registry.find(name)
    running = services.pool.models[found.name].running
    return model_card(name, found, services.created, running)


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services
