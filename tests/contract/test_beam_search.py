"""Fields that vLLM's beam search drops are refused beside it."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from llmserve.api.endpoint_id import EndpointId
from llmserve.engine.beam_search import DROPPED
from llmserve.engine.endpoint_handlers import parse
from llmserve.errors import RequestError
from tests.contract.support import class_of

CHAT = EndpointId.CHAT_COMPLETIONS
BODIES: dict[EndpointId, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": [{"role": "user", "content": "a"}]},
    EndpointId.COMPLETIONS: {"model": "m", "prompt": "a"},
}
GENERATION = "entrypoints/openai"
# Fields without an effect on beam search, or with one outside its parameters.
HARMLESS = {"echo", "logprobs", "max_tokens", "seed", "stream", "stream_interval", "top_logprobs"}
TOOL = {"type": "function", "function": {"name": "go"}}
STRICT = {"type": "function", "function": {"name": "go", "strict": True}}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (f"{GENERATION}/chat_completion/protocol.py", "ChatCompletionRequest"),
        (f"{GENERATION}/completion/protocol.py", "CompletionRequest"),
    ],
)
def test_dropped_fields_are_those_that_beam_search_does_not_read(file: str, name: str) -> None:
    methods = class_of(file, name)
    sampled, searched = (
        _fields(methods[f"to_{each}_params"]) for each in ("sampling", "beam_search")
    )
    defaults = {"frequency_penalty", "presence_penalty", "repetition_penalty", "top_p", "top_k"}
    assert (sampled - searched) | defaults | {"min_p"} == DROPPED | HARMLESS & sampled


def _fields(method: ast.AST) -> set[str]:
    found = {
        node.attr
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    }
    return {each for each in found if not each.startswith(("_", "extract_"))}


SET: dict[str, Any] = {
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a"},
    "stop": "a",
    "stop_token_ids": [1],
    "logit_bias": {"1": 1},
    "min_p": 0.1,
    "top_p": 0.5,
    "top_k": 3,
    "frequency_penalty": 1,
    "min_tokens": 1,
    "bad_words": ["a"],
    "spaces_between_special_tokens": False,
    "vllm_xargs": {"a": 1},
}


@pytest.mark.parametrize("endpoint", BODIES)
@pytest.mark.parametrize("key", SET)
@pytest.mark.parametrize("asked", [True, "true"])
def test_field_that_beam_search_drops_is_refused(
    endpoint: EndpointId, key: str, asked: Any
) -> None:
    body = BODIES[endpoint] | {key: SET[key]}
    parse(endpoint, dict(body))
    with pytest.raises(RequestError, match="use_beam_search") as caught:
        parse(endpoint, body | {"use_beam_search": asked})
    assert caught.value.param == key


@pytest.mark.parametrize(
    "more",
    [
        {"tool_choice": "required"},
        {"tool_choice": TOOL},
        {"tools": [STRICT]},
        {"parallel_tool_calls": False},
    ],
)
def test_constrained_call_is_refused_with_beam_search(more: dict[str, Any]) -> None:
    body = BODIES[CHAT] | {"tools": [TOOL], "use_beam_search": True} | more
    with pytest.raises(RequestError, match="use_beam_search") as caught:
        parse(CHAT, body)
    assert caught.value.param == "tools"


@pytest.mark.parametrize(
    "more",
    [
        {"n": 2, "temperature": 0.5, "length_penalty": 2.0, "ignore_eos": True, "seed": 1},
        {"top_p": 1, "min_p": 0, "stop": [], "response_format": {"type": "text"}},
        {"repetition_penalty": 1.0, "logit_bias": {}, "spaces_between_special_tokens": True},
    ],
)
@pytest.mark.parametrize("endpoint", BODIES)
def test_other_fields_are_taken_with_beam_search(
    endpoint: EndpointId, more: dict[str, Any]
) -> None:
    assert parse(endpoint, BODIES[endpoint] | {"use_beam_search": True} | more).use_beam_search
