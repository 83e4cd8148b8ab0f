"""Keys that an endpoint would ignore."""

from __future__ import annotations

from typing import Any

import pytest

from llmserve.api.endpoint_id import EndpointId
from llmserve.api.unsupported_keys import UNSUPPORTED, check_supported
from llmserve.errors import RequestError

FORMAT = {"type": "json_schema", "schema": {"type": "object"}}
CASES = [(endpoint, key) for endpoint, keys in UNSUPPORTED.items() for key in keys]


def body_with(key: str) -> dict[str, Any]:
    return {key: {"format": FORMAT} if key in {"text", "output_config"} else FORMAT}


@pytest.mark.parametrize(("endpoint", "key"), CASES)
def test_unsupported_key_names_its_successor(endpoint: EndpointId, key: str) -> None:
    with pytest.raises(RequestError, match="is not supported here; use `") as caught:
        check_supported(endpoint, body_with(key))
    assert caught.value.param == key
    assert caught.value.status == 400


@pytest.mark.parametrize("endpoint", EndpointId)
@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": {"format": {"type": "text"}, "verbosity": "low"}},
        {"text": "a"},
        {"output_config": {"effort": "low"}},
        {"response_format": {"type": "text"}},
        {"functions": None, "conversation": None},
    ],
)
def test_supported_bodies_are_taken(endpoint: EndpointId, body: dict[str, Any]) -> None:
    check_supported(endpoint, body)
