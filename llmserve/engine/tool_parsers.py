"""vLLM's tool parsers with arguments that are JSON objects.

The constraint of a forced call holds the arguments to the tool's parameters, also without
`strict`. A parser of JSON between tags reads calls with `calltext`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from openai.types.responses import FunctionTool
from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionToolsParam
from vllm.renderers.chat_utils import make_tool_call_id
from vllm.tool_parsers.abstract_tool_parser import ToolParser
from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser
from vllm.utils.mistral import is_mistral_tool_parser

from llmserve.engine.structured_output.subschema import ARGUMENTS
from llmserve.engine.tool_call_text import Call, Calls

if TYPE_CHECKING:
    from collections.abc import Iterator

_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_UNSAYING = frozenset({"type", "title", "description", "$schema"})


def mend_parsers(state: Any) -> None:
    """Exchange the tool parsers of a model's serving objects."""
    for parser in _parsers(state):
        if parser.tool_parser_cls is not None:
            parser.tool_parser_cls = mended(parser.tool_parser_cls)


def _parsers(state: Any) -> Iterator[Any]:
    for owner in (
        "openai_serving_chat",
        "openai_serving_responses",
        "anthropic_serving_messages",
    ):
        serving = getattr(state, owner, None)
        renderer = getattr(serving, "online_renderer", None)
        for holder, name in ((serving, "parser_cls"), (serving, "parser"), (renderer, "parser")):
            if (parser := getattr(holder, name, None)) is not None:
                yield parser


def mended(parser: type[ToolParser]) -> type[ToolParser]:
    """Mistral's parser has a grammar of its own, in which arguments are objects."""
    if issubclass(parser, ObjectArguments) or is_mistral_tool_parser(parser):
        return parser
    own = (TaggedCalls,) if issubclass(parser, Hermes2ProToolParser) else ()
    made = type(parser.__name__, (*own, ObjectArguments, parser), {})
    return cast("type[ToolParser]", made)


class ObjectArguments(ToolParser):
    """Constrains the arguments of calls as if each tool were `strict`.

    What of the parameters cannot be honoured is left out for a tool that is not.
    """

    def get_structural_tag(self, request: Any, **more: Any) -> Any:
        tools = [_held(each, is_nested=False) for each in request.tools]
        return super().get_structural_tag(request.model_copy(update={"tools": tools}), **more)

    def adjust_request(self, request: Any) -> Any:
        given = request.tools
        if given:
            request.tools = [_held(each, is_nested=True) for each in given]
        try:
            return super().adjust_request(request)
        finally:
            request.tools = given

    def get_remaining_unstreamed_args(self) -> str:
        """vLLM would add `{}` to a call that is cut off before its arguments."""
        is_begun = bool(self.prev_tool_call_arr) and "arguments" in self.prev_tool_call_arr[-1]
        return super().get_remaining_unstreamed_args() if is_begun else ""


def _held(tool: Any, *, is_nested: bool) -> Any:
    """A tool whose parameters are a document of their own for `llmserve.engine.structured_output.json_schema`.

    vLLM's tags take the parameters as they are; where it puts them into a schema of
    several tools it would take `$defs` out of them.
    """
    if isinstance(tool, ChatCompletionToolsParam):
        return tool.model_copy(update={"function": _held(tool.function, is_nested=is_nested)})
    if not isinstance(tool, FunctionTool) and not hasattr(tool, "parameters"):
        return tool
    own = {"type": "object"} | (tool.parameters or {})
    if own["type"] == "object" and own.keys() <= _UNSAYING:
        own |= _NO_ARGUMENTS
    own[ARGUMENTS] = tool.strict is True
    parameters = {"type": "object", "allOf": [own]} if is_nested else own
    return tool.model_copy(update={"parameters": parameters, "strict": True})


class TaggedCalls(Hermes2ProToolParser):
    """Calls between tags. Streamed arguments are the text that the model wrote."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._calls = self._reader()
        self._sent = 0  # characters of the content
        self._tools: dict[int, int] = {}  # the index of each call that was announced
        self._shown = 0  # calls that are done with

    def _reader(self) -> Calls:
        return Calls(self.tool_call_start_token, self.tool_call_end_token)

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        calls = self._reader()
        calls.feed(model_output)
        calls.finish()
        found = calls.found
        if not found or any(call.is_broken or not call.is_complete for call in found):
            return ExtractedToolCallInformation(
                tools_called=False, tool_calls=[], content=model_output
            )
        return ExtractedToolCallInformation(
            tools_called=True,
            tool_calls=[
                ToolCall(function=FunctionCall(name=call.name, arguments=call.arguments))
                for call in found
            ],
            content=calls.content or None,
        )

    def extract_tool_calls_streaming(
        self, previous_text: str, current_text: str, delta_text: str, *arguments: Any
    ) -> DeltaMessage | None:
        request = arguments[-1]
        self._calls.feed(delta_text)
        content = self._calls.content[self._sent :]
        self._sent = len(self._calls.content)
        deltas: list[DeltaToolCall] = []
        for number in range(self._shown, len(self._calls.found)):
            call = self._calls.found[number]
            if call.is_broken and number not in self._tools:
                content += call.raw
            elif number in self._tools or _is_certain(call, request):
                deltas += self._written(number, call)
            if call.raw:
                self._shown = number + 1
        if not content and not deltas:
            return None
        return DeltaMessage(content=content or None, tool_calls=deltas)

    def _written(self, number: int, call: Call) -> Iterator[DeltaToolCall]:
        """What is new of a call."""
        if number not in self._tools:
            self._tools[number] = index = len(self._tools)
            self.prev_tool_call_arr.append({"name": call.name, "arguments": ""})
            self.streamed_args_for_tool.append("")
            yield DeltaToolCall(
                index=index,
                type="function",
                id=make_tool_call_id(),
                function=DeltaFunctionCall(name=call.name, arguments=""),
            )
        index = self._tools[number]
        sent = self.streamed_args_for_tool[index]
        text = call.arguments or ""
        if len(text) > len(sent):
            self.streamed_args_for_tool[index] = text
            self.prev_tool_call_arr[index]["arguments"] = text
            added = DeltaFunctionCall(arguments=text[len(sent) :])
            yield DeltaToolCall(index=index, function=added)


def _is_certain(call: Call, request: Any) -> bool:
    """Whether a call that begins like this has arguments: a forced one is constrained."""
    is_forced = request.tool_choice not in ("auto", "none", None)
    return call.name is not None and (call.arguments is not None or is_forced)
