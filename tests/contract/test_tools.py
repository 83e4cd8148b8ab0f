"""Calls of tools through our routes, vLLM's front end and the real compilers.

The engine core is the fake one, and answers with the text that a test gives it.
"""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager

from llmserve.engine.structured_output.compiler_process import constraints_of_tag
from llmserve.engine.structured_output.json_schema import rewrite_schema
from llmserve.engine.structured_output.subschema import ARGUMENTS
from llmserve.engine.tool_parsers import with_object_arguments
from tests.contract.grammar_texts import texts
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


@pytest.mark.parametrize("stream", [False, True])
async def test_text_that_is_no_call_is_content(calling: Services, *, stream: bool) -> None:
    text = "Well: " + call('"Agar"')
    reply = await post(calling, CHATS, **request(CHATS, CITY, "auto", text, stream=stream))
    if stream:
        deltas = [each["choices"][0]["delta"] for each in events(reply.text)[:-1]]
        content = "".join(each.get("content") or "" for each in deltas)
    else:
        content = reply.json()["choices"][0]["message"]["content"]
    assert content == text


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
