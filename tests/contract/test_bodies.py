"""Adversarial bodies through the whole app, with vLLM's front end on a fake engine core."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from pydantic import TypeAdapter, ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM

from llmserve.api.endpoints import ENDPOINTS
from llmserve.engine.endpoint_handlers import HANDLERS, parse
from llmserve.engine.pacing import PacedRendering
from llmserve.engine.request_validation import KEYS_LIMIT, bounded
from llmserve.http import app
from tests.unit.effort import LongestTurn, calls

if TYPE_CHECKING:
    from llmserve.api.endpoint_id import EndpointId
    from llmserve.http.services import Services

JSON_PATHS = [endpoint.paths[0] for endpoint in ENDPOINTS if not endpoint.multipart]
CALLS = 120_000  # of a callback on the loop: some 30 ms
USER = {"role": "user", "content": "hello"}
PLAIN: dict[str, Any] = {
    "model": "chat",
    "max_tokens": 2,
    "messages": [USER],
    "prompt": "hello",
    "input": "hello",
    "tokens": [1],
}
NESTED = "nested"  # stands for 900 levels, which json does not write
LEVELS = b'{"properties":[' * 450 + b"]}" * 450

BODIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bad messages": {"messages": [{"role": 1}] * 2000, "input": [{"role": 1}] * 2000},
    "many bad messages": {"messages": [{}] * 50_000, "input": [{}] * 50_000},
    "messages": {"messages": [USER] * 2048, "input": [USER] * 2048},
    "parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 4096}],
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}] * 4096}],
    },
    "texts": {"input": ["a"] * 2048, "prompt": ["a"] * 256, "tokens": ["a"] * 2048},
    "many texts": {"input": ["a"] * 100_000, "prompt": ["a"] * 100_000, "stop": ["a"] * 9000},
    "nulls": {"input": [None] * 50_000, "prompt": [None] * 50_000, "tokens": [None] * 50_000},
    "ids": {"input": [7] * 90_000, "prompt": [7] * 90_000, "tokens": [7] * 90_000},
    "id lists": {"input": [[7] * 90] * 1000, "prompt": [[7] * 90] * 256},
    "keys": {f"k{i}": i for i in range(50_000)},
    "unknown": {"x": [[]] * 50_000},
    "spaces": {"structured_outputs": {"regex": "{" + " " * 4000 + "," + " " * 4000}},
    "a long key": {"tools": {"k" * 15_000: [0] * 40_000}, "response_format": {"k" * 15_000: [0]}},
    "depth": {"tools": [NESTED], "chat_template_kwargs": NESTED, "metadata": NESTED},
    "depth of input": {"messages": NESTED, "input": NESTED, "prompt": NESTED, "tokens": NESTED},
    "free keys": {
        "logit_bias": {str(i): "x" for i in range(20_000)},
        "metadata": {str(i): "x" for i in range(20_000)},
        "chat_template_kwargs": {str(i): i for i in range(20_000)},
    },
    "template": {"chat_template": "{% for i in range(10**9) %}{% endfor %}"},
    "template as argument": {"chat_template_kwargs": {"chat_template": "{{ 'a' * 10**10 }}"}},
    "numbers": {"n": 10**9, "seed": 10**400, "top_k": 10**30, "max_tokens": 10**30, "min_p": -1e308},
    "many choices": {"n": 128},
    "words": {"bad_words": [f"w{i}" for i in range(1024)], "stop": ["a"] * 1024},
    "bias": {"allowed_token_ids": list(range(49_000)), "logit_bias": {str(i): 1 for i in range(4000)}},
    "a long text": {"messages": [{"role": "user", "content": "a " * 2_000_000}], "prompt": "a " * 2_000_000},
    "truncated": {"truncate_prompt_tokens": 2**62, "messages": [{"role": "user", "content": "a " * 300_000}]},
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
async def test_a_body_of_any_kind_takes_a_short_turn(fake: Services, name: str) -> None:
    transport = httpx.ASGITransport(app.build(fake))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        for path in JSON_PATHS:
            body = json.dumps(PLAIN | BODIES[name]).encode().replace(b'"nested"', LEVELS)
            with LongestTurn() as turn:
                reply = await client.post(path, content=body)
            assert reply.status_code in {200, 400, 413}, (path, reply.text[:300])
            assert turn.calls < CALLS, path
            if reply.status_code != 200:
                error = reply.json()["error"]
                too_large = path.startswith("/v1/messages") and reply.status_code == 413
                kind = "request_too_large" if too_large else "invalid_request_error"
                assert error["type"] == kind, (path, error)
                assert len(error["message"]) < 2000, path


MIB = 2**20
_HEAD = b'{"model":"chat","input":"a","messages":'
_USER = _HEAD + b'[{"role":"user","content":'
_IMAGE = b'[{"type":"image_url","image_url":{"url":"data:image/png;base64,'
LARGE: dict[str, tuple[bytes, bytes, int, bytes]] = {
    "numbers": (_HEAD + b"[", b"0,", 30 * MIB, b"0]}"),
    "objects": (_HEAD + b"[", b'{"role":1},', 5 * MIB, b"0]}"),
    "texts": (_HEAD + b"[", b'"a",', 15 * MIB, b'"a"]}'),
    "depth": (_HEAD, b"[", 60 * MIB, b""),
    "spaces": (b'{"model":"chat"', b" ", 60 * MIB, b"}"),
    "a text": (_USER + b'"', b"a ", 30 * MIB, b'"}]}'),
    "a text within the limit": (_USER + b'"', b"a ", 4 * MIB - 9, b'"}]}'),
    "an image": (_USER + _IMAGE, b"AAAA", 15 * MIB, b'"}}]}]}'),
}


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_bytes() -> int:
    """The most resident memory since `reset_peak`."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings"])
async def test_a_body_of_60_mib_takes_a_short_turn_and_memory_by_its_bytes(
    fake: Services, path: str, name: str
) -> None:
    head, piece, count, tail = LARGE[name]
    body = head + piece * count + tail
    transport = httpx.ASGITransport(app.build(fake))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        reset_peak()
        before = peak_bytes()
        with LongestTurn() as turn:
            reply = await client.post(path, content=body)
    assert reply.status_code in {400, 413}, reply.text[:300]
    assert turn.calls < CALLS
    assert peak_bytes() - before < 8 * len(body) + 32 * MIB


@pytest.mark.parametrize(
    "path",
    ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize"],
)
async def test_a_large_body_is_validated_in_the_body_thread(
    fake: Services, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    threads: list[str] = []

    def recorded(endpoint: EndpointId, body: dict[str, Any]) -> Any:
        threads.append(threading.current_thread().name)
        return parse(endpoint, body)

    monkeypatch.setattr("llmserve.engine.handlers.parse", recorded)
    transport = httpx.ASGITransport(app.build(fake))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        await client.post(path, json=PLAIN | {"metadata": {"a": "x" * 100_000}})
    assert threads == ["body_0"]


@pytest.mark.parametrize("name", HANDLERS)
def test_bounded_classes_stop_at_the_first_mistake(name: EndpointId) -> None:
    kind = HANDLERS[name].request
    wrong: dict[str, Any] = {key: [{"role": 1}] * 5000 for key in ("messages", "input", "tools")}
    wrong |= {"documents": [1] * 5000, "queries": [{}] * 5000, "tokens": ["a"] * 5000}

    def validate() -> int:
        with pytest.raises((ValidationError, VLLMValidationError)) as caught:
            kind.validate_python({"model": "m", "stop": [1] * 5000, "stream": "maybe"} | wrong)
        return caught.value.error_count() if isinstance(caught.value, ValidationError) else 1

    errors, steps = calls(validate)
    assert errors < 1000
    assert steps < 50_000


def test_bounded_list_of_texts_costs_no_branch_its_mistakes() -> None:
    body = {"model": "m", "input": ["a"] * 2000}
    expected, _ = calls(lambda: TypeAdapter(EmbeddingRequest).validate_python(body))
    found, steps = calls(lambda: bounded(EmbeddingRequest).validate_python(body))
    assert found.input == expected.input
    assert steps < 100_000


def test_bounded_object_has_a_limit_of_keys() -> None:
    body = {"messages": [USER], "logit_bias": {str(i): "x" for i in range(20 * KEYS_LIMIT)}}
    with pytest.raises(ValidationError) as caught:
        bounded(ChatCompletionRequest).validate_python(body)
    assert caught.value.error_count() == 1


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": {}}}}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        {"logit_bias": {"1": 2}, "stop": ["a"], "metadata": {"a": "b"}, "n": 2},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
    ],
    ids=["plain", "tools", "parts", "more", "schema"],
)
def test_bounded_validation_gives_what_vllm_s_gives(more: dict[str, Any]) -> None:
    body = {"messages": [USER]} | more
    expected = TypeAdapter(ChatCompletionRequest).validate_python(body)
    found = bounded(ChatCompletionRequest).validate_python(body)
    assert type(found) is ChatCompletionRequest
    assert found.model_fields_set == expected.model_fields_set
    made_up = {"request_id"}
    dumped = found.model_dump(mode="json", exclude=made_up)
    assert dumped == expected.model_dump(mode="json", exclude=made_up)


def test_vllm_adds_each_prompt_through_add_request(fake: Services) -> None:
    client = fake.pool.models["chat"].running.engine.client  # type: ignore[union-attr]
    assert isinstance(client.add_request, PacedRendering)
    for method in (AsyncLLM.generate, AsyncLLM.encode):
        assert "add_request" in method.__code__.co_names
