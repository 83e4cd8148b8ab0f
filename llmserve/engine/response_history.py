"""The conversation that a request of /v1/responses continues.

vLLM creates messages from the texts of the previous response, without its tool calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openai.types.responses import ResponseOutputMessage, ResponseReasoningItem

if TYPE_CHECKING:
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses


def keep_tool_calls(handler: OpenAIServingResponses) -> None:
    """Make the handler treat the output of a previous response as input of the client.

    The Harmony messages of gpt-oss have the calls already.
    """
    if handler.use_harmony:
        return
    render = handler._render_resolved_response_inputs  # noqa: SLF001  # no public name of it

    async def rendered(request: Any, previous: Any, **more: Any) -> Any:
        if previous is None:
            return await render(request, previous, **more)
        given = request.input  # restored, while a parser may set other fields
        request.input = [*filter(_is_kept, previous.output), *_items(given)]
        try:
            return await render(request, previous.model_copy(update={"output": []}), **more)
        finally:
            request.input = given

    vars(handler)["_render_resolved_response_inputs"] = rendered


def _is_kept(item: Any) -> bool:
    """Whether an output item becomes input: not reasoning, as in vLLM, and no message without text."""
    if isinstance(item, ResponseOutputMessage):
        return bool(item.content)
    return not isinstance(item, ResponseReasoningItem)


def _items(given: Any) -> list[Any]:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given
