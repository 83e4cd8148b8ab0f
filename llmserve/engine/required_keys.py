"""Adds keys that OpenAI's types and Anthropic's clients require and vLLM's classes lack.

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

# Keys of a response, with their values if vLLM sets none.
_RESPONSE: dict[str, Any] = {
    "completed_at": None,
    "error": None,
    "store": True,
    "safety_identifier": None,
    "prompt_cache_key": None,
    "top_logprobs": 0,
    "text": {"format": {"type": "text"}},
    "usage": None,
}
_FUNCTION: dict[str, Any] = {"description": None, "parameters": None, "strict": None}
_TEXT: dict[str, Any] = {"annotations": [], "logprobs": []}
_MESSAGE: dict[str, Any] = dict.fromkeys(
    ("container", "stop_details", "stop_reason", "stop_sequence")
)
_USAGE: dict[str, Any] = {
    **dict.fromkeys(("cache_creation_input_tokens", "cache_read_input_tokens"), 0),
    **dict.fromkeys(("output_tokens_details", "server_tool_use")),
}
_WHOLE_USAGE = _USAGE | dict.fromkeys(("cache_creation", "inference_geo", "service_tier"))
_BLOCKS: dict[str, dict[str, Any]] = {
    "text": {"citations": None},
    "tool_use": {"caller": {"type": "direct"}},
    "thinking": {"signature": ""},
}
_FAILED = {"code": "server_error", "message": "The response failed."}


class IncompleteEvent(ResponseIncompleteEvent):
    """The last event of a truncated response, which vLLM does not have."""

    response: ResponsesResponse


def complete_chat(answer: dict[str, Any]) -> dict[str, Any]:
    """Complete a chat answer or chunk."""
    for choice in answer.get("choices") or ():
        if choice.get("logprobs") is not None:
            choice["logprobs"].setdefault("refusal", None)
        message = choice.get("message") or {}
        if message.get("tool_calls") and message.get("content") == "":
            message["content"] = None
    return answer


def split_end(chunk: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a chat chunk as one with content and one with a `finish_reason`, if it has both.

    OpenAI's last chunk of a choice has an empty `delta`; vLLM's can have the last text or call.
    """
    choices = chunk.get("choices") or []
    if not any(choice.get("finish_reason") for choice in choices):
        return [chunk]
    ends = [_end_of(choice) for choice in choices]
    if not any(_has_content(choice) for choice in choices):
        return [chunk | {"choices": ends}]
    content = {key: value for key, value in chunk.items() if key != "system_fingerprint"}
    content["choices"] = [_content_of(choice) for choice in choices]
    return [content, chunk | {"choices": ends}]


def _has_content(choice: dict[str, Any]) -> bool:
    """Whether a choice has more than its end; a last token without text can have logprobs."""
    return any((*choice["delta"].values(), choice.get("logprobs"), choice.get("token_ids")))


def _content_of(choice: dict[str, Any]) -> dict[str, Any]:
    content = {key: value for key, value in choice.items() if key != "stop_reason"}
    return content | {"finish_reason": None}


def _end_of(choice: dict[str, Any]) -> dict[str, Any]:
    end = {key: value for key, value in choice.items() if key != "token_ids"}
    return end | {"delta": {}, "logprobs": None}


def complete_message(answer: dict[str, Any]) -> dict[str, Any]:
    """Complete an answer of /v1/messages, or an event of one."""
    match answer.get("type"):
        case "message":
            _fill(answer, _MESSAGE)
            _fill(answer.get("usage"), _WHOLE_USAGE)
            for block in answer.get("content") or ():
                _fill_block(block)
        case "message_start":
            complete_message(answer.get("message") or {})
        case "content_block_start":
            _fill_block(answer.get("content_block"))
        case "message_delta":
            _fill(answer.get("delta"), _MESSAGE)
            _fill(answer.get("usage"), _USAGE)
    return answer


def complete_response(answer: dict[str, Any]) -> dict[str, Any]:
    """Complete an answer of /v1/responses, or an event of one."""
    if answer.get("object") == "response":
        _fill(answer, _RESPONSE)
        if answer["status"] == "failed" and answer["error"] is None:
            answer["error"] = _FAILED
        for tool in answer["tools"]:
            _fill(tool, _FUNCTION if tool.get("type") == "function" else {})
        for item in answer["output"]:
            _fill_parts(item)
    elif isinstance(answer.get("response"), dict):
        complete_response(answer["response"])
    else:
        _fill_parts(answer.get("item"))
        _fill_text(answer.get("part"))
    return answer


def _fill_block(block: Any) -> None:
    if isinstance(block, dict):
        _fill(block, _BLOCKS.get(block.get("type", ""), {}))


def _fill_parts(item: Any) -> None:
    if isinstance(item, dict) and isinstance(item.get("content"), list):
        for part in item["content"]:
            _fill_text(part)


def _fill_text(part: Any) -> None:
    if isinstance(part, dict) and part.get("type") == "output_text":
        _fill(part, _TEXT)


def _fill(given: Any, required: dict[str, Any]) -> None:
    if isinstance(given, dict):
        for key, value in required.items():
            given.setdefault(key, value)


def echo_request(response: ResponsesResponse, request: Any) -> None:
    """Copy the request's fields that vLLM does not copy into a response."""
    for name in ("store", "safety_identifier", "prompt_cache_key"):
        setattr(response, name, getattr(request, name, None))
    for name, value in getattr(request, "echoed", {}).items():
        setattr(response, name, value)


def complete_end(response: ResponsesResponse) -> None:
    """Set what is known at the end of a response: its time, and the truncated item."""
    if response.status == "completed" and not hasattr(response, "completed_at"):
        response.completed_at = int(time.time())
    if response.status == "incomplete" and response.output:
        _mark_incomplete(response.output[-1])


def _mark_incomplete(item: Any) -> None:
    kinds = ResponseOutputMessage | ResponseFunctionToolCall | ResponseReasoningItem
    if isinstance(item, kinds) and item.status != "incomplete":
        item.status = "incomplete"


async def complete_events(
    events: AsyncGenerator[Any, None], request: Any = None
) -> AsyncGenerator[Any, None]:
    """Yield the events of a response; a truncated one ends as incomplete.

    The end of an item is held until the next event, which vLLM creates in the same step.
    """
    held: Any = None
    async with contextlib.aclosing(events):
        async for event in events:
            if request is not None and hasattr(event, "response"):
                echo_request(event.response, request)
            last = _last_event(event, held) if isinstance(event, ResponseCompletedEvent) else event
            if held is not None:
                yield held
            held = last if isinstance(last, ResponseOutputItemDoneEvent) else None
            if held is None:
                yield last
        if held is not None:
            yield held


def _last_event(
    event: ResponseCompletedEvent, before: Any
) -> ResponseCompletedEvent | IncompleteEvent:
    response = event.response
    complete_end(response)
    if response.status != "incomplete":
        return event
    if before is not None:
        _mark_incomplete(before.item)
    number = event.sequence_number
    return IncompleteEvent(type="response.incomplete", sequence_number=number, response=response)
