"""OpenAI's `allowed_tools`, which vLLM does not have. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmserve.api.endpoint_id import EndpointId
from llmserve.errors import RequestError, quoted

if TYPE_CHECKING:
    from collections.abc import Iterator

_MODES = ("auto", "required")
_NAMES = ("name", "server_label")  # of a tool, beside its type


def with_allowed_tools(endpoint: EndpointId, body: dict[str, Any]) -> dict[str, Any]:
    """Return a body with the allowed tools only, and their mode as `tool_choice`.

    Raises RequestError for a tool that is not in `tools`.
    """
    choice, place = body.get("tool_choice"), "tool_choice"
    is_known = endpoint in (EndpointId.CHAT_COMPLETIONS, EndpointId.RESPONSES)
    if not is_known or not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
        return body
    if endpoint is EndpointId.CHAT_COMPLETIONS:
        choice, place = choice.get("allowed_tools"), "tool_choice.allowed_tools"
        if not isinstance(choice, dict):
            raise RequestError(f"`{place}` must be an object with `mode` and `tools`.", param=place)
    mode = choice.get("mode")
    if mode not in _MODES:
        came = f"is {quoted(mode, 40)}" if isinstance(mode, str) else "is no string"
        raise RequestError(
            f"`{place}.mode` must be {' or '.join(_MODES)}; it {came}.", param=f"{place}.mode"
        )
    given = list(_tools(body.get("tools"), "tools"))
    allowed = list(_tools(choice.get("tools"), f"{place}.tools"))
    for number, tool in enumerate(allowed):
        if all(_key(tool) != _key(each) for each in given):
            raise RequestError(
                f"`{place}.tools.{number}` is not in `tools`.", param=f"{place}.tools.{number}"
            )
    keys = [_key(tool) for tool in allowed]
    kept = [tool for tool in given if _key(tool) in keys]
    return body | {"tools": kept, "tool_choice": mode}


def _tools(given: Any, place: str) -> Iterator[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise RequestError(f"`{place}` must be a list of tools, not empty.", param=place)
    for number, tool in enumerate(given):
        if not isinstance(tool, dict):
            raise RequestError(f"`{place}.{number}` must be an object.", param=f"{place}.{number}")
        yield tool


def _key(tool: dict[str, Any]) -> tuple[Any, ...]:
    function = tool.get("function")  # of a chat's tools
    named = function if isinstance(function, dict) else tool
    return (tool.get("type"), *(named.get(name) for name in _NAMES))
