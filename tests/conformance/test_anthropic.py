"""Anthropic's Python SDK on /v1/messages."""

from __future__ import annotations

import json
from typing import Any, Literal

import anthropic
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.conformance.conftest import KEY

FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"temperature": 0}
WEATHER: Any = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
    },
}


FORCED: dict[str, Any] = {
    "model": "chat",
    "max_tokens": 200,
    "messages": FRANCE,
    "tools": [WEATHER],
    "extra_body": GREEDY,
}
forcing = pytest.mark.parametrize(
    "choice", [{"type": "tool", "name": "weather"}, {"type": "any"}], ids=["named", "any"]
)


class City(BaseModel):
    name: Literal["Paris", "Rome"]
    is_capital: bool


def valid(kind: Any, raw: Any) -> dict[str, Any]:
    """The answer as it was sent, once it is what the SDK's types say."""
    sent = json.loads(raw.to_json(exclude_unset=True))
    TypeAdapter(kind).validate_python(sent)
    return dict(sent)


def _client(origin: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=origin, api_key=KEY, max_retries=0, timeout=120)


@pytest.fixture
def client(origin: str) -> anthropic.Anthropic:
    return _client(origin)


class TestMessages:
    """Quick checks, which `make test` runs too."""

    @pytest.fixture
    def client(self, origin: str) -> anthropic.Anthropic:
        return _client(origin)

    def test_max_tokens(self, client: anthropic.Anthropic) -> None:
        answer = client.messages.create(model="chat", max_tokens=2, messages=FRANCE)
        assert answer.stop_reason == "max_tokens"
        assert answer.usage.output_tokens == 2

    def test_raw_stream(self, client: anthropic.Anthropic) -> None:
        events = list(
            client.messages.create(
                model="chat", max_tokens=16, messages=FRANCE, extra_body=GREEDY, stream=True
            )
        )
        for event in events:
            valid(RawMessageStreamEvent, event)
        kinds = [event.type for event in events]
        assert kinds[:2] == ["message_start", "content_block_start"]
        assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]

    def test_stream_helper(self, client: anthropic.Anthropic) -> None:
        with client.messages.stream(
            model="chat", max_tokens=16, messages=FRANCE, extra_body=GREEDY
        ) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert "Paris" in text
        assert final.stop_reason == "end_turn"
        assert final.usage.input_tokens > 0
        assert final.usage.output_tokens > 0

    @forcing
    def test_forced_tool(self, client: anthropic.Anthropic, choice: Any) -> None:
        answer = client.messages.create(**FORCED, tool_choice=choice)
        valid(Message, answer)
        (call,) = [block for block in answer.content if block.type == "tool_use"]
        assert call.name == "weather"
        assert call.input in ({"city": "Paris"}, {"city": "Rome"})
        assert answer.stop_reason == "tool_use"

    @forcing
    def test_forced_tool_stream(self, client: anthropic.Anthropic, choice: Any) -> None:
        with client.messages.stream(**FORCED, tool_choice=choice) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_message()
        assert "input_json" in kinds
        (call,) = [block for block in final.content if block.type == "tool_use"]
        assert call.input in ({"city": "Paris"}, {"city": "Rome"})
        assert final.stop_reason == "tool_use"

    def test_tool_choice_none(self, client: anthropic.Anthropic) -> None:
        answer = client.messages.create(
            model="chat",
            max_tokens=16,
            messages=FRANCE,
            tools=[WEATHER],
            tool_choice={"type": "none"},
        )
        assert [block.type for block in answer.content] == ["text"]

    def test_count_tokens(self, client: anthropic.Anthropic) -> None:
        counted = client.messages.count_tokens(model="chat", messages=FRANCE)
        valid(MessageTokensCount, counted)
        answer = client.messages.create(model="chat", max_tokens=2, messages=FRANCE)
        assert counted.input_tokens == answer.usage.input_tokens

    def test_unknown_model(self, client: anthropic.Anthropic) -> None:
        with pytest.raises(anthropic.NotFoundError) as refused:
            client.messages.create(model="none", max_tokens=2, messages=FRANCE)
        assert _error(refused.value)["type"] == "not_found_error"

    @pytest.mark.parametrize(
        "extra",
        [{"max_tokens": 0}, {"temperature": "hot"}, {"messages": "Hi"}, {"top_k": "x"}],
        ids=lambda extra: next(iter(extra)),
    )
    def test_wrong_value(self, client: anthropic.Anthropic, extra: dict[str, Any]) -> None:
        with pytest.raises(anthropic.BadRequestError) as refused:
            client.messages.create(model="chat", max_tokens=2, messages=FRANCE, extra_body=extra)
        error = _error(refused.value)
        assert error["type"] == "invalid_request_error"
        assert next(iter(extra)) in error["message"]

    def test_too_long(self, client: anthropic.Anthropic) -> None:
        messages: Any = [{"role": "user", "content": "word " * 3000}]
        with pytest.raises(anthropic.BadRequestError):
            client.messages.create(model="chat", max_tokens=2, messages=messages)


def test_create(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(model="claude-haiku", max_tokens=16, messages=FRANCE)
    valid(Message, answer)
    assert answer.model == "claude-haiku"
    assert answer.content[0].type == "text"
    assert "Paris" in answer.content[0].text
    assert answer.stop_reason == "end_turn"
    assert answer.usage.input_tokens > 0


def test_system_and_blocks(client: anthropic.Anthropic) -> None:
    system: Any = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "Hi."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]},
        *FRANCE,
    ]
    answer = client.messages.create(
        model="chat",
        max_tokens=16,
        system=system,
        messages=messages,
        extra_body={"temperature": 0, "top_p": 1, "top_k": 5, "metadata": {"user_id": "u"}},
    )
    valid(Message, answer)


def test_stop_sequence(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(
        model="chat", max_tokens=16, messages=FRANCE, stop_sequences=["Paris"]
    )
    assert answer.stop_reason == "stop_sequence"
    assert answer.stop_sequence == "Paris"


async def test_async_stream(origin: str) -> None:
    client = anthropic.AsyncAnthropic(base_url=origin, api_key=KEY)
    async with client.messages.stream(model="chat", max_tokens=16, messages=FRANCE) as stream:
        text = "".join([piece async for piece in stream.text_stream])
    assert "Paris" in text


def test_tool_result(client: anthropic.Anthropic) -> None:
    use = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Sunny."}
    messages: Any = [
        *FRANCE,
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
    ]
    answer = client.messages.create(model="chat", max_tokens=8, messages=messages, tools=[WEATHER])
    valid(Message, answer)


def test_parse(client: anthropic.Anthropic) -> None:
    answer = client.messages.parse(model="chat", max_tokens=64, messages=FRANCE, output_format=City)
    assert isinstance(answer.parsed_output, City)


def test_models(client: anthropic.Anthropic) -> None:
    cards = list(client.models.list())
    assert {"chat", "claude-haiku"} <= {card.id for card in cards}
    for card in [*cards, client.models.retrieve("chat")]:
        assert card.type == "model"
        assert card.display_name
        assert card.created_at.year > 2000


def _error(refused: anthropic.APIStatusError) -> dict[str, Any]:
    """The error in Anthropic's envelope."""
    body: Any = refused.body
    assert body["type"] == "error"
    return dict(body["error"])
