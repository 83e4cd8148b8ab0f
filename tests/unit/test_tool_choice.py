"""`allowed_tools` of chat completions and responses."""

from __future__ import annotations

from typing import Any

import pytest

from llmserve.api.endpoint_id import EndpointId
from llmserve.api.tool_choice import with_allowed_tools
from llmserve.errors import RequestError

CHAT, RESPONSES = EndpointId.CHAT_COMPLETIONS, EndpointId.RESPONSES
GO: dict[str, Any] = {"type": "function", "name": "go"}
STAY: dict[str, Any] = {"type": "custom", "name": "stay"}
OTHER: dict[str, Any] = {"type": "mcp", "server_label": "other"}
IN_CHAT: dict[str, Any] = {"type": "function", "function": {"name": "go"}}
LATER: dict[str, Any] = {"type": "function", "function": {"name": "later"}}


def choice(endpoint: EndpointId, **given: Any) -> dict[str, Any]:
    nested = {"allowed_tools": given} if endpoint is CHAT else given
    return {"type": "allowed_tools", **nested}


@pytest.mark.parametrize("mode", ["auto", "required"])
@pytest.mark.parametrize(
    ("endpoint", "tools", "allowed", "kinds"),
    [
        (CHAT, [IN_CHAT, LATER], [IN_CHAT], ["function"]),
        (RESPONSES, [GO | {"parameters": {}}, STAY, OTHER], [GO, OTHER], ["function", "mcp"]),
        (RESPONSES, [GO, STAY], [STAY, GO], ["function", "custom"]),
    ],
)
def test_allowed_tools_become_the_tools(
    endpoint: EndpointId, tools: list[Any], allowed: list[Any], kinds: list[str], mode: str
) -> None:
    body = {"tools": tools, "tool_choice": choice(endpoint, mode=mode, tools=allowed)}
    narrowed = with_allowed_tools(endpoint, body)
    assert narrowed["tool_choice"] == mode
    assert [each["type"] for each in narrowed["tools"]] == kinds
    assert body["tools"] is tools


@pytest.mark.parametrize("endpoint", EndpointId)
@pytest.mark.parametrize("given", [None, "auto", "required", GO, IN_CHAT, 5])
def test_other_choices_stay(endpoint: EndpointId, given: Any) -> None:
    body = {"tools": [GO], "tool_choice": given}
    assert with_allowed_tools(endpoint, body) is body


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES])
@pytest.mark.parametrize(
    ("given", "tools", "place"),
    [
        ({"mode": "none", "tools": [GO]}, [GO], "mode"),
        ({"tools": [GO]}, [GO], "mode"),
        ({"mode": 5, "tools": [GO]}, [GO], "mode"),
        ({"mode": "auto"}, [GO], "tools"),
        ({"mode": "auto", "tools": []}, [GO], "tools"),
        ({"mode": "auto", "tools": [5]}, [GO], "tools.0"),
        ({"mode": "auto", "tools": [GO, STAY]}, [GO], "tools.1"),
        ({"mode": "auto", "tools": [GO]}, None, None),
        ({"mode": "auto", "tools": [GO]}, [5], None),
    ],
)
def test_allowed_tools_that_are_wrong_are_refused(
    endpoint: EndpointId, given: dict[str, Any], tools: Any, place: str | None
) -> None:
    body = {"tools": tools, "tool_choice": choice(endpoint, **given)}
    with pytest.raises(RequestError) as caught:
        with_allowed_tools(endpoint, body)
    above = "tool_choice.allowed_tools." if endpoint is CHAT else "tool_choice."
    assert (caught.value.param or "").startswith("tools" if place is None else above + place)
    assert "None" not in caught.value.message
