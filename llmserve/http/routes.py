"""The route table, and the routes of the server besides inference and /admin."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field
from starlette.responses import Response
from starlette.routing import Route

from llmserve import __version__, metrics
from llmserve.api.context import RequestContext
from llmserve.api.endpoints import ENDPOINTS, json_response
from llmserve.errors import RouteNotFound, quoted
from llmserve.http import admin
from llmserve.http.body import validate_fields
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
    """Return all routes."""
    inference = [
        Route(path, InferenceEndpoint(endpoint), methods=["POST"], name=endpoint.id)
        for endpoint in ENDPOINTS
        for path in endpoint.paths
    ]
    return [
        Route("/health", health),
        Route("/ready", ready),
        Route("/version", version),
        Route("/metrics", metrics_page),
        Route("/openapi.json", openapi),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/responses/{response_id}", fetch_response),
        Route("/v1/responses/{response_id}", delete_response, methods=["DELETE"]),
        Route("/v1/responses/{response_id}/cancel", cancel_response, methods=["POST"]),
        *admin.table(),
        *inference,
    ]


# --- stored responses


async def fetch_response(request: Request) -> Response:
    """Return a stored answer of /v1/responses, of any model."""
    query = validate_fields(_Fetch, request.query_params)
    stored, response_id = _stored(request)
    return stored.fetch(response_id, stream=query.stream, starting_after=query.starting_after)


class _Fetch(BaseModel):
    """The query parameters of a stored response."""

    stream: bool = False
    starting_after: Annotated[int, Field(ge=0)] | None = None


async def delete_response(request: Request) -> Response:
    """Delete a stored answer, and cancel it if it runs in the background."""
    stored, response_id = _stored(request)
    await stored.delete(response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


async def cancel_response(request: Request) -> Response:
    stored, response_id = _stored(request)
    return await stored.cancel(response_id)


def _stored(request: Request) -> tuple[ResponseStore, str]:
    """Return the store and the id of the path. Raises RouteNotFound, also for other owners."""
    response_id = request.path_params["response_id"]
    owner = RequestContext.of(request.scope).owner
    for served in _services(request).pool.models.values():
        if served.responses.has(response_id, owner):
            return served.responses, response_id
    raise RouteNotFound(
        f"There is no stored response {quoted(response_id)}.", param="response_id", code="not_found"
    )


# --- the server


async def health(_: Request) -> Response:
    """Return 200 from a running process, whatever the state of its models."""
    return json_response({"status": "ok"})


async def ready(request: Request) -> Response:
    """Return the state of each model, and 200 if all are ready or start on demand, else 503."""
    served = _services(request).pool.models.values()
    states = {each.name: _model_state(each) for each in served}
    all_ready = all(each.ready or each.queues_requests for each in served)
    return json_response({"ready": all_ready, "models": states}, 200 if all_ready else 503)


def _model_state(served: ServedModel) -> dict[str, Any]:
    """Return the state of a model, and of its replicas if there are several."""
    replicas = [_state_of(replica) for replica in served.replicas]
    return _state_of(served) | ({"replicas": replicas} if len(replicas) > 1 else {})


def _state_of(one: ServedModel | Replica) -> dict[str, str]:
    """Return the state and the progress of a start. Causes of failures are for the operator."""
    progress = {"note": one.note} if one.note and one.state in STARTING else {}
    return {"state": one.state.value} | progress


async def version(_: Request) -> Response:
    return json_response({"version": __version__})


async def metrics_page(request: Request) -> Response:
    services = _services(request)
    page = services.metrics.page(services.pool.collectors())
    return Response(page, media_type=metrics.CONTENT_TYPE)


async def models(request: Request) -> Response:
    services = _services(request)
    names = services.pool.registry.public_names()
    return json_response(model_list([_card(services, name) for name in names]))


async def model(request: Request) -> Response:
    return json_response(_card(_services(request), request.path_params["name"]))


async def openapi(_: Request) -> Response:
    from llmserve.http.openapi import document  # noqa: PLC0415  # needs vLLM's request classes: seconds

    return json_response(await asyncio.to_thread(document, table()))


def _card(services: Services, name: str) -> dict[str, Any]:
    found = services.pool.registry.find(name)
    running = services.pool.models[found.name].running
    return model_card(name, found, services.created, running)


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services
