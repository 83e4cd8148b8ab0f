"""Values that vLLM would ignore, although they change what a client expects. Pure.

Types are checked later: a value of a wrong type passes here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmserve.api.endpoint_id import EndpointId
from llmserve.errors import RequestError, quoted

if TYPE_CHECKING:
    from collections.abc import Mapping

# The path of each endpoint's format; the key below it that has the schema, where one is between.
_FORMATS = {
    EndpointId.CHAT_COMPLETIONS: (("response_format",), "json_schema"),
    EndpointId.COMPLETIONS: (("response_format",), "json_schema"),
    EndpointId.RESPONSES: (("text", "format"), None),
    EndpointId.MESSAGES: (("output_config", "format"), None),
}
_CHOICES = ("function", "custom", "allowed_tools")  # objects as `tool_choice` of a response


def check_values(endpoint: EndpointId, body: Mapping[str, Any]) -> None:
    """Raises RequestError for a value that would be ignored."""
    if endpoint in _FORMATS:
        _check_format(body, *_FORMATS[endpoint])
    if endpoint is EndpointId.RESPONSES:
        _check_items(body.get("input"))
        _check_response_choice(body.get("tool_choice"))
    if endpoint is EndpointId.MESSAGES:
        _check_message_choice(body.get("tool_choice"), body.get("tools"))


def _check_format(body: Mapping[str, Any], path: tuple[str, ...], holder: str | None) -> None:
    """Require the schema of the type `json_schema`, and none of another type."""
    given: Any = body
    for key in path:
        given = given.get(key) if isinstance(given, dict) else None
    kind = given.get("type") if isinstance(given, dict) else None
    if not isinstance(kind, str) or kind == "structural_tag":
        return
    place = ".".join(path)
    if kind != "json_schema":
        for key in ("schema", "json_schema"):
            if given.get(key) is not None:
                raise RequestError(
                    f"`{place}.{key}` would be ignored: the type of `{place}` is "
                    f"{quoted(kind, 40)}. Use the type `json_schema`.",
                    param=f"{place}.{key}",
                )
        return
    if holder is not None:
        place, given = f"{place}.{holder}", given.get(holder)
        if given is not None and not isinstance(given, dict):
            raise RequestError(
                f"`{place}` must be an object with `name` and `schema`.", param=place
            )
    for key in ("name", "schema") if holder else ("schema",):
        if given is None or given.get(key) is None:
            where = place if given is None else f"{place}.{key}"
            raise RequestError(
                f"`{where}` is required: the type `json_schema` needs a schema.",
                param=where,
                code="missing_required_parameter",
            )


def _check_items(items: Any) -> None:
    for number, item in enumerate(items if isinstance(items, list) else ()):
        if not isinstance(item, dict):
            continue
        is_bare = item.keys() <= {"id", "type"} and item.get("type") is None and "id" in item
        if is_bare or item.get("type") == "item_reference":
            raise RequestError(
                f"`input.{number}` is a reference to an item, which is not supported. Send the "
                "item itself, or use `previous_response_id`.",
                param=f"input.{number}",
            )


def _check_response_choice(choice: Any) -> None:
    kind = choice.get("type") if isinstance(choice, dict) else None
    if isinstance(kind, str) and kind not in _CHOICES:
        raise RequestError(
            f"`tool_choice.type` must be {', '.join(_CHOICES[:-1])} or {_CHOICES[-1]}; it is "
            f"{quoted(kind, 40)}. Built-in tools are never called.",
            param="tool_choice.type",
        )


def _check_message_choice(choice: Any, tools: Any) -> None:
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind in ("any", "tool") and not tools:
        raise RequestError(f"`tool_choice` of type `{kind}` needs `tools`.", param="tools")
