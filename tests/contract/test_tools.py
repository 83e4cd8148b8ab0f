"""Calls of tools through our routes, vLLM's front end and the real compilers.

The engine core is the fake one, and answers with the text that a test gives it.
"""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import xgrammar as xgr
from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from llmserve.engine.structured_output.compiler_process import constraints_of_tag
from llmserve.engine.structured_output.json_schema import rewrite_schema
from llmserve.engine.structured_output.subschema import ARGUMENTS
from llmserve.engine.tool_parsers import with_object_arguments
from tests.contract.grammar_texts import texts, tokenizer
from tests.contract.support import CHAT, CHATS, HELLO, events, post, running

if TYPE_CHECKING:
    from llmserve.http.services import Services

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@cache
def ids(text: str) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(str(CHAT))
    return [*tokenizer.encode(text), tokenizer.eos_token_id]


def function(parameters: Any, **more: Any) -> dict[str, Any]:
    given = {} if parameters is None else {"parameters": parameters}
    return {"type": "function", "function": {"name": "go", **given, **more}}


NAMED = {"type": "function", "function": {"name": "go"}}


def request(path: str, parameters: Any, choice: Any, answer: str, **more: Any) -> dict[str, Any]:
    """The body of a route with one tool; `choice` is auto, required or named."""
    body: dict[str, Any] = {"vllm_xargs": {"answer": ids(answer)}, **more}
    if path == CHATS:
        body |= {"messages": HELLO, "tools": [function(parameters)], "max_tokens": 200}
        body["tool_choice"] = NAMED if choice == "named" else choice
    elif path == RESPONSES:
        tool = {"type": "function", "name": "go", "parameters": parameters}
        body |= {"input": "hi", "tools": [tool], "max_output_tokens": 200}
        named = {"type": "function", "name": "go"}
        body["tool_choice"] = named if choice == "named" else choice
    else:
        tool = {"name": "go", "input_schema": parameters or {}}
        kinds = {"auto": "auto", "required": "any", "named": "tool"}
        body |= {"messages": HELLO, "tools": [tool], "max_tokens": 200}
        body["tool_choice"] = {"type": kinds[choice]} | (
            {"name": "go"} if choice == "named" else {}
        )
    return body | more


async def calls(services: Services, path: str, body: dict[str, Any]) -> list[tuple[str, str]]:
    """The name and the arguments of each call in an answer."""
    reply = await post(services, path, **body)
    assert reply.status_code == 200, reply.text
    read = {CHATS: _of_chat, RESPONSES: _of_response, MESSAGES: _of_message}[path]
    return read(reply.text, streamed=bool(body.get("stream")))


def _of_chat(text: str, *, streamed: bool) -> list[tuple[str, str]]:
    if not streamed:
        found = json.loads(text)["choices"][0]["message"].get("tool_calls") or []
        return [(each["function"]["name"], each["function"]["arguments"]) for each in found]
    calls: dict[int, list[str]] = {}
    for event in events(text)[:-1]:
        for choice in event["choices"]:
            for delta in choice["delta"].get("tool_calls", []):
                call = calls.setdefault(delta["index"], ["", ""])
                call[0] += delta["function"].get("name") or ""
                call[1] += delta["function"].get("arguments") or ""
    return [(name, arguments) for name, arguments in calls.values()]


def _of_response(text: str, *, streamed: bool) -> list[tuple[str, str]]:
    if streamed:
        (response,) = [
            each["response"] for each in events(text) if each["type"] == "response.completed"
        ]
    else:
        response = json.loads(text)
    found = [each for each in response["output"] if each["type"] == "function_call"]
    return [(each["name"], each["arguments"]) for each in found]


def _of_message(text: str, *, streamed: bool) -> list[tuple[str, str]]:
    if not streamed:
        blocks = json.loads(text)["content"]
        found = [each for each in blocks if each["type"] == "tool_use"]
        return [(each["name"], json.dumps(each["input"])) for each in found]
    names: list[str] = []
    parts: list[str] = []
    for event in events(text):
        if event.get("content_block", {}).get("type") == "tool_use":
            names.append(event["content_block"]["name"])
            parts.append("")
        if event.get("delta", {}).get("type") == "input_json_delta":
            parts[-1] += event["delta"]["partial_json"]
    return list(zip(names, parts, strict=True))


async def sent(services: Services) -> Any:
    """The constraint that the engine core got."""
    core = running(services).engine.client.engine_core
    last = await core.call_utility_async("last_request")
    return last["json"] or last["structural_tag"]


def call(arguments: str) -> str:
    return '<tool_call>\n{"name": "go", "arguments": ' + arguments + "}\n</tool_call>"


ROUTES = [CHATS, RESPONSES, MESSAGES]


# --- the constraint of a forced call


def argument_schemas(tag: str) -> list[Any]:
    return [each["content"]["json_schema"] for each in json.loads(tag)["format"]["tags"]]


PARAMETERS: dict[str, Any] = {
    "properties": CITY,
    "no type": {"properties": {"city": {"type": "string"}}, "required": ["city"]},
    "an object": {"type": "object"},
    "empty": {},
    "none": None,
    "what cannot be honoured": {
        "type": "object",
        "properties": {"tags": {"type": "array", "items": {}, "uniqueItems": True}},
        "not": {"required": ["x"]},
    },
    "references": {
        "type": "object",
        "properties": {"a": {"$ref": "#/definitions/a~1b"}, "again": {"$ref": "#"}},
        "definitions": {"a/b": {"type": "integer"}},
    },
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("choice", ["required", "named"])
@pytest.mark.parametrize("name", PARAMETERS)
async def test_forced_call_is_held_to_an_object(
    calling: Services, path: str, choice: str, name: str
) -> None:
    body = request(path, PARAMETERS[name], choice, call('{"city": "Agar"}'))
    found = await calls(calling, path, body)
    assert [(go, json.loads(given)) for go, given in found] == [("go", {"city": "Agar"})]
    schemas = argument_schemas(await sent(calling))
    for schema in schemas:
        allowed = [json.loads(text) for text in texts(schema, 10, 0)]
        assert allowed
        assert all(isinstance(each, dict) for each in allowed)
        if name in {"none", "empty", "an object"}:
            assert all(each == {} for each in allowed)
        if "city" in str(PARAMETERS[name]):
            assert all(isinstance(each["city"], str) for each in allowed)


async def test_forced_call_without_object_in_parameters_is_refused(calling: Services) -> None:
    body = request(CHATS, {"type": "string"}, "required", call("{}"))
    reply = await post(calling, CHATS, **body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, "tools", "invalid_grammar")


@pytest.mark.parametrize("choice", ["required", "auto"])
async def test_strict_tool_that_cannot_be_honoured_is_refused(
    calling: Services, choice: str
) -> None:
    body = request(CHATS, CITY, choice, call("{}"))
    body["tools"] = [function(PARAMETERS["what cannot be honoured"], strict=True)]
    reply = await post(calling, CHATS, **body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, "tools")
    assert "`not`" in error["message"]


async def test_tools_of_a_request_reach_the_template_unchanged(calling: Services) -> None:
    body = request(CHATS, CITY, "required", call('{"city": "a"}'))
    reply = await post(calling, RESPONSES, **request(RESPONSES, CITY, "required", call("{}")))
    assert reply.json()["tools"][0]["parameters"] == CITY
    await calls(calling, CHATS, body)
    core = running(calling).engine.client.engine_core
    forced = (await core.call_utility_async("last_request"))["prompt_token_ids"]
    await calls(calling, CHATS, body | {"tool_choice": "auto"})
    assert (await core.call_utility_async("last_request"))["prompt_token_ids"] == forced


# Parsers whose tags, or whose schema of all tools, vLLM makes in different ways.
PARSERS = ["hermes", "longcat", "internlm", "qwen3_coder", "kimi_k2", "glm47", "deepseek_v32"]


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_each_parser_constrains_arguments(name: str, choice: Any) -> None:
    """Also tools whose definitions have the same name, which vLLM would refuse."""
    other = {"name": "other", "parameters": {"$ref": "#/$defs/a", "$defs": {"a": CITY}}}
    parameters = {"properties": {"n": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"type": "integer"}}}
    tools = [function(parameters), {"type": "function", "function": other}]
    asked = ChatCompletionRequest(messages=HELLO, tools=tools, tool_choice=choice)
    before = asked.model_dump(include={"tools"})
    parser = ParserManager.get_parser(tool_parser_name=name, enable_auto_tools=True)
    assert parser is not None
    assert parser.tool_parser_cls is not None
    parser.tool_parser_cls = with_object_arguments(parser.tool_parser_cls)
    made = parser(AutoTokenizer.from_pretrained(str(CHAT)), asked.tools).adjust_request(asked)
    assert asked.model_dump(include={"tools"}) == before
    assert ARGUMENTS in str(made.structured_outputs)
    tag, schema = made.structured_outputs.structural_tag, made.structured_outputs.json
    schemas = [schema] if tag is None else _schemas_in(json.loads(tag))
    assert schemas
    for each in schemas:
        assert "uniqueItems" not in str(rewrite_schema(each))


def _schemas_in(tag: Any) -> list[Any]:
    return [holder[key] for holder, key in constraints_of_tag(tag) if key != "pattern"]


async def test_whitespace_in_a_forced_call_is_bounded(calling: Services) -> None:
    """Without a bound a small model writes spaces until `max_tokens`."""
    body = request(CHATS, None, "required", call("{}"))
    assert await calls(calling, CHATS, body) == [("go", "{}")]
    tag, *_ = json.loads(await sent(calling))["format"]["tags"]
    assert tag["content"]["max_whitespace_cnt"] == 32
    compiler = xgr.GrammarCompiler(tokenizer(), cache_enabled=False)
    compiled = compiler.compile_structural_tag(
        json.dumps({"type": "structural_tag", "format": tag["content"]})
    )
    for spaces, is_allowed in ((0, True), (32, True), (33, False)):
        assert xgr.GrammarMatcher(compiled).accept_string("{" + " " * spaces + "}") is is_allowed


async def test_schema_of_all_tools_has_bounded_whitespace(calling: Services) -> None:
    """Of a parser without tags, such as `llama3_json`."""
    given = {"type": "object", "properties": {"a": {"allOf": [{ARGUMENTS: False}]}}}
    params = SamplingParams(structured_outputs=StructuredOutputsParams(json=given))
    await running(calling).engine.client.check(params)
    structured = params.structured_outputs
    assert structured is not None
    assert structured.json is None
    assert json.loads(structured.structural_tag or "")["format"]["max_whitespace_cnt"] == 32


# --- tools of /v1/responses that are not functions

CUSTOM = {"type": "custom", "name": "free"}
NAMESPACE = {
    "type": "namespace",
    "name": "own",
    "description": "mine",
    "tools": [{"type": "function", "name": "go", "parameters": CITY}],
}


@pytest.mark.parametrize("choice", ["required", {"type": "custom", "name": "free"}])
async def test_forced_custom_tool_gets_a_text(calling: Services, choice: Any) -> None:
    text = '<tool_call>{"name": "free", "arguments": {"input": "abc"}}</tool_call>'
    answer = {"vllm_xargs": {"answer": ids(text)}}
    body = {"input": "hi", "tools": [CUSTOM], "tool_choice": choice, **answer}
    reply = await post(calling, RESPONSES, **body)
    (item,) = reply.json()["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "free", "abc")
    schema, *_ = argument_schemas(await sent(calling))
    assert schema["properties"]["input"]["type"] == "string"
    assert schema["required"] == ["input"]


async def test_forced_tool_of_a_namespace_has_its_arguments(calling: Services) -> None:
    text = '<tool_call>{"name": "own__go", "arguments": {"city": "Agar"}}</tool_call>'
    answer = {"vllm_xargs": {"answer": ids(text)}}
    body = {"input": "hi", "tools": [NAMESPACE], "tool_choice": "required", **answer}
    assert await calls(calling, RESPONSES, body) == [("go", '{"city": "Agar"}')]
    schema, *_ = argument_schemas(await sent(calling))
    assert schema["required"] == ["city"]


@pytest.mark.parametrize(
    ("choice", "tools"),
    [({"type": "mcp", "server_label": "x"}, [CUSTOM]), ("required", [{"type": "web_search"}])],
)
async def test_forced_built_in_tool_is_refused(calling: Services, choice: Any, tools: Any) -> None:
    reply = await post(calling, RESPONSES, input="hi", tools=tools, tool_choice=choice)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"].partition(".")[0]) == (400, "tool_choice")


# --- allowed tools


def allowing(path: str, mode: str, name: str) -> dict[str, Any]:
    """The body of a route with the tools `go` and `stay`, of which one is allowed."""
    body = request(path, CITY, "auto", call('{"city": "a"}'))
    if path == CHATS:
        body["tools"].append({"type": "function", "function": {"name": "stay"}})
        allowed = {"mode": mode, "tools": [{"type": "function", "function": {"name": name}}]}
        return body | {"tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}}
    body["tools"].append({"type": "function", "name": "stay", "parameters": {}})
    allowed = {"mode": mode, "tools": [{"type": "function", "name": name}]}
    return body | {"tool_choice": {"type": "allowed_tools", **allowed}}


@pytest.mark.parametrize("path", [CHATS, RESPONSES])
@pytest.mark.parametrize("mode", ["required", "auto"])
@pytest.mark.parametrize("stream", [False, True])
async def test_only_allowed_tools_can_be_called(
    calling: Services, path: str, mode: str, *, stream: bool
) -> None:
    body = allowing(path, mode, "go") | {"stream": stream}
    assert await calls(calling, path, body) == [("go", '{"city": "a"}')]
    tag = await sent(calling)
    assert (tag is not None) == (mode == "required")
    assert "stay" not in (tag or "")


async def test_response_echoes_its_allowed_tools(calling: Services) -> None:
    body = allowing(RESPONSES, "required", "go")
    answer = (await post(calling, RESPONSES, **body)).json()
    assert answer["tool_choice"] == body["tool_choice"]
    assert [tool["name"] for tool in answer["tools"]] == ["go", "stay"]


@pytest.mark.parametrize("path", [CHATS, RESPONSES])
@pytest.mark.parametrize(("mode", "name"), [("required", "none"), ("none", "go"), ("auto", "")])
async def test_allowed_tools_that_are_none_are_refused(
    calling: Services, path: str, mode: str, name: str
) -> None:
    reply = await post(calling, path, **allowing(path, mode, name))
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].startswith("tool_choice.")


# --- what the model wrote

TEXTS = {
    "plain": (call('{"city": "Agar"}'), [{"city": "Agar"}]),
    "a tag in a string": (
        call('{"city": "a</tool_call>b<tool_call>"}'),
        [{"city": "a</tool_call>b<tool_call>"}],
    ),
    "names inside": (
        '<tool_call>{"arguments": {"name": "x", "arguments": {}}, "name": "go"}</tool_call>',
        [{"name": "x", "arguments": {}}],
    ),
    "escapes": (call(r'{"city": "\"}\\", "b": "\u00e9"}'), [{"city": '"}\\', "b": "é"}]),
    "two": (call('{"city": "a"}') + "\n" + call('{"city": "b"}'), [{"city": "a"}, {"city": "b"}]),
    "no end tag": ('<tool_call>{"name": "go", "arguments": {"city": "a"}}', [{"city": "a"}]),
    "no arguments": ('<tool_call>{"name": "go"}</tool_call>', [{}]),
    "JSON in a string": (call(r'"{\"city\": \"a\"}"'), [{"city": "a"}]),
    "no object": (call('"Agar"'), []),
    "no JSON": (call("{city: Agar}"), []),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', []),
    "a list": ("<tool_call>[1]</tool_call>", []),
    "an open string": ('<tool_call>{"name": "go", "arguments": {"a": "b\n}}</tool_call>', []),
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", TEXTS)
async def test_call_is_what_the_model_wrote(
    calling: Services, path: str, name: str, *, stream: bool
) -> None:
    text, expected = TEXTS[name]
    found = await calls(calling, path, request(path, CITY, "auto", text, stream=stream))
    if name == "no JSON" and stream:
        return  # its arguments were under way when they turned out to be none
    if name == "an open string" and stream:
        return
    assert [json.loads(arguments) for _, arguments in found] == expected


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "Well: " + call('"Agar"'),
        "The tag <tool_call> begins a call, and a < b.",
        "It ends with <tool_call>",
        'Cut off: <tool_call>{"name": "go"',
        "Half a tag: <tool_",
    ],
)
async def test_text_that_is_no_call_is_content(
    calling: Services, path: str, text: str, *, stream: bool
) -> None:
    reply = await post(calling, path, **request(path, CITY, "auto", text, stream=stream))
    assert reply.status_code == 200
    assert _content(reply.text, path, streamed=stream) == text


def _content(text: str, path: str, *, streamed: bool) -> str:
    """The text of an answer."""
    if path == CHATS and streamed:
        deltas = [each["choices"][0]["delta"] for each in events(text)[:-1]]
        return "".join(each.get("content") or "" for each in deltas)
    if path == CHATS:
        return str(json.loads(text)["choices"][0]["message"]["content"])
    if path == RESPONSES:
        last = events(text)[-1]["response"] if streamed else json.loads(text)
        return "".join(part["text"] for item in last["output"] for part in item["content"])
    if streamed:
        return "".join(each.get("delta", {}).get("text", "") for each in events(text))
    return "".join(block["text"] for block in json.loads(text)["content"])


@pytest.mark.parametrize("name", ["hermes", "longcat", "granite4"])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_parser_of_tagged_json_reads_tags_in_strings(name: str, size: int) -> None:
    parser = parser_of(name)(AutoTokenizer.from_pretrained(str(CHAT)), [])
    start, end = ("<longcat_tool_call>", "</longcat_tool_call>")
    if name != "longcat":
        start, end = "<tool_call>", "</tool_call>"
    arguments = {"city": f"a{end}b{start}"}
    text = f'Well: {start}{{"name": "go", "arguments": {json.dumps(arguments)}}}{end}'
    asked = ChatCompletionRequest(messages=HELLO, tools=[function(CITY)], tool_choice="auto")
    found = parser.extract_tool_calls(text, asked)
    assert found.content == "Well: "
    assert [json.loads(each.function.arguments) for each in found.tool_calls] == [arguments]
    deltas = [text[at : at + size] for at in range(0, len(text), size)]
    made = [parser.extract_tool_calls_streaming("", "", each, [], [], [], asked) for each in deltas]
    parts = [tool.function.arguments for each in made if each for tool in each.tool_calls]
    assert json.loads("".join(filter(None, parts))) == arguments


def parser_of(name: str) -> Any:
    made = ParserManager.get_tool_parser(name, enable_auto_tools=True)
    assert made is not None
    return with_object_arguments(made)


@pytest.mark.parametrize("choice", ["auto", "required", "named"])
@pytest.mark.parametrize("tokens", range(2, 24, 3))
async def test_call_that_is_cut_off_has_what_was_written(
    calling: Services, choice: str, tokens: int
) -> None:
    text = call('{"city": "Agar Agar Agar"}')
    body = request(CHATS, CITY, choice, text, stream=True, max_tokens=tokens)
    reply = await post(calling, CHATS, **body)
    chunks = events(reply.text)[:-1]
    ends = [each["choices"][0]["finish_reason"] for each in chunks]
    assert ends[-1] == "length"
    written = "".join(arguments for _, arguments in _of_chat(reply.text, streamed=True))
    assert '{"city": "Agar Agar Agar"}'.startswith(written)
    if tokens > 20:
        assert written


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("choice", ["auto", "required", "named"])
@pytest.mark.parametrize("tokens", [4, 12, 22])
async def test_call_that_is_cut_off_is_not_completed(
    calling: Services, path: str, choice: str, tokens: int
) -> None:
    """In an answer that is not a stream; the model never wrote `{}`."""
    text = call('{"city": "Agar Agar Agar"}')
    limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
    body = request(path, CITY, choice, text) | {limit: tokens}
    for name, arguments in await calls(calling, path, body):
        assert name == "go"
        assert '{"city": "Agar Agar Agar"}'.startswith(arguments), arguments


@pytest.mark.parametrize("stream", [False, True])
async def test_message_that_is_cut_off_is_no_error(calling: Services, *, stream: bool) -> None:
    body = request(MESSAGES, CITY, "required", call('{"city": "Agar"}'), max_tokens=12)
    reply = await post(calling, MESSAGES, **body, stream=stream)
    assert reply.status_code == 200, reply.text
    assert '"max_tokens"' in reply.text
