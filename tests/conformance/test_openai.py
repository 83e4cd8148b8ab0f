"""openai-python. Each answer is also held against the SDK's own types, which it does not do itself."""

from __future__ import annotations

import base64
import json
from array import array
from typing import Any, Literal

import openai
import pytest
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.conformance.conftest import KEY

FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": PARAMETERS,
        "strict": True,
    },
}
FLAT_WEATHER: Any = {"type": "function", **WEATHER["function"]}
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


class City(BaseModel):
    name: Literal["Paris", "Rome"]
    is_capital: bool


def valid(kind: Any, raw: openai.BaseModel) -> dict[str, Any]:
    """The answer as it was sent, once it is what the SDK's types say."""
    sent = json.loads(raw.to_json(exclude_unset=True))
    TypeAdapter(kind).validate_python(sent)
    return dict(sent)


@pytest.fixture
def client(base_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, api_key=KEY, max_retries=0, timeout=120)


@pytest.fixture
async def aclient(base_url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=base_url, api_key=KEY, max_retries=0, timeout=120)


class TestModels:
    def test_list(self, client: openai.OpenAI) -> None:
        cards = list(client.models.list())
        assert {"chat", "embed", "gpt-4o-mini"} <= {card.id for card in cards}
        for card in cards:
            valid(Model, card)

    def test_retrieve(self, client: openai.OpenAI) -> None:
        assert client.models.retrieve("gpt-4o-mini").id == "gpt-4o-mini"

    def test_retrieve_unknown(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as refused:
            client.models.retrieve("none")
        assert refused.value.code == "model_not_found"


class TestChat:
    def test_create(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            model="chat", messages=FRANCE, max_completion_tokens=16
        )
        sent = valid(ChatCompletion, answer)
        assert answer.id.startswith("chatcmpl-")
        assert answer._request_id
        assert "Paris" in str(answer.choices[0].message.content)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert (
            answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        )
        assert sent["choices"][0]["message"]["refusal"] is None
        assert sent["choices"][0]["logprobs"] is None

    async def test_async(self, aclient: openai.AsyncOpenAI) -> None:
        answer = await aclient.chat.completions.create(model="chat", messages=FRANCE)
        assert "Paris" in str(answer.choices[0].message.content)

    def test_all_roles(self, client: openai.OpenAI) -> None:
        roles = [("developer", "Be brief."), ("system", "Be kind."), ("user", "Hi.")]
        messages: Any = [{"role": role, "content": text, "name": "n"} for role, text in roles]
        client.chat.completions.create(model="chat", messages=messages, max_tokens=4)

    def test_content_parts(self, client: openai.OpenAI) -> None:
        parts: Any = [
            {"type": "text", "text": "What is the capital"},
            {"type": "text", "text": "of France?"},
        ]
        messages: Any = [{"role": "user", "content": parts}]
        answer = client.chat.completions.create(model="chat", messages=messages, max_tokens=16)
        assert "Paris" in str(answer.choices[0].message.content)

    def test_logprobs(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            model="chat", messages=FRANCE, max_tokens=3, logprobs=True, top_logprobs=2
        )
        valid(ChatCompletion, answer)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert len(logprobs.content) == 3
        assert [len(token.top_logprobs) for token in logprobs.content] == [2, 2, 2]
        assert b"".join(bytes(token.bytes or []) for token in logprobs.content).decode() == (
            answer.choices[0].message.content
        )

    def test_several_choices(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            model="chat", messages=FRANCE, n=2, temperature=1, seed=1, max_tokens=8
        )
        valid(ChatCompletion, answer)
        assert [choice.index for choice in answer.choices] == [0, 1]

    def test_stop(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(model="chat", messages=FRANCE, stop=["Paris"])
        assert "Paris" not in str(answer.choices[0].message.content)
        assert answer.choices[0].finish_reason == "stop"

    def test_length(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(model="chat", messages=FRANCE, max_tokens=2)
        assert answer.choices[0].finish_reason == "length"

    def test_openai_fields_without_effect(self, client: openai.OpenAI) -> None:
        client.chat.completions.create(
            model="chat",
            messages=FRANCE,
            max_tokens=2,
            store=False,
            metadata={"a": "b"},
            user="u",
            safety_identifier="s",
            prompt_cache_key="k",
            service_tier="auto",
            parallel_tool_calls=True,
            verbosity="low",
            tools=[WEATHER],
            tool_choice="none",
        )

    def test_stream(self, client: openai.OpenAI) -> None:
        stream = client.chat.completions.create(
            model="chat", messages=FRANCE, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        for chunk in chunks:
            valid(ChatCompletionChunk, chunk)
        assert len({chunk.id for chunk in chunks}) == 1
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert "Paris" in text
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None

    def test_stream_helper(self, client: openai.OpenAI) -> None:
        with client.chat.completions.stream(
            model="chat", messages=FRANCE, logprobs=True, max_tokens=12
        ) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion()
        assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= set(kinds)
        assert "Paris" in str(final.choices[0].message.content)

    async def test_async_stream(self, aclient: openai.AsyncOpenAI) -> None:
        stream = await aclient.chat.completions.create(model="chat", messages=FRANCE, stream=True)
        pieces = [c.choices[0].delta.content or "" async for c in stream]
        assert "Paris" in "".join(pieces)

    def test_parse(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.parse(model="chat", messages=FRANCE, response_format=City)
        assert isinstance(answer.choices[0].message.parsed, City)

    def test_json_object(self, client: openai.OpenAI) -> None:
        messages: Any = [{"role": "user", "content": 'Write JSON: {"city": "Paris"}'}]
        answer = client.chat.completions.create(
            model="chat", messages=messages, response_format={"type": "json_object"}, max_tokens=200
        )
        assert isinstance(json.loads(str(answer.choices[0].message.content)), dict)

    @pytest.mark.parametrize("choice", [NAMED, "required"], ids=["named", "required"])
    def test_forced_tool(self, client: openai.OpenAI, choice: Any) -> None:
        answer = client.chat.completions.create(
            model="chat", messages=FRANCE, tools=[WEATHER], tool_choice=choice
        )
        sent = valid(ChatCompletion, answer)
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
        assert answer.choices[0].finish_reason in ("stop", "tool_calls")
        assert sent["choices"][0]["message"]["content"] is None

    @pytest.mark.parametrize("choice", [NAMED, "required"], ids=["named", "required"])
    def test_forced_tool_stream(self, client: openai.OpenAI, choice: Any) -> None:
        with client.chat.completions.stream(
            model="chat", messages=FRANCE, tools=[WEATHER], tool_choice=choice
        ) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion()
        (call,) = final.choices[0].message.tool_calls or []
        assert "tool_calls.function.arguments.done" in kinds
        assert call.id
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")

    def test_tool_result(self, client: openai.OpenAI) -> None:
        call: Any = {
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
        }
        messages: Any = [
            *FRANCE,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "Sunny."},
        ]
        answer = client.chat.completions.create(
            model="chat", messages=messages, tools=[WEATHER], max_tokens=8
        )
        valid(ChatCompletion, answer)


class TestCompletions:
    def test_create(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(
            model="chat", prompt=["One, two,", "A, b,"], max_tokens=4, logprobs=1
        )
        valid(Completion, answer)
        assert [choice.index for choice in answer.choices] == [0, 1]
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert "".join(logprobs.tokens) == answer.choices[0].text

    def test_echo(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(
            model="chat", prompt="One, two,", max_tokens=4, logprobs=1, echo=True
        )
        assert answer.choices[0].text.startswith("One, two,")
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        # Nothing comes before the first token, so it has none, whatever the SDK's types say.
        assert logprobs.token_logprobs is not None
        assert logprobs.token_logprobs[0] is None

    def test_stream(self, client: openai.OpenAI) -> None:
        """The SDK's types know no chunk before the last: `finish_reason` is null in these."""
        chunks = list(
            client.completions.create(model="chat", prompt="One, two,", max_tokens=4, stream=True)
        )
        assert "".join(chunk.choices[0].text for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason == "length"
        valid(Completion, chunks[-1])


class TestEmbeddings:
    def test_formats_agree(self, client: openai.OpenAI) -> None:
        plain, packed = (
            client.embeddings.create(model="embed", input=["a", "b"], encoding_format=form)
            for form in ("float", "base64")
        )
        valid(CreateEmbeddingResponse, plain)
        assert [row.index for row in plain.data] == [0, 1]
        raw: Any = packed.data[0].embedding
        assert isinstance(raw, str)
        numbers = array("f", base64.b64decode(raw))
        assert list(numbers) == pytest.approx(plain.data[0].embedding, abs=1e-6)

    def test_default_format(self, client: openai.OpenAI) -> None:
        """The SDK asks for base64 and unpacks it."""
        answer = client.embeddings.create(model="embed", input="a")
        assert len(answer.data[0].embedding) == 384
        assert answer.usage.prompt_tokens == 3

    def test_token_ids(self, client: openai.OpenAI) -> None:
        answer = client.embeddings.create(model="embed", input=[[101, 1037, 102]])
        assert len(answer.data[0].embedding) == 384

    def test_dimensions_are_refused(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            client.embeddings.create(model="embed", input="a", dimensions=8)
        assert refused.value.param == "dimensions"


class TestResponses:
    def test_create(self, client: openai.OpenAI) -> None:
        answer = client.responses.create(
            model="chat", input="What is the capital of France?", instructions="Be brief."
        )
        valid(Response, answer)
        assert answer.status == "completed"
        assert "Paris" in answer.output_text
        assert answer.usage is not None

    def test_input_items(self, client: openai.OpenAI) -> None:
        items: Any = [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "input_text", "text": "Hi."}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "Hello."}]},
            {"type": "message", "role": "user", "content": "What is the capital of France?"},
        ]
        answer = client.responses.create(model="chat", input=items, max_output_tokens=16)
        valid(Response, answer)
        assert "Paris" in answer.output_text

    def test_incomplete(self, client: openai.OpenAI) -> None:
        answer = client.responses.create(model="chat", input="Tell a story.", max_output_tokens=16)
        assert answer.status == "incomplete"
        assert answer.incomplete_details is not None
        assert answer.incomplete_details.reason == "max_output_tokens"

    def test_stream(self, client: openai.OpenAI) -> None:
        events = list(
            client.responses.create(
                model="chat", input="Say hi.", stream=True, max_output_tokens=16
            )
        )
        for event in events:
            valid(ResponseStreamEvent, event)
        assert [event.sequence_number for event in events] == list(range(len(events)))
        kinds = [event.type for event in events]
        assert kinds[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert "response.output_text.delta" in kinds
        assert kinds[-1] in ("response.completed", "response.incomplete")

    def test_stream_helper(self, client: openai.OpenAI) -> None:
        with client.responses.stream(
            model="chat", input="What is the capital of France?"
        ) as stream:
            text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
            final = stream.get_final_response()
        assert text == final.output_text
        assert "Paris" in text

    def test_parse(self, client: openai.OpenAI) -> None:
        answer = client.responses.parse(
            model="chat", input="Which city is the capital of France?", text_format=City
        )
        assert isinstance(answer.output_parsed, City)

    @pytest.mark.parametrize(
        "choice", [{"type": "function", "name": "weather"}, "required"], ids=["named", "required"]
    )
    def test_forced_tool(self, client: openai.OpenAI, choice: Any) -> None:
        answer = client.responses.create(
            model="chat", input="Weather in Paris?", tools=[FLAT_WEATHER], tool_choice=choice
        )
        valid(Response, answer)
        (call,) = [item for item in answer.output if item.type == "function_call"]
        assert call.name == "weather"
        assert json.loads(call.arguments)["city"] in ("Paris", "Rome")

    def test_forced_tool_stream(self, client: openai.OpenAI) -> None:
        with client.responses.stream(
            model="chat", input="Weather in Paris?", tools=[FLAT_WEATHER], tool_choice="required"
        ) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_response()
        assert "response.function_call_arguments.done" in kinds
        (call,) = [item for item in final.output if item.type == "function_call"]
        assert call.name == "weather"

    def test_conversation(self, client: openai.OpenAI) -> None:
        first = client.responses.create(model="chat", input="My name is Ada.", max_output_tokens=16)
        second = client.responses.create(
            model="chat",
            input="What is my name?",
            previous_response_id=first.id,
            max_output_tokens=16,
        )
        assert "Ada" in second.output_text
        assert second.previous_response_id == first.id

    def test_retrieve(self, client: openai.OpenAI) -> None:
        made = client.responses.create(model="chat", input="Hi.", max_output_tokens=16)
        again = client.responses.retrieve(made.id)
        valid(Response, again)
        assert again.output_text == made.output_text

    def test_retrieve_unknown(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve("resp_none")

    def test_background(self, client: openai.OpenAI) -> None:
        made = client.responses.create(
            model="chat",
            input="Tell a long story.",
            background=True,
            extra_body={"ignore_eos": True},
        )
        assert made.status in ("queued", "in_progress")
        assert client.responses.cancel(made.id).status == "cancelled"

    def test_stored_items(self, client: openai.OpenAI) -> None:
        made = client.responses.create(model="chat", input="Hi.", max_output_tokens=16)
        assert list(client.responses.input_items.list(made.id))

    def test_delete(self, client: openai.OpenAI) -> None:
        made = client.responses.create(model="chat", input="Hi.", max_output_tokens=16)
        client.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(made.id)


class TestErrors:
    def test_unknown_model(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as refused:
            client.chat.completions.create(model="none", messages=FRANCE)
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")

    @pytest.mark.parametrize(
        ("field", "value"),
        [("temperature", "hot"), ("max_tokens", -1), ("top_p", 3), ("n", 0), ("stop", 5)],
    )
    def test_wrong_value(self, client: openai.OpenAI, field: str, value: Any) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="chat", messages=FRANCE, extra_body={field: value})
        assert refused.value.param == field
        assert refused.value.type == "invalid_request_error"

    def test_too_long(self, client: openai.OpenAI) -> None:
        messages: Any = [{"role": "user", "content": "word " * 3000}]
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="chat", messages=messages)
        assert refused.value.code == "context_length_exceeded"

    def test_in_a_stream(self, client: openai.OpenAI) -> None:
        messages: Any = [{"role": "user", "content": "word " * 3000}]
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="chat", messages=messages, stream=True)

    def test_route_that_is_not_served(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as refused:
            client.moderations.create(input="x")
        assert refused.value.code == "unknown_url"

    def test_images(self, client: openai.OpenAI) -> None:
        url = "data:image/png;base64,iVBORw0KGgo="
        parts: Any = [{"type": "image_url", "image_url": {"url": url}}]
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(
                model="chat", messages=[{"role": "user", "content": parts}]
            )

    def test_audio(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            client.audio.transcriptions.create(model="chat", file=("a.wav", b"RIFF"))
        assert refused.value.code == "unsupported_model"
