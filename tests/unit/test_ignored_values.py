"""Values that an endpoint would ignore."""

from __future__ import annotations

from typing import Any

import pytest

from llmserve.api.endpoint_id import EndpointId
from llmserve.api.ignored_values import check_values
from llmserve.errors import RequestError

CHAT, RESPONSES, MESSAGES = (
    EndpointId.CHAT_COMPLETIONS,
    EndpointId.RESPONSES,
    EndpointId.MESSAGES,
)
SCHEMA = {"type": "object"}


def formatted(**form: Any) -> dict[str, Any]:
    return {"response_format": form}


def text(**form: Any) -> dict[str, Any]:
    return {"text": {"format": form}}


def output(**form: Any) -> dict[str, Any]:
    return {"output_config": {"format": form}}


IN_FORMAT = "response_format.json_schema"
REFUSED: list[tuple[EndpointId, dict[str, Any], str]] = [
    (CHAT, formatted(type="json_schema"), IN_FORMAT),
    (EndpointId.COMPLETIONS, formatted(type="json_schema"), IN_FORMAT),
    (CHAT, formatted(type="json_schema", schema=SCHEMA), IN_FORMAT),
    (CHAT, formatted(type="json_schema", json_schema=5), IN_FORMAT),
    (CHAT, formatted(type="json_schema", json_schema={"name": "a"}), IN_FORMAT + ".schema"),
    (CHAT, formatted(type="json_schema", json_schema={"schema": SCHEMA}), IN_FORMAT + ".name"),
    (CHAT, formatted(type="json_object", schema=SCHEMA), "response_format.schema"),
    (CHAT, formatted(type="text", json_schema={"schema": SCHEMA}), IN_FORMAT),
    (RESPONSES, text(type="json_schema", name="a"), "text.format.schema"),
    (RESPONSES, text(type="json_object", schema=SCHEMA), "text.format.schema"),
    (MESSAGES, output(type="json_schema"), "output_config.format.schema"),
    (RESPONSES, {"input": ["a", {"type": "item_reference", "id": "m"}]}, "input.1"),
    (RESPONSES, {"input": [{"id": "m"}]}, "input.0"),
    (RESPONSES, {"input": [{"id": "m", "type": None}]}, "input.0"),
    (RESPONSES, {"tool_choice": {"type": "mcp", "server_label": "a"}}, "tool_choice.type"),
    (RESPONSES, {"tool_choice": {"type": "web_search_preview"}}, "tool_choice.type"),
    (MESSAGES, {"tool_choice": {"type": "any"}}, "tools"),
    (MESSAGES, {"tool_choice": {"type": "tool", "name": "a"}, "tools": []}, "tools"),
]


@pytest.mark.parametrize(("endpoint", "body", "param"), REFUSED)
def test_value_that_would_be_ignored_is_refused(
    endpoint: EndpointId, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        check_values(endpoint, body)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert "None" not in caught.value.message


WHOLE = {"name": "a", "schema": SCHEMA}


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (CHAT, {}),
        (CHAT, formatted(type="json_object")),
        (CHAT, formatted(type="json_schema", json_schema=WHOLE)),
        (CHAT, formatted(type="structural_tag", format={"schema": 1}, schema=SCHEMA)),
        (CHAT, {"response_format": "json"}),
        (CHAT, formatted(schema=SCHEMA)),
        (EndpointId.TRANSCRIPTIONS, {"response_format": "json"}),
        (RESPONSES, text(type="json_schema", **WHOLE)),
        (RESPONSES, {"text": "a", "input": 5, "tool_choice": {"type": 5}}),
        (RESPONSES, {"input": [{"role": "user", "content": "a"}], "tool_choice": "required"}),
        (RESPONSES, {"tool_choice": {"type": "function", "name": "a"}}),
        (MESSAGES, output(type="json_schema", schema=SCHEMA)),
        (MESSAGES, {"tool_choice": {"type": "any"}, "tools": [{"name": "a"}]}),
        (MESSAGES, {"tool_choice": {"type": "auto"}}),
    ],
)
def test_value_that_is_honoured_or_of_a_wrong_type_passes(
    endpoint: EndpointId, body: dict[str, Any]
) -> None:
    check_values(endpoint, body)
