"""Keys that an endpoint would ignore, although they change what a client expects. Pure.

They belong to another endpoint or to an earlier API, and have a successor. Ignored, a constraint
or a forced call would be lost without an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmserve.api.endpoint_id import EndpointId
from llmserve.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

_GUIDED = dict.fromkeys(
    ("guided_json", "guided_regex", "guided_choice", "guided_grammar"), "structured_outputs"
)
_FUNCTIONS = {"functions": "tools", "function_call": "tool_choice"}
_OTHER_FORMATS = dict.fromkeys(("text", "output_format", "output_config"), "response_format")
# The key to use instead of an unsupported one, by endpoint.
UNSUPPORTED: Mapping[EndpointId, Mapping[str, str]] = {
    EndpointId.CHAT_COMPLETIONS: {**_GUIDED, **_FUNCTIONS, **_OTHER_FORMATS},
    EndpointId.COMPLETIONS: {**_GUIDED, **_OTHER_FORMATS},
    EndpointId.RESPONSES: {
        **_GUIDED,
        **_FUNCTIONS,
        "response_format": "text.format",
        "output_format": "text.format",
        "output_config": "text.format",
        "conversation": "previous_response_id",
    },
    EndpointId.MESSAGES: {
        **dict.fromkeys(_GUIDED, "output_config.format"),
        **dict.fromkeys(("structured_outputs", "response_format"), "output_config.format"),
        **dict.fromkeys(("output_format", "text"), "output_config.format"),
    },
}
_HOLDERS = ("text", "output_config")  # objects with more than a `format`


def check_supported(endpoint: EndpointId, body: Mapping[str, Any]) -> None:
    """Raises RequestError for a key that would be ignored, with the key to use instead."""
    unsupported = UNSUPPORTED.get(endpoint)
    if unsupported is None or unsupported.keys().isdisjoint(body):
        return
    for key, successor in unsupported.items():
        value = body.get(key)
        if key in _HOLDERS:
            value = value.get("format") if isinstance(value, dict) else None
        if value is not None and not _is_plain_text(value):
            raise RequestError(f"`{key}` is not supported here; use `{successor}`.", param=key)


def _is_plain_text(value: Any) -> bool:
    """Whether a format asks for what an answer is without it."""
    return isinstance(value, dict) and value.get("type") == "text"
