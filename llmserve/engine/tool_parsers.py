"""vLLM's tool parsers, changed so that arguments are always JSON objects.

The constraint of a forced call enforces the tool's parameters, also without `strict`. A parser of
JSON between tags reads calls with `tool_call_text`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from openai.types.responses import CustomTool, FunctionTool, NamespaceTool
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
from vllm.tool_parsers.granite4_tool_parser import Granite4ToolParser
from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser
from vllm.tool_parsers.utils import get_function_tools
from vllm.utils.mistral import is_mistral_tool_parser

from llmserve.engine.structured_output.subschema import ARGUMENTS
from llmserve.engine.tool_call_text import Call, Calls

if TYPE_CHECKING:
    from collections.abc import Iterator

_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_UNCONSTRAINING = frozenset({"type", "title", "description", "$schema"})


def replace_parsers(state: Any) -> None:
    """Replace the tool parsers of a model's handlers."""
    for parser in _parsers(state):
        if parser.tool_parser_cls is not None:
            parser.tool_parser_cls = with_object_arguments(parser.tool_parser_cls)


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


def with_object_arguments(parser: type[ToolParser]) -> type[ToolParser]:
    """Return a subclass of a parser; Mistral's parser, with a grammar of its own, is unchanged."""
    if issubclass(parser, ObjectArguments) or is_mistral_tool_parser(parser):
        return parser
    own = (TaggedCalls,) if issubclass(parser, Hermes2ProToolParser | Granite4ToolParser) else ()
    made = type(parser.__name__, (*own, ObjectArguments, parser), {})
    return cast("type[ToolParser]", made)


class ObjectArguments(ToolParser):
    """Constrains the arguments of calls as if each tool were `strict`.

    For a tool that is not strict, unsupported keywords of its parameters are ignored.
    """

    def get_structural_tag(self, request: Any, **more: Any) -> Any:
        tools = [_constrained(each, is_nested=False) for each in _functions(request.tools)]
        return super().get_structural_tag(request.model_copy(update={"tools": tools}), **more)

    def adjust_request(self, request: Any) -> Any:
        given = request.tools
        if given:
            request.tools = [_constrained(each, is_nested=True) for each in _functions(given)]
        try:
            return super().adjust_request(request)
        finally:
            request.tools = given

    def get_remaining_unstreamed_args(self) -> str:
        """Return nothing for a call truncated before its arguments, where vLLM returns `{}`."""
        is_begun = bool(self.prev_tool_call_arr) and "arguments" in self.prev_tool_call_arr[-1]
        return super().get_remaining_unstreamed_args() if is_begun else ""


def _functions(tools: list[Any]) -> list[Any]:
    """Return the tools with custom tools and namespaces as functions, as vLLM shows them."""
    found: list[Any] = []
    for tool in tools:
        is_shown_as_function = isinstance(tool, CustomTool | NamespaceTool)
        found += get_function_tools([tool]) if is_shown_as_function else [tool]
    return found


def has_calls(tools: list[Any]) -> bool:
    """Whether a model may call one of the tools of a response."""
    return bool(get_function_tools(tools))


def _constrained(tool: Any, *, is_nested: bool) -> Any:
    """Return a tool whose parameters are a separate document for `json_schema`.

    vLLM's tags contain the parameters unchanged. In a schema of several tools vLLM would move
    their `$defs`, so there they are nested.
    """
    if isinstance(tool, ChatCompletionToolsParam):
        return tool.model_copy(
            update={"function": _constrained(tool.function, is_nested=is_nested)}
        )
    if not isinstance(tool, FunctionTool) and not hasattr(tool, "parameters"):
        return tool
    own = {"type": "object"} | (tool.parameters or {})
    if own["type"] == "object" and own.keys() <= _UNCONSTRAINING:
        own |= _NO_ARGUMENTS
    own[ARGUMENTS] = tool.strict is True
    parameters = {"type": "object", "allOf": [own]} if is_nested else own
    return tool.model_copy(update={"parameters": parameters, "strict": True})


class TaggedCalls(ToolParser):
    """Reads JSON calls between tags. Streamed arguments are the model's text.

    Text that turns out to be no call is content.
    """

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._calls = self._new_reader()
        self._read = 0  # characters that are content, or belong to finished calls
        self._tools: dict[int, int] = {}  # indices of the calls that were announced
        self._finished = 0  # calls
        self._is_after_call = False  # where text is dropped, as in vLLM
        self._is_forced = False

    def _new_reader(self) -> Calls:
        names = ("tool_call_start_token", "tool_call_end_token")
        own = names if hasattr(self, names[0]) else ("tc_start", "tc_end")
        return Calls(*(getattr(self, name) for name in own))

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        calls = self._new_reader()
        calls.feed(model_output)
        calls.finish()
        found = calls.found
        if not found or any(call.is_broken for call in found):
            return ExtractedToolCallInformation(
                tools_called=False, tool_calls=[], content=model_output
            )
        return ExtractedToolCallInformation(
            tools_called=True,
            tool_calls=[
                ToolCall(function=FunctionCall(name=call.name, arguments=call.arguments))
                for call in found
            ],
            content=model_output[: found[0].begin] or None,
        )

    def extract_tool_calls_streaming(
        self, previous_text: str, current_text: str, delta_text: str, *arguments: Any
    ) -> DeltaMessage | None:
        self.engine_based_streaming = True  # of this stream: vLLM then calls `finish_streaming`
        self._is_forced = arguments[-1].tool_choice not in ("auto", "none", None)
        self._calls.feed(delta_text)
        return self._new_delta()

    def finish_streaming(self) -> DeltaMessage | None:
        """Return the text at the end of a stream that is no call."""
        self._calls.finish()
        return self._new_delta()

    def _new_delta(self) -> DeltaMessage | None:
        content = ""
        deltas: list[DeltaToolCall] = []
        for number in range(self._finished, len(self._calls.found)):
            call = self._calls.found[number]
            content += self._text_until(call.begin)
            if number in self._tools or (not call.is_broken and self._is_certain(call)):
                deltas += self._new_deltas(number, call)
                self._is_after_call = True
            if call.end is not None:
                if call.is_broken and number not in self._tools:
                    self._is_after_call = False
                content += self._text_until(call.end)
                self._finished = number + 1
        content += self._text_until(self._calls.outside_end)
        if not content and not deltas:
            return None
        return DeltaMessage(content=content or None, tool_calls=deltas)

    def _text_until(self, end: int) -> str:
        """Return the text up to `end` that is content."""
        text = "" if self._is_after_call else self._calls.text[self._read : end]
        self._read = max(self._read, end)
        return text

    def _is_certain(self, call: Call) -> bool:
        """Whether a call with this beginning has arguments: a forced one is constrained."""
        return call.name is not None and (call.arguments is not None or self._is_forced)

    def _new_deltas(self, number: int, call: Call) -> Iterator[DeltaToolCall]:
        """Yield the new parts of a call."""
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
