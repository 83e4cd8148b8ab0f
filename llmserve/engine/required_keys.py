"""Keys that OpenAI's types, and clients of Anthropic's API, expect and vLLM's classes lack.

Sources: OpenAI's OpenAPI document, the Open Responses specification, Claude API reference.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from openai.types.responses import (
    ResponseFunctionToolCall,
    ResponseIncompleteEvent,
    ResponseOutputItemDoneEvent,
    ResponseOutputMessage,
    ResponseReasoningItem,
)
from vllm.entrypoints.openai.responses.protocol import ResponseCompletedEvent, ResponsesResponse

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

# Of a response, with what they are where vLLM says nothing.
_OF_RESPONSE: dict[str, Any] = {
    "completed_at": None,
    "error": None,
    "store": True,
    "safety_identifier": None,
    "prompt_cache_key": None,
    "top_logprobs": 0,
    "text": {"format": {"type": "text"}},
    "usage": None,
}
_OF_FUNCTION: dict[str, Any] = {"description": None, "parameters": None, "strict": None}
_OF_TEXT: dict[str, Any] = {"annotations": [], "logprobs": []}
_OF_MESSAGE: dict[str, Any] = {
    "container": None,
    "stop_details": None,
    "stop_reason": None,
    "stop_sequence": None,
}
_OF_USAGE: dict[str, Any] = {
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 0,
    "output_tokens_details": None,
    "server_tool_use": None,
}
_OF_WHOLE_USAGE: dict[str, Any] = _OF_USAGE | {
    "cache_creation": None,
    "inference_geo": None,
    "service_tier": None,
}
_OF_BLOCK: dict[str, dict[str, Any]] = {
    "text": {"citations": None},
    "tool_use": {"caller": {"type": "direct"}},
    "thinking": {"signature": ""},
}
_FAILED = {"code": "server_error", "message": "The response failed."}


class IncompleteEvent(ResponseIncompleteEvent):
    """The last event of a response that was cut off; vLLM has none."""

    response: ResponsesResponse


def of_chat(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer, or a chunk of one."""
    for choice in answer.get("choices") or ():
        if choice.get("logprobs") is not None:
            choice["logprobs"].setdefault("refusal", None)
        message = choice.get("message") or {}
        if message.get("tool_calls") and message.get("content") == "":
            message["content"] = None
    return answer


def of_message(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer of /v1/messages, or an event of one."""
    match answer.get("type"):
        case "message":
            _fill(answer, _OF_MESSAGE)
            _fill(answer.get("usage"), _OF_WHOLE_USAGE)
            for block in answer.get("content") or ():
                _fill_block(block)
        case "message_start":
            of_message(answer.get("message") or {})
        case "content_block_start":
            _fill_block(answer.get("content_block"))
        case "message_delta":
            _fill(answer.get("delta"), _OF_MESSAGE)
            _fill(answer.get("usage"), _OF_USAGE)
    return answer


def of_response(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer of /v1/responses, or an event of one."""
    if answer.get("object") == "response":
        _fill(answer, _OF_RESPONSE)
        if answer["status"] == "failed" and answer["error"] is None:
            answer["error"] = _FAILED
        for tool in answer["tools"]:
            _fill(tool, _OF_FUNCTION if tool.get("type") == "function" else {})
        for item in answer["output"]:
            _fill_parts(item)
    elif isinstance(answer.get("response"), dict):
        of_response(answer["response"])
    else:
        _fill_parts(answer.get("item"))
        _fill_text(answer.get("part"))
    return answer


def _fill_block(block: Any) -> None:
    if isinstance(block, dict):
        _fill(block, _OF_BLOCK.get(block.get("type", ""), {}))


def _fill_parts(item: Any) -> None:
    if isinstance(item, dict) and isinstance(item.get("content"), list):
        for part in item["content"]:
            _fill_text(part)


def _fill_text(part: Any) -> None:
    if isinstance(part, dict) and part.get("type") == "output_text":
        _fill(part, _OF_TEXT)


def _fill(given: Any, required: dict[str, Any]) -> None:
    if isinstance(given, dict):
        for key, value in required.items():
            given.setdefault(key, value)


def echo(response: ResponsesResponse, request: Any) -> None:
    """What a response repeats of its request, other than what vLLM repeats."""
    for name in ("store", "safety_identifier", "prompt_cache_key"):
        setattr(response, name, getattr(request, name, None))


def ended(response: ResponsesResponse) -> None:
    """What only the end of a response tells: when that was, and which item was cut off."""
    if response.status == "completed" and not hasattr(response, "completed_at"):
        response.completed_at = int(time.time())
    if response.status == "incomplete" and response.output:
        cut_off(response.output[-1])


def cut_off(item: Any) -> None:
    kinds = ResponseOutputMessage | ResponseFunctionToolCall | ResponseReasoningItem
    if isinstance(item, kinds) and item.status != "incomplete":
        item.status = "incomplete"


async def with_ends(
    events: AsyncGenerator[Any, None], request: Any = None
) -> AsyncGenerator[Any, None]:
    """The events of a response: one that was cut off ends as incomplete.

    The end of an item waits for the event after it, which vLLM makes in the same step.
    """
    held: Any = None
    async with contextlib.aclosing(events):
        async for event in events:
            if request is not None and hasattr(event, "response"):
                echo(event.response, request)
            last = _last(event, held) if isinstance(event, ResponseCompletedEvent) else event
            if held is not None:
                yield held
            held = last if isinstance(last, ResponseOutputItemDoneEvent) else None
            if held is None:
                yield last
        if held is not None:
            yield held


def _last(event: ResponseCompletedEvent, before: Any) -> ResponseCompletedEvent | IncompleteEvent:
    response = event.response
    ended(response)
    if response.status != "incomplete":
        return event
    if before is not None:
        cut_off(before.item)
    number = event.sequence_number
    return IncompleteEvent(type="response.incomplete", sequence_number=number, response=response)
