"""Constraints through our routes, vLLM's front end and the real compilers.

The engine core is the fake one: what reaches it was compiled by the sandbox, with the
code that the engine core itself has.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmserve.errors import LLMServeError
from llmserve.http import app
from tests.contract.test_handlers import HELLO, post

if TYPE_CHECKING:
    from llmserve.engine.structured_output.compiler import ConstraintCompiler
    from llmserve.http.services import Services

CHATS = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def grammars_of(serving: Any) -> ConstraintCompiler:
    grammars: ConstraintCompiler = serving.engine.client._grammars
    return grammars


def running(services: Services) -> Any:
    return services.pool.models["chat"].running


def own(**constraint: Any) -> dict[str, Any]:
    return {"structured_outputs": constraint}


def schema(of: Any) -> dict[str, Any]:
    form = {"name": "it", "schema": of}
    return {"response_format": {"type": "json_schema", "json_schema": form}}


def objects(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"k{n}": {"type": "string"} for n in range(count)}}


def product(depth: int) -> dict[str, Any]:
    of: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        of = {"anyOf": [of, {"type": "array", "items": of}]}
    return of


INVALID, COMPLEX = "invalid_grammar", "grammar_too_complex"
REFUSED = {
    "an open group": (own(regex="("), INVALID),
    "a class of Unicode": (own(regex=r"\p{L}{500}"), INVALID),
    "30,000 groups": (own(regex="(" * 30_000 + "a" + ")" * 30_000), INVALID),
    "choices": (own(choice=[f"choice{n}" for n in range(30_000)]), COMPLEX),
    "a long choice": (own(choice=["a" * 1_000_000]), COMPLEX),
    "names": (schema({"enum": [f"value{n}" for n in range(30_000)]}), COMPLEX),
    "properties": (schema(objects(10_000)), COMPLEX),
    "a product": (schema(product(12)), COMPLEX),
    "a root that is itself": (schema({"$ref": "#"}), INVALID),
    "a cycle": (schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), INVALID),
    "no way out": (schema({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}), INVALID),
    "no such pointer": (schema({"$ref": "#/$defs/a/b", "$defs": {"a": {}}}), INVALID),
    "a remote reference": (schema({"$ref": "http://localhost/a.json"}), INVALID),
    "a remote reference inside": (schema({"anyOf": [{"items": {"$ref": "a.json"}}]}), INVALID),
    "an anchor": (schema({"$ref": "#a", "$defs": {"a": {"$anchor": "a"}}}), INVALID),
    "no value": (schema({"allOf": [objects(1), {"type": "string"}]}), INVALID),
    "multipleOf": (schema({"type": "integer", "multipleOf": 3}), INVALID),
    "not": (schema({"type": "string", "not": {"const": "a"}}), INVALID),
    "if": (schema({"if": {"type": "string"}, "then": {"minLength": 2}}), INVALID),
    "dependentRequired": (schema({"dependentRequired": {"a": ["b"]}}), INVALID),
    "uniqueItems": (schema({"type": "array", "uniqueItems": True}), INVALID),
    "oneOf": (schema({"oneOf": [{"type": "string"}, {"const": "a"}]}), INVALID),
    "a pattern and a length": (schema({"pattern": "^a*$", "minLength": 2}), INVALID),
    "a quote in a pattern": (schema({"pattern": '^"$'}), INVALID),
    "a lookahead in a pattern": (schema({"pattern": "^(?!a).*$"}), INVALID),
    "a lookahead": (own(regex="(?!a).*"), INVALID),
    "a schema of a tag": (
        {
            "response_format": {
                "type": "structural_tag",
                "format": {"type": "json_schema", "json_schema": {"not": {}}},
            }
        },
        INVALID,
    ),
    "a schema of an old tag": (
        {
            "response_format": {
                "type": "structural_tag",
                "structures": [{"begin": "<a>", "schema": {"$ref": "http://a"}, "end": "</a>"}],
                "triggers": ["<a>"],
            }
        },
        INVALID,
    ),
    "no grammar": (own(grammar="root ::= undefined"), INVALID),
    "a tag": (
        {
            "response_format": {
                "type": "structural_tag",
                "format": {"type": "regex", "pattern": "("},
            }
        },
        INVALID,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_constraint_refused_has_place_and_reason(calling: Services, name: str) -> None:
    body, code = REFUSED[name]
    reply = await post(calling, CHATS, messages=HELLO, max_tokens=4, **body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, code), error
    assert error["param"].split(".")[0] in body
    assert error["message"].startswith(error["param"])
    assert len(error["message"]) < 1000
    again = await post(calling, CHATS, messages=HELLO, max_tokens=4, stream=True, **body)
    assert (again.status_code, again.json()["error"]["code"]) == (400, code)


COMPILED = {
    "nested counts": own(regex="((a{1,999}){1,999}){1,999}"),
    "a left recursion": own(grammar='root ::= root "a" | "a"'),
    "an ambiguity": own(grammar='root ::= root root | "a" | ""'),
    "choices": own(choice=["yes", "no"]),
    "a schema": schema(objects(5)),
    "text of a schema": own(json=json.dumps(objects(5))),
    "an object": {"response_format": {"type": "json_object"}},
    "a pointer": schema({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "object"}}}),
    "a tilde": schema({"$ref": "#/$defs/~0", "$defs": {"~": {"type": "object"}}}),
    "percents": schema({"$ref": "#/$defs/%3Ca%3E", "$defs": {"<a>": {"type": "object"}}}),
    "a recursion": schema({"properties": {"a": {"$ref": "#"}}}),
    "allOf": schema({"allOf": [objects(1), {"type": "object"}]}),
    "a description beside a reference": schema(
        {"properties": {"a": {"$ref": "#/$defs/a", "description": "x"}}, "$defs": {"a": objects(1)}}
    ),
    "an unknown format": schema({"type": "object", "properties": {"a": {"format": "x"}}}),
    "references": schema(
        {
            "$ref": "#/$defs/d0",
            "$defs": {
                **{
                    f"d{n}": {
                        "type": "object",
                        "properties": {key: {"$ref": f"#/$defs/d{n + 1}"} for key in "ab"},
                    }
                    for n in range(25)
                },
                "d25": {"type": "string"},
            },
        }
    ),
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("stream", [False, True])
async def test_constraint_compiled_reaches_the_engine(
    calling: Services, name: str, *, stream: bool
) -> None:
    body = COMPILED[name]
    reply = await post(calling, CHATS, messages=HELLO, max_tokens=4, stream=stream, **body)
    assert reply.status_code == 200, reply.text
    sent = await running(calling).engine.client.engine_core.call_utility_async("last_request")
    assert sent["backend"] == "xgrammar"


async def test_constraint_known_is_not_sent_to_the_worker(calling: Services) -> None:
    grammars = grammars_of(running(calling))
    body = own(regex="known")
    await post(calling, COMPLETIONS, prompt="a", max_tokens=2, **body)
    await grammars.close()
    reply = await post(calling, COMPLETIONS, prompt="a", max_tokens=2, **body)
    assert (reply.status_code, grammars.pid) == (200, None)


# With `strict`, hermes' parser constrains the arguments by the parameters.
REMOTE = {"type": "object", "properties": {"a": {"$ref": "http://localhost/a.json"}}}
TOOL = {"type": "function", "function": {"name": "go", "strict": True, "parameters": REMOTE}}
FREE = {"type": "function", "function": {"name": "go", "parameters": objects(1)}}


@pytest.mark.parametrize("stream", [False, True])
async def test_constraint_of_tools_is_refused_before_headers(
    calling: Services, *, stream: bool
) -> None:
    reply = await post(
        calling, CHATS, messages=HELLO, stream=stream, tools=[TOOL], tool_choice="required"
    )
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, INVALID), error
    assert error["param"] == "tools"


async def test_request_without_constraint_starts_no_worker(calling: Services) -> None:
    grammars = grammars_of(running(calling))
    await grammars.close()
    reply = await post(calling, CHATS, messages=HELLO, max_tokens=2, tools=[FREE])
    assert (reply.status_code, grammars.pid) == (200, None)


async def test_constraint_while_a_stream_runs_lets_it_go_on(calling: Services) -> None:
    body = own(choice=[f"other{n}" for n in range(30_000)])
    heavy = asyncio.ensure_future(post(calling, COMPLETIONS, prompt="a", **body))
    for _ in range(5):
        reply = await post(calling, COMPLETIONS, prompt="b", max_tokens=8, stream=True)
        assert reply.text.endswith("data: [DONE]\n\n")
    assert not heavy.done()
    assert (await heavy).status_code == 400


async def test_check_off_in_vllm_leaves_request_without_backend(calling: Services) -> None:
    """What the engine core refuses (StructuredOutputManager.grammar_init)."""
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

    client = running(calling).engine.client
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="("))
    prompt = {"type": "token", "prompt_token_ids": [1]}
    made = client.input_processor.process_inputs(
        "id", prompt, params, supported_tasks=("generate",)
    )
    assert made.params.structured_outputs._backend is None


async def test_schema_reaches_the_engine_as_it_was_honoured(calling: Services) -> None:
    given = {"allOf": [{"type": "object"}, {"required": ["a"]}], "title": "x"}
    reply = await post(calling, CHATS, messages=HELLO, max_tokens=4, **schema(given))
    assert reply.status_code == 200
    sent = await running(calling).engine.client.engine_core.call_utility_async("last_request")
    assert json.loads(sent["json"])["required"] == ["a"]


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
KEYWORDS = st.sampled_from(
    [
        "type",
        "enum",
        "const",
        "properties",
        "required",
        "items",
        "prefixItems",
        "allOf",
        "anyOf",
        "oneOf",
        "not",
        "$ref",
        "$defs",
        "$id",
        "additionalProperties",
        "patternProperties",
        "propertyNames",
        "pattern",
        "minLength",
        "minimum",
        "multipleOf",
        "minItems",
        "uniqueItems",
        "contains",
        "format",
        "x-llmserve-arguments",
    ]
)


@given(given=st.dictionaries(KEYWORDS, ANY | st.dictionaries(KEYWORDS, ANY), max_size=4))
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_schema_has_an_answer(calling: Services, given: dict[str, Any]) -> None:
    """Not one of them is a failure of the server."""
    tool = {"type": "function", "function": {"name": "go", "parameters": given, "strict": True}}
    forced = {"tools": [tool], "tool_choice": "required"}
    loop = asyncio.get_event_loop_policy().get_event_loop()
    for body in (schema(given), forced):
        content = body | {"messages": HELLO, "max_tokens": 2}
        reply = loop.run_until_complete(post_json(calling, CHATS, content))
        assert reply.status_code in {200, 400}, reply.text


async def post_json(services: Services, path: str, body: dict[str, Any]) -> Any:
    """As clients write it that know NaN and lone surrogates."""
    transport = httpx.ASGITransport(app.build(services))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        content = json.dumps({"model": "chat"} | body)
        return await client.post(path, content=content.encode("utf-8", "surrogatepass"))


COUNTS = st.recursive(
    st.sampled_from(["a", "(a|b)", "[a-z]", r"\w", "."]),
    lambda inner: st.builds(
        lambda part, low, more: f"({part}){{{low},{low + more}}}",
        inner,
        st.integers(0, 2000),
        st.integers(0, 2000),
    ),
    max_leaves=4,
)


@given(pattern=COUNTS)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_nested_counts_have_a_verdict(calling: Services, pattern: str) -> None:
    async def verdict() -> int:
        client = running(calling).engine.client
        try:
            await client.check_explicit(own(regex=pattern))
        except LLMServeError as error:
            return error.status
        return 200

    loop = asyncio.get_event_loop_policy().get_event_loop()
    assert loop.run_until_complete(verdict()) in {200, 400}
