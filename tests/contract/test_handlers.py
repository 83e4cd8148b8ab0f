"""vLLM's serving objects behind our routes, on a fake engine core."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import re
import threading
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import pytest_asyncio
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseStreamEvent
from pydantic import TypeAdapter
from transformers import AutoTokenizer

from llmserve.api.endpoint_id import EndpointId
from llmserve.engine import token_count
from llmserve.engine.tokenization import BatchDecoder
from llmserve.errors import LLMServeError
from llmserve.http import app
from llmserve.lifecycle.health import HealthMonitor
from llmserve.registry.spec import ModelSpec
from tests.contract.fake_core import DIES, FAILS
from tests.contract.support import (
    CHAT,
    EMBED,
    HELLO,
    events,
    get,
    on_fake_core,
    post,
    running,
    services_of,
)
from tests.listening import listening

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from llmserve.http.services import Services


async def aborted(services: Services) -> int:
    running: Any = services.pool.models["chat"].running
    count: int = await running.engine.client.engine_core.call_utility_async("aborted")
    return count


async def test_a_stream_carries_the_name_that_was_asked_for(fake: Services) -> None:
    reply = await post(
        fake, "/v1/chat/completions", model="alias", messages=HELLO, stream=True, max_tokens=4
    )
    *chunks, done = events(reply.text)
    assert done == "[DONE]"
    assert {chunk["model"] for chunk in chunks} == {"alias"}
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def embedding() -> AsyncIterator[Services]:
    spec = ModelSpec(name="embed", model=str(EMBED))
    async with on_fake_core(spec, task="embed") as (serving, _):
        yield await services_of([spec], {"embed": serving})


async def test_a_model_that_embeds_has_no_routes_of_text(embedding: Services) -> None:
    reply = await post(embedding, "/v1/responses", model="embed", input="Hello")
    assert reply.status_code == HTTPStatus.BAD_REQUEST
    assert "embed" in reply.json()["error"]["message"]


async def test_embedding_of_another_size_is_refused(embedding: Services) -> None:
    """all-MiniLM-L6-v2 has 384 dimensions, and is not trained for fewer."""
    reply = await post(embedding, "/v1/embeddings", model="embed", input="Hello", dimensions=8)
    assert reply.status_code == HTTPStatus.BAD_REQUEST


async def test_prompt_that_is_too_long_is_counted(fake: Services) -> None:
    prompt = "hello " * 4000
    count = len(running(fake).engine.client.get_tokenizer().encode(prompt))
    reply = await post(fake, "/v1/completions", prompt=prompt, max_tokens=4)
    assert reply.status_code == HTTPStatus.BAD_REQUEST
    error = reply.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert re.search(rf"\b{count}\b", error["message"]), error["message"]


async def test_name_of_a_message_may_be_null(fake: Services) -> None:
    messages = [{"role": "user", "content": "Hello", "name": None}]
    reply = await post(fake, "/v1/chat/completions", messages=messages, max_tokens=4)
    assert reply.status_code == HTTPStatus.OK, reply.text


@pytest.mark.parametrize(("key", "text"), [("prompt", "hello " * 40), ("messages", HELLO)])
async def test_tokenize_refuses_more_tokens_than_the_limit(
    fake: Services, monkeypatch: pytest.MonkeyPatch, key: str, text: Any
) -> None:
    count = (await post(fake, "/tokenize", **{key: text})).json()["count"]
    monkeypatch.setattr(token_count, "LIMIT", count)
    whole = await post(fake, "/tokenize", **{key: text})
    assert (whole.json()["count"], len(whole.json()["tokens"])) == (count, count)
    monkeypatch.setattr(token_count, "LIMIT", count - 1)
    refused = await post(fake, "/tokenize", **{key: text})
    assert refused.status_code == HTTPStatus.BAD_REQUEST
    error = refused.json()["error"]
    assert f"more than {count - 1} tokens" in error["message"]
    assert error["param"] == key


async def test_token_strings_are_looked_up_in_a_thread(
    fake: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = running(fake).engine.client.get_tokenizer()
    threads: list[threading.Thread] = []
    convert = type(tokenizer).convert_ids_to_tokens

    def recorded(self: Any, ids: Any) -> Any:
        threads.append(threading.current_thread())
        return convert(self, ids)

    monkeypatch.setattr(type(tokenizer), "convert_ids_to_tokens", recorded)
    reply = await post(fake, "/tokenize", prompt="Größe it", return_token_strs=True)
    answer = reply.json()
    assert answer["token_strs"] == tokenizer.convert_ids_to_tokens(answer["tokens"])
    assert threads[0] is not threading.main_thread()


async def test_detokenize_releases_the_gil(fake: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is that of the tokenizer's own `decode`, which holds the GIL."""
    tokenizer = running(fake).engine.client.get_tokenizer()
    ids = [*range(1000), *tokenizer.encode("Größe, it 's   don't 🙂 <|im_end|>")]
    calls: list[int] = []
    decode = BatchDecoder.decode

    def counted(self: BatchDecoder, ids: Sequence[int], **options: bool) -> str:
        calls.append(len(ids))
        return decode(self, ids, **options)

    monkeypatch.setattr(BatchDecoder, "decode", counted)
    reply = await post(fake, "/detokenize", tokens=ids)
    assert reply.json() == {"prompt": tokenizer.decode(ids)}
    assert calls == [len(ids)]


@pytest.mark.parametrize("folder", [CHAT, EMBED], ids=["BPE", "WordPiece"])
def test_batch_decoder_leaves_texts_as_they_are(folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    shared = copy.copy(tokenizer)
    shared._tokenizer = BatchDecoder(tokenizer._tokenizer)
    ids = tokenizer.encode("It 's a test , isn't it ? Größe 🙂 . \n\n yes !") * 2
    assert shared.decode(ids) == tokenizer.decode(ids)
    assert shared.decode(ids, skip_special_tokens=True) == tokenizer.decode(
        ids, skip_special_tokens=True
    )


async def test_concurrent_requests_get_their_own_names_and_texts(fake: Services) -> None:
    async def ask(n: int) -> None:
        name = ("chat", "alias")[n % 2]
        prompt = f"number {n}"
        reply = await post(fake, "/v1/completions", model=name, prompt=prompt, max_tokens=8)
        answer = reply.json()
        assert answer["model"] == name
        assert answer["usage"]["completion_tokens"] == 8
        # The fake core says the prompt over and over.
        assert answer["choices"][0]["text"].startswith(prompt)

    await asyncio.gather(*(ask(n) for n in range(32)))


async def test_what_openai_does_not_allow_to_be_null_is_left_out(fake: Services) -> None:
    plain = (await post(fake, "/v1/chat/completions", messages=HELLO, max_tokens=2)).json()
    assert plain["choices"][0]["message"].keys() == {"role", "content", "refusal"}
    assert plain["usage"].keys() == {"prompt_tokens", "completion_tokens", "total_tokens"}
    streamed = await post(
        fake,
        "/v1/chat/completions",
        messages=HELLO,
        max_tokens=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in events(streamed.text)[:-1]:
        nulls = {key for choice in chunk["choices"] for key, v in choice.items() if v is None}
        assert nulls <= {"logprobs", "finish_reason"}
        assert None not in (v for key, v in chunk.items() if key != "usage")


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/v1/chat/completions", {}, "messages", "missing_required_parameter"),
        ("/v1/chat/completions", {"messages": "hi"}, "messages", "invalid_value"),
        (
            "/v1/chat/completions",
            {"messages": HELLO, "temperature": -1},
            "temperature",
            "invalid_value",
        ),
        (
            "/v1/chat/completions",
            {"messages": HELLO, "max_tokens": -1},
            "max_tokens",
            "invalid_value",
        ),
        ("/v1/chat/completions", {"messages": HELLO, "n": "x"}, "n", "invalid_value"),
        (
            "/v1/chat/completions",
            {"messages": HELLO, "logprobs": True, "top_logprobs": 500},
            "logprobs",
            "invalid_value",
        ),
        ("/v1/completions", {"prompt": "word " * 3000}, "prompt", "context_length_exceeded"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "word " * 3000}], "stream": True},
            "messages",
            "context_length_exceeded",
        ),
        ("/v1/embeddings", {"input": "hi"}, "model", "unsupported_model"),
        ("/v1/responses", {}, "input", "missing_required_parameter"),
    ],
)
async def test_a_bad_request_is_refused_before_the_first_byte(
    fake: Services, path: str, body: dict[str, Any], param: str, code: str
) -> None:
    reply = await post(fake, path, **body)
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 600
    assert "word word" not in error["message"]


async def test_a_request_that_fails_in_the_engine_ends_in_our_error(fake: Services) -> None:
    body = {"messages": HELLO, "max_tokens": 9, "seed": FAILS}
    plain = await post(fake, "/v1/chat/completions", **body)
    assert plain.status_code == 500
    assert plain.json()["error"]["type"] == "server_error"
    streamed = await post(fake, "/v1/chat/completions", **body, stream=True)
    assert streamed.status_code == 200
    *_, failure, done = events(streamed.text)
    assert done == "[DONE]"
    assert failure["error"].keys() == {"message", "type", "param", "code"}
    assert failure["error"]["code"] == "engine_error"


async def test_a_response_that_fails_ends_in_an_event_called_error(fake: Services) -> None:
    body = {"input": "hi", "max_output_tokens": 50, "stream": True, "seed": FAILS}
    reply = await post(fake, "/v1/responses", **body)
    assert reply.status_code == 200
    failure = reply.text.rstrip().rpartition("\n\n")[2]
    assert failure.startswith("event: error\ndata: {")
    error = json.loads(failure.partition("data: ")[2])
    assert error["type"] == "error"
    assert error["error"].keys() == {"message", "type", "param", "code"}
    assert all(error[key] == error["error"][key] for key in ("message", "param", "code"))
    assert error["sequence_number"] == len(events(reply.text)) - 1


async def test_messages_come_in_named_events(fake: Services) -> None:
    reply = await post(fake, "/v1/messages", messages=HELLO, max_tokens=20, stream=True)
    names = [line.removeprefix("event: ") for line in reply.text.splitlines() if "event: " in line]
    assert names[0] == "message_start"
    assert names[-1] == "message_stop"


def vllm_errors() -> list[Exception]:
    """One of each exception that vLLM has."""
    import vllm.exceptions
    from vllm.v1.engine.exceptions import EngineGenerateError

    errors: list[Exception] = [EngineGenerateError(), ValueError("bad"), TypeError("worse")]
    kinds = [kind for kind in vars(vllm.exceptions).values() if isinstance(kind, type)]
    return errors + [made(kind) for kind in kinds if issubclass(kind, vllm.exceptions.VLLMError)]


def made(kind: type[Exception]) -> Exception:
    for arguments in ((), ("words",), ("words", HTTPStatus.SERVICE_UNAVAILABLE)):
        with contextlib.suppress(TypeError):
            return kind(*arguments)
    raise AssertionError(f"{kind} takes other arguments")


async def test_every_exception_of_vllms_has_a_place(fake: Services) -> None:
    running: Any = fake.pool.models["chat"].running
    errors = vllm_errors()
    assert len(errors) > 12
    for error in errors:
        ours = running.errors.from_exception(error)
        assert isinstance(ours, LLMServeError)
        assert 400 <= ours.status < 600, error
        assert ours.code, error
        assert ours.message, error


async def test_what_vllm_did_not_foresee_keeps_its_words(fake: Services) -> None:
    running: Any = fake.pool.models["chat"].running
    ours = running.errors.from_exception(KeyError("internal_name"))
    assert ours.status == 500
    assert "internal_name" not in ours.message


def test_what_vllm_says_of_prompts_that_do_not_fit() -> None:
    from pathlib import Path

    import vllm

    from llmserve.engine.error_mapping import TOO_LONG

    root = Path(vllm.__file__).parent
    files = ("renderers/params.py", "v1/engine/input_processor.py", "entrypoints")
    sources = [path for name in files for path in [root / name, *(root / name).rglob("*.py")]]
    text = " ".join(re.sub(r'"\s*f?"', "", path.read_text()) for path in sources if path.is_file())
    for phrase in TOO_LONG:
        assert phrase in text, phrase


async def test_what_goes_on_in_the_background_holds_its_place(fake: Services) -> None:
    slots = fake.pool.models["chat"].slots
    body = {"input": "hi", "max_output_tokens": 1500, "background": True}
    made = (await post(fake, "/v1/responses", **body)).json()
    assert slots.in_flight == 1
    transport = httpx.ASGITransport(app.build(fake))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.post(f"/v1/responses/{made['id']}/cancel")
    async with asyncio.timeout(60):
        while slots.in_flight:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_has_its_request_aborted(fake: Services, stream: bool) -> None:
    before = await aborted(fake)
    body = {"model": "chat", "prompt": "hi", "max_tokens": 2000, "stream": stream}
    async with listening(app.build(fake)) as url, httpx.AsyncClient() as client:
        with contextlib.suppress(httpx.ReadTimeout):  # a plain answer is not waited for
            async with client.stream(
                "POST", f"{url}/v1/completions", json=body, timeout=0.5
            ) as reply:
                await anext(reply.aiter_bytes())
        async with asyncio.timeout(60):
            while await aborted(fake) == before:
                await asyncio.sleep(0.02)
    assert fake.pool.models["chat"].slots.in_flight == 0


async def test_a_response_can_be_fetched_again_and_cancelled(fake: Services) -> None:
    made = (await post(fake, "/v1/responses", input="hi", max_output_tokens=4)).json()
    assert made["object"] == "response"
    transport = httpx.ASGITransport(app.build(fake))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        again = (await client.get(f"/v1/responses/{made['id']}")).json()
        assert again["output"] == made["output"]
        unknown = await client.get("/v1/responses/resp_none")
        assert unknown.status_code == 404
        assert unknown.json()["error"]["code"] == "not_found"
        long = {"input": "hi", "max_output_tokens": 1500, "background": True}
        slow = (await post(fake, "/v1/responses", **long)).json()
        cancelled = await client.post(f"/v1/responses/{slow['id']}/cancel")
        assert cancelled.json()["status"] == "cancelled"
        again_cancelled = await client.post(f"/v1/responses/{slow['id']}/cancel")
        assert again_cancelled.json()["status"] == "cancelled"


async def test_a_dead_engine_fails_its_requests_and_nothing_else() -> None:
    spec = ModelSpec(name="chat", model=str(CHAT), engine={"max_model_len": 2048})
    async with on_fake_core(spec) as (serving, _):
        services = await services_of([spec], {"chat": serving})
        watch = asyncio.create_task(HealthMonitor(services.pool).run())
        reply = await post(
            services, "/v1/completions", prompt="hi", max_tokens=50, stream=True, seed=DIES
        )
        *_, failure, done = events(reply.text)
        assert done == "[DONE]"
        assert failure["error"]["code"] == "engine_dead"
        assert "trace" not in failure["error"]["message"]
        after = await post(services, "/v1/completions", prompt="hi")
        assert after.status_code == 503
        assert after.json()["error"]["code"] == "model_not_ready"
        assert int(after.headers["retry-after"]) >= 1
        async with asyncio.timeout(60):
            while services.pool.ready():
                await asyncio.sleep(0.05)
        watch.cancel()


def test_the_openapi_page_names_every_route(fake: Services) -> None:
    from llmserve.http import routes
    from llmserve.http.openapi import document

    page = document(routes.table())
    assert {"/v1/chat/completions", "/v1/embeddings", "/v1/models/{name}"} <= page["paths"].keys()
    body = page["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    reference = body["content"]["application/json"]["schema"]["$ref"]
    schema = page["components"]["schemas"][reference.rpartition("/")[2]]
    assert "messages" in schema["properties"]
    assert page["paths"]["/v1/responses/{response_id}"].keys() == {"get", "delete"}


# --- what is the model's or the client's own

WITH_NULLS: dict[str, Any] = {
    "city": "Paris",
    "unit": None,
    "filters": {"after": None},
    "l": [None],
}


async def sent(services: Services, endpoint: EndpointId, answer: Any) -> Any:
    """What a client gets of vLLM's answer to a request."""
    running: Any = services.pool.models["chat"].running
    return json.loads((await running._respond(answer, endpoint, lambda _: None)).body)


def tool_use(arguments: dict[str, Any]) -> Any:
    from vllm.entrypoints.anthropic.protocol import (
        AnthropicContentBlock,
        AnthropicMessagesResponse,
    )

    block = AnthropicContentBlock(type="tool_use", id="t", name="weather", input=arguments)
    return AnthropicMessagesResponse(id="m", content=[block], model="chat")


async def test_tool_input_of_a_message_keeps_its_nulls(fake: Services) -> None:
    (block,) = (await sent(fake, EndpointId.MESSAGES, tool_use(WITH_NULLS)))["content"]
    whole = {"type": "tool_use", "id": "t", "name": "weather", "input": WITH_NULLS}
    assert block == whole | {"caller": {"type": "direct"}}


@pytest.mark.parametrize("value", [10**30, -(10**30), "\ud83d", 1e-7, 0.1, float(10**22)])
async def test_tool_input_of_a_message_has_any_value(fake: Services, value: Any) -> None:
    (block,) = (await sent(fake, EndpointId.MESSAGES, tool_use({"x": value})))["content"]
    assert block["input"] == {"x": value}


async def test_tool_input_is_the_same_streamed_and_whole(fake: Services) -> None:
    from vllm.entrypoints.anthropic.protocol import AnthropicDelta, AnthropicStreamEvent

    from llmserve.engine.endpoint_handlers import HANDLERS

    delta = AnthropicDelta(type="input_json_delta", partial_json=json.dumps(WITH_NULLS))
    event = AnthropicStreamEvent(type="content_block_delta", index=0, delta=delta)
    frame = f"event: content_block_delta\ndata: {event.model_dump_json()}\n\n".encode()
    pruned = json.loads(HANDLERS[EndpointId.MESSAGES].pruned(frame).partition(b"data: ")[2])
    assert pruned.keys() == {"type", "index", "delta"}
    (block,) = (await sent(fake, EndpointId.MESSAGES, tool_use(WITH_NULLS)))["content"]
    assert json.loads(pruned["delta"]["partial_json"]) == block["input"]


RESPONSE_TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"unit": {"type": "string", "default": None}}},
}


@pytest.mark.parametrize("streamed", [False, True])
async def test_response_keeps_nulls_of_a_tools_parameters(
    fake: Services, *, streamed: bool
) -> None:
    body = {"input": "hi", "max_output_tokens": 2, "tools": [RESPONSE_TOOL], "stream": streamed}
    reply = await post(fake, "/v1/responses", **body, tool_choice="none")
    answers = (
        [reply.json()] if not streamed else [events(reply.text)[n]["response"] for n in (0, -1)]
    )
    for answer in answers:
        (tool,) = answer["tools"]
        assert tool["parameters"] == RESPONSE_TOOL["parameters"]
        assert tool["description"] is None  # a key that the schema requires
        assert "defer_loading" not in tool  # a null that is no data
        assert "kv_transfer_params" not in answer


async def test_response_keeps_nulls_of_a_text_formats_schema(fake: Services) -> None:
    schema = {"type": "object", "properties": {"x": {"default": None}}}
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    answer = (await post(fake, "/v1/responses", input="hi", max_output_tokens=2, text=text)).json()
    assert answer["text"]["format"]["schema"] == schema


def free_fields() -> list[tuple[type[Any], tuple[str, ...]]]:
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
    from vllm.entrypoints.openai.responses.protocol import ResponsesResponse

    return [
        (AnthropicMessagesResponse, ("content", "input")),
        (AnthropicMessagesResponse, ("kv_transfer_params",)),
        (ChatCompletionResponse, ("kv_transfer_params",)),
        (ChatCompletionResponse, ("prompt_logprobs",)),
        (ResponsesResponse, ("metadata",)),
        (ResponsesResponse, ("tools", "parameters")),
        (ResponsesResponse, ("text", "format", "schema")),
        (ResponsesResponse, ("prompt", "variables")),
        (ResponsesResponse, ("output", "arguments")),
        (ResponsesResponse, ("input_messages",)),
    ]


@pytest.mark.parametrize("number", range(10))
def test_free_field_of_a_response_model_is_data(number: int) -> None:
    from llmserve.engine.schema_nulls import schema_of

    kind, path = free_fields()[number]
    schema = schema_of(kind)
    for key in path[:-1]:
        below = schema.fields[key]
        assert below is not None, key
        schema = below
    assert schema.fields[path[-1]] is None


# --- stored responses


def test_vllm_uses_its_stores_as_responses_offers_them() -> None:
    import ast
    import inspect

    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    said = "llmserve/lifecycle/response_store.py stands for these dictionaries; look at how vLLM uses them now"
    names = {"response_store", "msg_store", "event_store", "background_tasks"}
    uses = [
        (node.value.attr, node.attr)
        for node in ast.walk(ast.parse(inspect.getsource(OpenAIServingResponses)))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr in names
    ]
    assert set(uses) == {
        ("response_store", "get"),
        ("msg_store", "get"),
        ("background_tasks", "get"),
        ("background_tasks", "pop"),
    }, said


async def test_response_id_is_never_the_clients(fake: Services) -> None:
    first = (await post(fake, "/v1/responses", input="hi", max_output_tokens=2)).json()
    for chosen in (first["id"], "mine", 7):
        body = {"input": "other", "max_output_tokens": 2, "request_id": chosen}
        made = (await post(fake, "/v1/responses", **body)).json()
        assert made["id"] not in {first["id"], chosen}
    transport = httpx.ASGITransport(app.build(fake))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        again = (await client.get(f"/v1/responses/{first['id']}")).json()
    assert again["output"] == first["output"]


async def test_response_of_another_key_cannot_be_continued(fake: Services) -> None:
    made = (await post(fake, "/v1/responses", input="hi", max_output_tokens=2)).json()
    more = {"input": "more", "max_output_tokens": 2, "previous_response_id": made["id"]}
    assert (await post(fake, "/v1/responses", **more)).status_code == 200
    entry = fake.pool.models["chat"]
    entry.responses._records[made["id"]].owner = "another"
    refused = await post(fake, "/v1/responses", **more)
    assert refused.status_code == 404
    assert refused.json()["error"]["param"] == "previous_response_id"


@pytest.mark.parametrize("cancelled", [False, True])
async def test_stream_of_response_in_background_ends(fake: Services, *, cancelled: bool) -> None:
    body = {"input": "hi", "background": True, "stream": True, "model": "chat"}
    limit = 1500 if cancelled else 4
    transport = httpx.ASGITransport(app.build(fake))
    async with listening(app.build(fake)) as url, httpx.AsyncClient(timeout=30) as client:
        asking = client.stream(
            "POST", f"{url}/v1/responses", json=body | {"max_output_tokens": limit}
        )
        async with asking as reply:
            lines = reply.aiter_lines()
            text = [await anext(lines), await anext(lines)]
            made = json.loads(text[1].removeprefix("data: "))["response"]
            if cancelled:
                await client.post(f"{url}/v1/responses/{made['id']}/cancel")
            async with asyncio.timeout(60):
                text += [line async for line in lines]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as other:
            again = await other.get(f"/v1/responses/{made['id']}?stream=true")
            stored = (await other.get(f"/v1/responses/{made['id']}")).json()
    names = [line for line in text if line.startswith("event: ")]
    assert ("event: response.incomplete" in names) is not cancelled
    assert names == [line for line in again.text.splitlines() if line.startswith("event: ")]
    assert (stored["status"] == "cancelled") is cancelled
    async with asyncio.timeout(60):
        while fake.pool.models["chat"].slots.in_flight:
            await asyncio.sleep(0.02)


# --- what schemas require

CALL = {
    "type": "function_call",
    "id": "fc_1",
    "call_id": "c1",
    "name": "f",
    "arguments": '{"a": 1}',
}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}


async def prompt_of_last(services: Services) -> list[int]:
    running: Any = services.pool.models["chat"].running
    last = await running.engine.client.engine_core.call_utility_async("last_request")
    ids: list[int] = last["prompt_token_ids"]
    return ids


@pytest.mark.parametrize("with_text", [True, False])
async def test_response_goes_on_with_the_calls_before(fake: Services, *, with_text: bool) -> None:
    first = (await post(fake, "/v1/responses", input="weather?", max_output_tokens=4)).json()
    running: Any = fake.pool.models["chat"].running
    stored = running._stored.part(first["id"], "response")
    text = first["output"] if with_text else []
    stored.output = [*(stored.output if with_text else []), ResponseFunctionToolCall(**CALL)]
    full = [{"role": "user", "content": "weather?"}, *text, CALL, RESULT]
    await post(fake, "/v1/responses", input=full, max_output_tokens=2)
    expected = await prompt_of_last(fake)
    more = {"input": [RESULT], "previous_response_id": first["id"], "max_output_tokens": 2}
    second = await post(fake, "/v1/responses", **more)
    assert await prompt_of_last(fake) == expected
    third = {"input": "go on", "previous_response_id": second.json()["id"]}
    await post(fake, "/v1/responses", **third, max_output_tokens=2)
    full += [*second.json()["output"], {"role": "user", "content": "go on"}]
    longer = await prompt_of_last(fake)
    await post(fake, "/v1/responses", input=full, max_output_tokens=2)
    assert await prompt_of_last(fake) == longer


REQUIRED = set(
    """id object created_at completed_at status incomplete_details model previous_response_id
    instructions output error tools tool_choice truncation parallel_tool_calls text top_p
    presence_penalty frequency_penalty top_logprobs temperature reasoning usage max_output_tokens
    max_tool_calls store background service_tier metadata safety_identifier
    prompt_cache_key""".split()  # noqa: SIM905  # a list of quoted words reads worse
)


def check_response(response: dict[str, Any]) -> None:
    """As the Open Responses schema and OpenAI's own types have it."""
    assert response.keys() >= REQUIRED
    Response.model_validate(response, strict=True)
    for item in response["output"]:
        for part in item.get("content", ()):
            assert part.keys() >= {"type", "text", "annotations", "logprobs"}
    for tool in response["tools"]:
        assert tool.keys() >= {"type", "name", "description", "parameters", "strict"}


async def test_response_has_every_required_key(calling: Services) -> None:
    tools = [{"type": "function", "name": "f"}]
    more = {"store": False, "safety_identifier": "who", "prompt_cache_key": "key"}
    body = {"input": "hi", "max_output_tokens": 4, "tools": tools}
    response = (await post(calling, "/v1/responses", **body)).json()
    check_response(response)
    assert response["store"] is True
    assert response["status"] == response["output"][-1]["status"] == "incomplete"
    echoed = (await post(calling, "/v1/responses", **body, **more)).json()
    assert {key: echoed[key] for key in more} == more


async def test_response_that_is_completed_says_when(fake: Services) -> None:
    body = {"input": "hi", "stop": ["system"], "max_output_tokens": 9}
    response = (await post(fake, "/v1/responses", **body)).json()
    check_response(response)
    assert response["status"] == "completed"
    assert response["completed_at"] >= response["created_at"]
    again = await get(fake, f"/v1/responses/{response['id']}")
    assert again.json() == response


@pytest.mark.parametrize("background", [False, True])
async def test_stream_of_response_cut_off_is_incomplete(
    fake: Services, *, background: bool
) -> None:
    body = {"input": "hi", "max_output_tokens": 4, "stream": True, "background": background}
    reply = await post(fake, "/v1/responses", **body)
    told = events(reply.text)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    *_, item, last = told
    assert item["type"] == "response.output_item.done"
    assert item["item"]["status"] == "incomplete"
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["response"]["output"][-1]["status"] == "incomplete"
    for event in told:
        TypeAdapter(ResponseStreamEvent).validate_python(event)
        if "response" in event:
            check_response(event["response"])


async def test_stream_of_response_that_ends_is_completed(fake: Services) -> None:
    body = {"input": "hi", "stop": ["assist"], "max_output_tokens": 40, "stream": True}
    *_, item, last = events((await post(fake, "/v1/responses", **body)).text)
    assert (item["item"]["status"], last["type"]) == ("completed", "response.completed")


@pytest.mark.parametrize(
    ("tool", "status"),
    [
        ({"type": "custom", "name": "x"}, 200),
        ({"type": "custom", "name": "x", "description": None, "format": {"type": "text"}}, 200),
        ({"type": "custom", "name": "x", "format": {"type": "grammar", "syntax": "lark"}}, 400),
        ({"type": "web_search"}, 200),
        ({"type": "nonsense"}, 400),
    ],
)
async def test_response_takes_tools_by_their_type(
    calling: Services, tool: dict[str, Any], status: int
) -> None:
    reply = await post(calling, "/v1/responses", input="hi", max_output_tokens=2, tools=[tool])
    assert reply.status_code == status
    if status == 400:
        message = reply.json()["error"]["message"]
        assert "only free-form text custom tools" in message or "'custom'" in message


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_of_a_chat_say_refusal(fake: Services, *, stream: bool) -> None:
    body = {"messages": HELLO, "max_tokens": 3, "logprobs": True, "stream": stream}
    reply = await post(fake, "/v1/chat/completions", **body)
    answers = events(reply.text)[:-1] if stream else [reply.json()]
    found = [choice["logprobs"] for answer in answers for choice in answer["choices"]]
    assert any(found)
    assert all(each["refusal"] is None for each in found if each is not None)


@pytest.mark.parametrize("stream", [False, True])
async def test_usage_of_a_message_counts_the_cache(fake: Services, *, stream: bool) -> None:
    reply = await post(fake, "/v1/messages", messages=HELLO, max_tokens=3, stream=stream)
    answers = events(reply.text) if stream else [reply.json()]
    found = [each.get("message", each).get("usage") for each in answers]
    usages = [usage for usage in found if usage is not None]
    assert len(usages) == 1 + stream
    for usage in usages:
        assert usage["cache_creation_input_tokens"] == usage["cache_read_input_tokens"] == 0


@pytest.mark.parametrize(
    ("body", "param"),
    [({"n": 0}, "n"), ({"min_tokens": -1}, "min_tokens"), ({"top_k": -5}, "top_k")],
)
async def test_refusal_of_vllm_s_names_its_parameter(
    fake: Services, body: dict[str, Any], param: str
) -> None:
    reply = await post(fake, "/v1/chat/completions", messages=HELLO, **body)
    assert reply.status_code == HTTPStatus.BAD_REQUEST
    assert reply.json()["error"]["param"] == param


async def test_message_of_calls_alone_has_no_content(fake: Services) -> None:
    call = {"type": "function", "id": "c", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse

    usage = {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1}
    answer = ChatCompletionResponse.model_validate(
        {"model": "chat", "choices": [choice], "usage": usage}
    )
    (came,) = (await sent(fake, EndpointId.CHAT_COMPLETIONS, answer))["choices"]
    assert came["message"]["content"] is None


# Required by Anthropic's OpenAPI document.
OF_MESSAGE = {"container", "stop_details", "stop_reason", "stop_sequence"}
OF_USAGE = {"output_tokens", "input_tokens", "output_tokens_details", "server_tool_use"}
OF_WHOLE_USAGE = OF_USAGE | {"cache_creation", "inference_geo", "service_tier"}


async def test_message_has_the_keys_of_anthropic_s_document_and_can_be_sent_back(
    fake: Services,
) -> None:
    reply = await post(fake, "/v1/messages", messages=HELLO, max_tokens=3)
    message = reply.json()
    assert message.keys() >= OF_MESSAGE
    assert message["usage"].keys() >= OF_WHOLE_USAGE
    (block,) = message["content"]
    assert block.keys() == {"type", "text", "citations"}
    turn = {"role": "assistant", "content": message["content"]}
    again = await post(fake, "/v1/messages", messages=[*HELLO, turn, *HELLO], max_tokens=3)
    assert again.status_code == HTTPStatus.OK


async def test_stream_of_a_message_has_the_keys_of_anthropic_s_document(fake: Services) -> None:
    reply = await post(fake, "/v1/messages", messages=HELLO, max_tokens=3, stream=True)
    found = {event["type"]: event for event in events(reply.text)}
    assert found["message_start"]["message"].keys() >= OF_MESSAGE
    assert found["message_start"]["message"]["usage"].keys() >= OF_WHOLE_USAGE
    assert found["content_block_start"]["content_block"].keys() == {"type", "text", "citations"}
    assert found["message_delta"]["delta"].keys() >= OF_MESSAGE
    assert found["message_delta"]["usage"].keys() >= OF_USAGE


ANTHROPIC = {
    "no JSON": (b"{", 400, "invalid_request_error"),
    "wrong": (b'{"messages": 5, "max_tokens": 5}', 400, "invalid_request_error"),
    "unknown model": (b'{"model": "gpt", "messages": []}', 404, "not_found_error"),
}


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize("case", ANTHROPIC)
async def test_error_of_messages_has_anthropic_s_shape(
    fake: Services, path: str, case: str
) -> None:
    content, status, kind = ANTHROPIC[case]
    transport = httpx.ASGITransport(app.build(fake))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        reply = await client.post(path, content=content)
    assert reply.status_code == status
    error = reply.json()
    assert error.keys() == {"type", "error", "request_id"}
    assert error["error"].keys() == {"type", "message"}
    assert (error["type"], error["error"]["type"]) == ("error", kind)
    assert error["request_id"] == reply.headers["x-request-id"]


async def test_message_that_fails_ends_in_anthropic_s_error(
    fake: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: Any = fake.pool.models["chat"].running
    handler = running._state.anthropic_serving_messages
    converted = handler.to_chat_completion_request

    def failing(*arguments: Any, **more: Any) -> Any:
        return converted(*arguments, **more).model_copy(update={"seed": FAILS})

    monkeypatch.setattr(handler, "to_chat_completion_request", failing)
    body = {"messages": HELLO, "max_tokens": 50, "stream": True}
    reply = await post(fake, "/v1/messages", **body)
    failure = reply.text.rstrip().rpartition("\n\n")[2]
    assert failure.startswith("event: error\n")
    error = json.loads(failure.partition("data: ")[2])
    assert error["type"] == "error"
    assert error["error"].keys() == {"type", "message"}
    assert error["error"]["type"] == "api_error"


async def test_responses_shared_again_are_rendered_through_one_wrapper(fake: Services) -> None:
    """A model shares them each time it becomes ready."""
    running: Any = fake.pool.models["chat"].running
    handler = running._state.openai_serving_responses
    render = handler._render_resolved_response_inputs
    running.share(running._stored)
    assert handler._render_resolved_response_inputs is render
