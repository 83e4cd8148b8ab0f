"""LiteLLM, as a client of OpenAI's routes, of vLLM's, and of Anthropic's."""

from __future__ import annotations

import json
from typing import Any

import litellm
import pytest
from pydantic import BaseModel

from tests.conformance.conftest import KEY
from tests.conformance.test_openai import FRANCE, WEATHER

PROVIDERS = ["openai", "hosted_vllm", "anthropic"]


class City(BaseModel):
    name: str
    is_capital: bool


@pytest.fixture(params=PROVIDERS)
def ask(request: pytest.FixtureRequest, origin: str) -> dict[str, Any]:
    """The arguments that lead to the server by a provider."""
    provider: str = request.param
    return {
        "model": f"{provider}/chat",
        "api_base": origin if provider == "anthropic" else f"{origin}/v1",
        "api_key": KEY,
        "max_tokens": 200,
        "timeout": 120,
        "max_retries": 0,
    }


def test_completion(ask: dict[str, Any]) -> None:
    answer = litellm.completion(messages=FRANCE, **ask)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 0


async def test_async(ask: dict[str, Any]) -> None:
    answer = await litellm.acompletion(messages=FRANCE, **ask)
    assert "Paris" in answer.choices[0].message.content


def test_stream(ask: dict[str, Any]) -> None:
    stream = litellm.completion(
        messages=FRANCE, stream=True, stream_options={"include_usage": True}, **ask
    )
    chunks = list(stream)
    whole = litellm.stream_chunk_builder(chunks, messages=FRANCE)
    assert "Paris" in whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens > 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("choice", ["required", "named"])
def test_forced_tool(ask: dict[str, Any], choice: str, stream: bool) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    answer = litellm.completion(
        messages=FRANCE,
        tools=[WEATHER],
        tool_choice=named if choice == "named" else choice,
        stream=stream,
        **ask,
    )
    if stream:
        answer = litellm.stream_chunk_builder(list(answer), messages=FRANCE)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


def test_response_format(ask: dict[str, Any]) -> None:
    answer = litellm.completion(messages=FRANCE, response_format=City, **ask)
    assert City.model_validate_json(answer.choices[0].message.content)


def test_unknown_model(ask: dict[str, Any]) -> None:
    provider = ask["model"].partition("/")[0]
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=FRANCE, **ask | {"model": f"{provider}/none"})


def test_wrong_value(ask: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(messages=FRANCE, top_p=3, **ask)


def test_too_long(ask: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "word " * 3000}]
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=messages, **ask)


def test_text_completion(base_url: str) -> None:
    answer = litellm.text_completion(
        model="text-completion-openai/chat",
        prompt="One, two,",
        max_tokens=4,
        api_base=base_url,
        api_key=KEY,
    )
    assert answer.choices[0].text


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_embedding(base_url: str, provider: str) -> None:
    answer = litellm.embedding(
        model=f"{provider}/embed", input=["a", "b"], api_base=base_url, api_key=KEY
    )
    assert [len(row["embedding"]) for row in answer.data] == [384, 384]


def test_rerank(origin: str) -> None:
    answer = litellm.rerank(
        model="hosted_vllm/embed",
        query="small cat",
        documents=["The stock market fell.", "A kitten is a young cat."],
        api_base=origin,
        api_key=KEY,
    )
    assert answer.results[0]["index"] == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_responses(base_url: str, stream: bool) -> None:
    answer = litellm.responses(
        model="openai/chat",
        input="What is the capital of France?",
        max_output_tokens=32,
        stream=stream,
        api_base=base_url,
        api_key=KEY,
    )
    if stream:
        answer = list(answer)[-1].response
    assert "Paris" in answer.output[0].content[0].text
