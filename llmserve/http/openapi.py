"""The document of GET /openapi.json, with vLLM's request classes."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from llmserve import __version__
from llmserve.api.endpoints import ENDPOINTS
from llmserve.engine.endpoint_handlers import HANDLERS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.routing import Route

    from llmserve.api.endpoint_id import EndpointId

_REF = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(routes: Iterable[Route]) -> dict[str, Any]:
    """Return the OpenAPI document of the routes."""
    bodies, components = _schemas()
    by_path = {path: endpoint for endpoint in ENDPOINTS for path in endpoint.paths}
    paths: dict[str, Any] = {}
    for route in routes:
        path, endpoint = route.path, by_path.get(route.path)
        methods = sorted((route.methods or set()) - {"HEAD"})
        operation: dict[str, Any] = {"responses": _responses()}
        if route.param_convertors:
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in route.param_convertors
            ]
        operation["summary"] = endpoint.title if endpoint else _summary(route)
        if endpoint is not None:
            media = "multipart/form-data" if endpoint.multipart else "application/json"
            operation["requestBody"] = {
                "required": True,
                "content": {media: {"schema": bodies[endpoint.id]}},
            }
        of_path = paths.setdefault(path.replace(":path", ""), {})
        of_path.update({method.lower(): operation for method in methods})
    return {
        "openapi": "3.1.0",
        "info": {"title": "llmserve", "version": __version__},
        "paths": paths,
        "components": {"schemas": components | {"Error": _ERROR}},
    }


def _responses() -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "200": {"description": "The answer."},
        "default": {"description": "An error.", "content": error},
    }


def _summary(route: Route) -> str:
    return route.name.replace("_", " ")


@cache
def _schemas() -> tuple[dict[EndpointId, Any], dict[str, Any]]:
    """Return the schema of each endpoint's body, and the definitions that they refer to."""
    inputs: list[tuple[EndpointId, Any, TypeAdapter[Any]]] = [
        (each, "validation", handler.request) for each, handler in HANDLERS.items()
    ]
    bodies, components = TypeAdapter.json_schemas(inputs, ref_template=_REF)
    return {key[0]: schema for key, schema in bodies.items()}, components.get("$defs", {})
