"""The model of a request, and the model list of clients."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from llmserve.errors import RequestError

if TYPE_CHECKING:
    from llmserve.lifecycle.replica import Running
    from llmserve.registry.names import ModelNames
    from llmserve.registry.spec import ModelSpec


def requested_model(body: dict[str, Any], registry: ModelNames) -> str:
    """Return the model name of a body; it is optional if there is one model.

    Raises RequestError if the name is missing or not a string.
    """
    name = body.get("model")
    if isinstance(name, str) and name:
        return name
    if name in (None, "") and len(registry.models) == 1:
        return registry.models[0].name
    known = sorted(registry.public_names())
    came = "is missing" if name in (None, "") else f"must be a string, not {type(name).__name__}"
    raise RequestError(
        f"`model` {came}; models here: {', '.join(known)}.",
        param="model",
        code="missing_required_parameter" if name in (None, "") else "invalid_type",
    )


def model_card(
    name: str, model: ModelSpec, created: int, running: Running | None
) -> dict[str, Any]:
    """Return an entry of GET /v1/models: fields of OpenAI, Anthropic and llmserve.

    `endpoints` and `max_model_len` are absent until the model has run.
    """
    card: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "llmserve",
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(created, UTC).isoformat(),
        "lifecycle": "active",
    }
    if name in model.loras:
        card["parent"] = model.name
    if running is not None:
        card["max_model_len"] = running.max_model_len
        card["endpoints"] = sorted(running.endpoints)
    return card


def model_list(cards: list[dict[str, Any]]) -> dict[str, Any]:
    """Return all entries as one page, for clients of OpenAI and Anthropic."""
    ids = [card["id"] for card in cards] or [None]
    page = {"first_id": ids[0], "last_id": ids[-1], "has_more": False}
    return {"object": "list", "data": cards, **page}
