"""What a client is told of a wrong body, on every route."""

from __future__ import annotations

import ast
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, get_args

import httpx
import pytest
import vllm
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.renderers.params import TokenizeParams

from llmserve.api.endpoint_id import EndpointId
from llmserve.api.endpoints import ENDPOINTS
from llmserve.api.unsupported_keys import UNSUPPORTED
from llmserve.engine import token_count
from llmserve.engine.endpoint_handlers import HANDLERS, drop_own_size, parse
from llmserve.engine.error_mapping import TOO_LONG, ErrorMapper, bounded_line
from llmserve.engine.request_validation import shape_of
from llmserve.errors import RequestError
from llmserve.http import app
from llmserve.http.body import parse_body
from llmserve.registry.engine_args import ENGINE_ARGS
from tests.contract.support import post

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmserve.http.services import Services

USER = {"role": "user", "content": "hello"}
BASE: dict[EndpointId, dict[str, Any]] = {
    EndpointId.CHAT_COMPLETIONS: {"messages": [USER], "max_tokens": 1},
    EndpointId.COMPLETIONS: {"prompt": "hello", "max_tokens": 1},
    EndpointId.RESPONSES: {"input": "hello", "max_output_tokens": 1},
    EndpointId.MESSAGES: {"messages": [USER], "max_tokens": 1},
    EndpointId.TOKEN_COUNTS: {"messages": [USER]},
    EndpointId.TOKENIZATION: {"prompt": "hello"},
    EndpointId.DETOKENIZATION: {"tokens": [1]},
    # and those that the fake core's model does not do
    EndpointId.EMBEDDINGS: {"input": "hello"},
    EndpointId.SCORES: {"text_1": "hello", "text_2": "hello"},
    EndpointId.RERANKING: {"query": "hello", "documents": ["hello"]},
    EndpointId.POOLING: {"input": "hello"},
    EndpointId.CLASSIFICATION: {"input": "hello"},
    EndpointId.TRANSCRIPTIONS: {"file": UploadFile(io.BytesIO(), filename="a.wav")},
    EndpointId.TRANSLATIONS: {"file": UploadFile(io.BytesIO(), filename="a.wav")},
}
ROUTES = [endpoint for endpoint in ENDPOINTS if endpoint.id in list(BASE)[:7]]
WRONG: list[Any] = [
    *(5, -1, 1.5, 1e300, True, "wrong", "9" * 40, "", [], {}),
    *([5], ["wrong"], [[]], [{}], [{"type": 5}], [{"role": 5}], [{"type": "wrong"}], [None]),
    *({"type": 5}, {"type": "wrong"}, {"name": [5]}, {"a": {"b": [None]}}, {"type": "function"}),
    *([{"role": "user"}], [{"role": "user", "content": 5}], [{"role": "user", "content": [5]}]),
    [{"role": "user", "content": [{"type": "text", "text": 5}]}],
    [{"role": "user", "content": [{"type": "input_image"}]}],
    [{"role": "assistant", "tool_calls": [{"id": 5}]}],
    [{"role": "assistant", "tool_calls": 5}],
    [{"role": "tool", "content": {}}],
    [{"type": "function", "function": 5}],
    [{"type": "function", "function": {"name": 5}}],
    [{"type": "function", "name": 5}],
    [{"type": "function_call", "name": 5}],
    [{"name": "f", "input_schema": 5}],
]  # fmt: skip
# Words of pydantic, of Python and of classes.
_PROSE = re.compile(
    r"Input should|validation error|pydantic|Value error|function-|ValidatorIterator|Literal\["
    r"|NoneType|object has no|not subscriptable|not iterable|unexpected keyword|required positional"
    r"|unhashable|[a-z]Param\b|[a-z]Request\b|ChatCompletion|Traceback|'(?:int|str|dict|list|float|bool)'"
    r"|<class|KeyError|indices must"
)


_NOT_THEIRS = {"model", "request_id", "file"}  # a file is checked as the form is read


def _classes(kind: Any) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for each in get_args(kind):
        yield from _classes(each)


def fields_of(endpoint: EndpointId) -> list[str]:
    kinds = _classes(HANDLERS[endpoint].request._type)
    return sorted({field for kind in kinds for field in kind.model_fields} - _NOT_THEIRS)


def check_error(error: dict[str, Any], body: dict[str, Any], fields: list[str]) -> None:
    assert not _PROSE.search(error["message"]), error
    assert len(error["message"]) < 1000
    assert error["message"].isprintable()
    if (place := error.get("param")) is not None:  # Anthropic's shape has none
        first, *_ = place.split(".")
        assert first in body or first in fields, error
        assert "[" not in place, error


@pytest.mark.parametrize("endpoint", HANDLERS)
def test_wrong_value_in_any_field_is_told_in_plain_words(endpoint: EndpointId) -> None:
    fields = fields_of(endpoint)
    refused = 0
    for field in fields:
        for wrong in WRONG:
            body = {"model": "chat"} | BASE[endpoint] | {field: wrong}
            try:
                parse(endpoint, body)
            except RequestError as error:
                refused += 1
                check_error({"message": error.message, "param": error.param}, body, fields)
    assert refused > len(fields)


@pytest.mark.parametrize("endpoint", ROUTES, ids=lambda each: each.id)
async def test_wrong_value_in_any_field_is_told_by_the_route(fake: Services, endpoint: Any) -> None:
    fields = fields_of(endpoint.id)
    transport = httpx.ASGITransport(app.build(fake))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        for field in fields:
            for wrong in WRONG:
                body = {"model": "chat"} | BASE[endpoint.id] | {field: wrong}
                reply = await client.post(endpoint.paths[0], json=body)
                assert reply.status_code in {200, 400, 404}, (field, wrong, reply.text)
                if reply.status_code != 200:
                    check_error(reply.json()["error"], body, fields)


@pytest.mark.parametrize("endpoint", HANDLERS)
def test_shape_of_a_class_takes_what_the_class_takes(endpoint: EndpointId) -> None:
    shape_of(HANDLERS[endpoint].request).validate_python({"model": "m"} | BASE[endpoint])


@pytest.mark.parametrize("endpoint", [EndpointId.CHAT_COMPLETIONS, EndpointId.COMPLETIONS])
@pytest.mark.parametrize("n", [10_000, "10000", " 129 ", 129.0])
def test_choices_have_a_limit_however_they_are_written(endpoint: EndpointId, n: Any) -> None:
    body = {"model": "m"} | BASE[endpoint] | {"n": n}
    with pytest.raises(RequestError, match="limit is 128"):
        parse(endpoint, body)


def test_vllm_cuts_long_prompts_where_tokencount_expects() -> None:
    whole = TokenizeParams.get_encode_kwargs
    bare = getattr(whole, "__wrapped__", whole)
    params = TokenizeParams(max_total_tokens=2048)
    assert bare(params)["max_length"] == 2049
    assert token_count._counting_whole(bare)(params)["max_length"] == token_count.LIMIT + 1
    cut = TokenizeParams(max_total_tokens=2048, truncate_prompt_tokens=7)
    assert token_count._counting_whole(bare)(cut) == bare(cut)
    with pytest.raises(VLLMValidationError) as caught:
        params.apply_post_tokenization(None, {"prompt_token_ids": [1] * 2049})
    said = "contains at least 2049 input tokens"
    assert said in str(caught.value)
    assert "contains 2049 input tokens" in token_count.corrected(said)
    more = f"contains {token_count.LIMIT + 1} input tokens"
    assert token_count.corrected(more) == more.replace("contains", "contains at least")


@pytest.mark.parametrize("said", TOO_LONG)
def test_prompt_that_does_not_fit_is_told_in_openai_s_words(said: str) -> None:
    """LiteLLM and others know it by them (`is_error_str_context_window_exceeded`)."""
    model_config = SimpleNamespace(max_model_len=2048)
    engine: Any = SimpleNamespace(client=SimpleNamespace(model_config=model_config))
    errors = ErrorMapper("chat", engine)
    told = errors._too_long(f"The prompt {said}.")
    assert told.startswith("This model's maximum context length is 2048 tokens. ")
    assert errors._too_long(told) == told


@pytest.mark.parametrize(("asked", "left"), [(384, None), (100, 100), (None, None)])
def test_own_dimensions_of_a_model_ask_for_nothing(asked: int | None, left: int | None) -> None:
    request = SimpleNamespace(dimensions=asked)
    drop_own_size(request, SimpleNamespace(embedding_size=384))
    assert request.dimensions == left
    assert isinstance(vars(ModelConfig)["embedding_size"], property)


# Where vLLM raises the errors of a request.
_REACHED = [
    *("entrypoints/openai", "entrypoints/anthropic", "entrypoints/pooling", "entrypoints/generate"),
    *("renderers", "multimodal/processing", "multimodal/media", "tool_parsers"),
    *("v1/engine/input_processor.py", "sampling_params.py"),
]


def raised_texts() -> list[str]:
    """The texts with an option's name in what vLLM raises or returns as an error."""
    root = Path(vllm.__file__).parent
    paths = [path for name in _REACHED for path in [root / name, *(root / name).rglob("*.py")]]
    found: list[str] = []
    for path in filter(Path.is_file, paths):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_error = isinstance(node, ast.Raise) or (
                isinstance(node, ast.Call) and "error_response" in ast.unparse(node.func)
            )
            texts = [each for each in ast.walk(node) if isinstance(each, ast.Constant)]
            found += [str(text.value) for text in texts] if is_error else []
    return [text for text in found if "--" in text]


def test_option_of_vllm_is_a_key_of_the_registry_in_messages() -> None:
    texts = raised_texts()
    assert len(texts) > 10
    for text in texts:
        line = bounded_line(text)
        assert not re.search(r"--[a-z]", line), line
        keys = re.findall(r"`engine\.(\w+)[^`]*` \(registry\)", line)
        assert set(keys) <= ENGINE_ARGS.keys(), line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("set `--enable-mm-embeds` to", "set `engine.enable_mm_embeds` (registry) to"),
        ("passing `--runner pooling` to", "passing `engine.runner pooling` (registry) to"),
        ("a --pooler-config.task x", "a `engine.pooler_config.task` (registry) x"),
        ("a --reasoning-parser", "a `reasoning_parser` (registry)"),
    ],
)
def test_option_of_vllm_is_renamed(text: str, expected: str) -> None:
    assert bounded_line(text) == expected


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_tools_without_a_parser_name_the_registry_s_key(
    fake: Services, path: str, choice: str
) -> None:
    tool: dict[str, Any] = {"type": "function", "name": "go", "parameters": {}}
    body: dict[str, Any] = {"input": "hi", "tools": [tool], "tool_choice": choice}
    if path == "/v1/chat/completions":
        tool = {"type": "function", "function": {"name": "go"}}
        body = {"messages": [USER], "tools": [tool], "tool_choice": choice}
    elif path == "/v1/messages":
        tool = {"name": "go", "input_schema": {"type": "object"}}
        kind = {"type": {"auto": "auto", "required": "any"}[choice]}
        body = {"messages": [USER], "tools": [tool], "tool_choice": kind, "max_tokens": 4}
    reply = await post(fake, path, **body)
    assert reply.status_code == 400
    assert "Set `tool_call_parser` of the model in the registry" in reply.json()["error"]["message"]


async def test_built_in_tools_need_no_parser(fake: Services) -> None:
    tools = [{"type": "web_search"}]
    reply = await post(fake, "/v1/responses", input="hi", tools=tools, max_output_tokens=2)
    assert reply.status_code == 200


@pytest.mark.parametrize("endpoint", HANDLERS)
def test_null_in_any_field_is_as_if_left_out(endpoint: EndpointId) -> None:
    """What the body's reader leaves at the top; below, `bounded` does."""
    base = BASE[endpoint] | {"model": "m"}
    for field in fields_of(endpoint):
        if field not in base and "file" not in base:
            raw = json.dumps(base | {field: None}).encode()
            parse(endpoint, parse_body(raw))


@pytest.mark.parametrize("endpoint", UNSUPPORTED)
def test_unsupported_keys_are_unknown_to_vllm(endpoint: EndpointId) -> None:
    """A key that a new vLLM takes is to be supported."""
    assert UNSUPPORTED[endpoint].keys().isdisjoint(fields_of(endpoint))


@pytest.mark.parametrize("endpoint", UNSUPPORTED)
def test_successors_of_unsupported_keys_are_vllms(endpoint: EndpointId) -> None:
    successors = {each.partition(".")[0] for each in UNSUPPORTED[endpoint].values()}
    assert successors <= set(fields_of(endpoint))
