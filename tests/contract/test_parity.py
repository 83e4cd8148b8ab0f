"""Our answers and stock vLLM's, from the same engines: the same but for what is ours.

Both servers run in this process on the same two CPU engines, so that a difference can
only come from the layer above them. Left out: ids, times, error bodies, and nulls that
OpenAI's schemas do not allow.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import pytest_asyncio
from starlette.datastructures import State

from llmserve.engine import required_keys
from llmserve.http import app
from llmserve.registry.spec import ModelSpec
from tests.contract.support import CHAT, CHATS, COMPLETIONS, EMBED, services_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from starlette.types import ASGIApp

_VARY = {
    "id",
    "created",
    "created_at",
    "completed_at",
    "system_fingerprint",
    "item_id",
    "request_id",
}

ASK = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,  # else vLLM's forced calls may have any JSON as arguments
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}
NAMED = {"type": "function", "function": {"name": "weather"}}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}

ONCE = {"prompt": "Once upon a time", "max_tokens": 24}

Pair = tuple[httpx.AsyncClient, httpx.AsyncClient]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def servers(engine_logs: Path) -> AsyncIterator[dict[str, Pair]]:
    """Ours and stock vLLM's for each model."""
    from llmserve.engine.handlers import ModelHandlers
    from llmserve.engine.launcher import Launcher

    specs = [
        ModelSpec(
            name="chat",
            model=str(CHAT),
            kv_cache="512MiB",
            tool_call_parser="hermes",
            engine={"max_model_len": 1024, "max_num_seqs": 32, "dtype": "float32"},
        ),
        ModelSpec(name="embed", model=str(EMBED)),
    ]
    launcher = Launcher(engine_logs)
    engines = await asyncio.gather(*(asyncio.to_thread(launcher.start, spec) for spec in specs))
    running = {s.name: await ModelHandlers.build(s, e) for s, e in zip(specs, engines, strict=True)}
    ours = _client(app.build(await services_of(specs, running)))
    pairs = {
        s.name: (ours, _client(await _stock(s, e))) for s, e in zip(specs, engines, strict=True)
    }
    yield pairs
    await asyncio.gather(*(serving.stop() for serving in running.values()))
    launcher.stop()


async def _stock(spec: ModelSpec, engine: Any) -> ASGIApp:
    """vLLM's own FastAPI app on an engine."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from llmserve.engine.cli_args import make_arg_parser

    line = ["--model", spec.model, "--served-model-name", spec.name]
    if spec.tool_call_parser:
        line += ["--enable-auto-tool-choice", "--tool-call-parser", spec.tool_call_parser]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(line)
    tasks = await engine.client.get_supported_tasks()
    stock: Any = build_app(args, tasks, engine.client.model_config)
    assert isinstance(stock.state, State)
    await init_app_state(engine.client, stock.state, args, tasks)
    served: ASGIApp = stock
    return served


def _client(served: ASGIApp) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(served)
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=120)


def comparable(value: Any) -> Any:
    """Without what varies from call to call, and without nulls."""
    if isinstance(value, dict):
        return {k: comparable(v) for k, v in value.items() if v is not None and k not in _VARY}
    if isinstance(value, list):
        return [comparable(v) for v in value]
    return value


def nearly(value: Any) -> Any:
    """Equal to what differs only by rounding: a sum depends on the engine step's batch."""
    if isinstance(value, dict):
        return {k: nearly(v) for k, v in value.items()}
    if isinstance(value, list):
        return [nearly(v) for v in value]
    return pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value


def content(reply: httpx.Response, whole: Callable[[Any], Any] = lambda value: value) -> Any:
    """What can be compared of an answer, whose objects `whole` completes."""
    if reply.headers["content-type"].startswith("text/event-stream"):
        lines = [line for line in reply.text.splitlines() if line and not line.startswith(":")]
        events = [
            event
            for line in lines
            for event in (_split(json.loads(line[6:])) if line[:7] == "data: {" else [line])
        ]
        return [
            comparable(whole(comparable(each))) if isinstance(each, dict) else each
            for each in events
        ]
    return comparable(whole(comparable(reply.json())))


def _split(event: Any) -> list[Any]:
    is_chat = event.get("object") == "chat.completion.chunk"
    return required_keys.split_end(event) if is_chat else [event]


# What published schemas require and vLLM leaves out.
WHOLE: dict[str, Callable[[Any], Any]] = {
    CHATS: required_keys.complete_chat,
    "/v1/responses": required_keys.complete_response,
    "/v1/messages": required_keys.complete_message,
}
# An answer that is not cut off: vLLM says of one in a stream that it is complete.
CAPITAL = {
    "instructions": "You are a helpful assistant.",
    "input": "Name the capital of Japan.",
    "max_output_tokens": 32,
}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    CHATS: {
        "plain": {"messages": ASK},
        "stream": {"messages": ASK, "stream": True, "stream_options": {"include_usage": True}},
        "n and stop": {"messages": ASK, "n": 2, "stop": ["Paris"], "temperature": 0.7, "seed": 7},
        "logprobs": {"messages": ASK, "max_tokens": 5, "logprobs": True, "top_logprobs": 3},
        "logprobs stream": {"messages": ASK, "max_tokens": 5, "logprobs": True, "stream": True},
        "tools auto": {"messages": ASK, "tools": [WEATHER]},
        "tools required": {"messages": ASK, "tools": [WEATHER], "tool_choice": "required"},
        "tools named": {"messages": ASK, "tools": [WEATHER], "tool_choice": NAMED},
        "structured": {
            "messages": ASK,
            "max_tokens": 60,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "person", "schema": PERSON},
            },
        },
        "structured stream": {
            "messages": ASK,
            "stream": True,
            "max_tokens": 60,
            "structured_outputs": {"choice": ["yes", "no"]},
        },
    },
    COMPLETIONS: {
        "plain": ONCE,
        "batch": {"prompt": ["One", "Two"], "max_tokens": 6, "echo": True, "logprobs": 2},
        "stream": ONCE | {"stream": True, "stream_options": {"include_usage": True}},
    },
    "/v1/responses": {"plain": CAPITAL, "stream": CAPITAL | {"stream": True}},
    "/v1/messages": {
        "plain": {"messages": ASK, "max_tokens": 12},
        "stream": {"messages": ASK, "max_tokens": 12, "stream": True},
    },
    "/v1/messages/count_tokens": {"plain": {"messages": ASK}},
    "/tokenize": {
        "plain": {"prompt": "Hello wörld 👋", "return_token_strs": True},
        "chat": {"messages": ASK},
    },
    "/detokenize": {"plain": {"tokens": [19556, 905]}},
    "/v1/embeddings": {
        "batch": {"input": ["Hello", "world"]},
        "base64": {"input": "Hello", "encoding_format": "base64"},
    },
    "/pooling": {"plain": {"input": "Hello"}},
    "/v1/score": {"batch": {"text_1": "cat", "text_2": ["dog", "car"]}},
    "/rerank": {"batch": {"query": "cat", "documents": ["dog", "kitten", "car"]}},
}
_EMBED = {"/v1/embeddings", "/pooling", "/v1/score", "/rerank"}
_GREEDY = {CHATS, COMPLETIONS, "/v1/responses", "/v1/messages"}


@pytest.mark.parametrize(("path", "case"), [(path, case) for path in CASES for case in CASES[path]])
async def test_the_answer_is_stock_vllms(servers: dict[str, Pair], path: str, case: str) -> None:
    model = "embed" if path in _EMBED else "chat"
    body = {"model": model} | ({"temperature": 0} if path in _GREEDY else {}) | CASES[path][case]
    ours, stock = servers[model]
    expected = await stock.post(path, json=body)
    got = await ours.post(path, json=body)
    assert expected.status_code == 200, expected.text
    assert got.status_code == 200, got.text
    same = nearly if case == "batch" else lambda value: value  # in one step, or in several
    assert content(got) == same(content(expected, WHOLE.get(path, comparable)))


async def test_a_streamed_call_is_stock_vllms_in_pieces_of_its_own(
    servers: dict[str, Pair],
) -> None:
    body = {"model": "chat", "temperature": 0, "messages": ASK, "tools": [WEATHER]}
    ours, stock = servers["chat"]
    calls = []
    for client in (stock, ours):
        reply = await client.post(CHATS, json=body | {"tool_choice": NAMED, "stream": True})
        choices = [each["choices"][0] for each in content(reply) if isinstance(each, dict)]
        parts = [
            part["function"] for each in choices for part in each["delta"].get("tool_calls", [])
        ]
        names = "".join(part.get("name", "") for part in parts)
        calls.append((names, "".join(part.get("arguments", "") for part in parts), choices[-1]))
    assert calls[0][0] == "weather"
    assert calls[0] == calls[1]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHATS, {"messages": []}),
        (CHATS, {"messages": ASK, "temperature": 9e9}),
        (CHATS, {"messages": ASK, "max_tokens": 0}),
        (CHATS, {"messages": ASK, "tool_choice": "required"}),
        (CHATS, {"messages": ASK, "structured_outputs": {"regex": "("}}),
        (COMPLETIONS, {"prompt": "x" * 40000}),
        (COMPLETIONS, {}),
        ("/tokenize", {}),
        ("/v1/messages", {"messages": ASK}),
    ],
)
async def test_the_status_of_a_refusal_is_stock_vllms(
    servers: dict[str, Pair], path: str, body: dict[str, Any]
) -> None:
    ours, stock = servers["chat"]
    body = {"model": "chat"} | body
    expected, got = await stock.post(path, json=body), await ours.post(path, json=body)
    assert got.status_code == expected.status_code, (got.text, expected.text)
    if got.status_code != 200:
        keys = (
            {"message", "type"} if path == "/v1/messages" else {"message", "type", "param", "code"}
        )
        assert got.json()["error"].keys() == keys


async def test_the_model_knows_the_capital(servers: dict[str, Pair]) -> None:
    ours, _ = servers["chat"]
    body = {"model": "chat", "temperature": 0, "messages": ASK}
    reply = await ours.post(CHATS, json=body)
    assert "Paris" in reply.json()["choices"][0]["message"]["content"]


def test_engine_output_goes_to_the_models_log(servers: dict[str, Pair], engine_logs: Path) -> None:
    text = (engine_logs / "model-chat.log").read_text()
    assert "EngineCore" in text
    assert "INFO" in text
