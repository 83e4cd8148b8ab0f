"""Both demo models on one port, with the clients of users."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, SecretStr

# The quick ones of the SDKs' checks run here too, on this file's engines.
from tests.conformance.test_anthropic import TestMessages  # noqa: F401  # collected
from tests.conformance.test_openai import TestCompletions, TestModels  # noqa: F401  # collected
from tests.integration.conftest import START_S, STOP_S, Server, left_in, shared_by, until
from tests.readme import ANSWER, BODY, QUESTION, REPLY, SYSTEM

FRANCE: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def base_url(server: Server) -> str:
    return f"{server.url}/v1"


@pytest.fixture
def origin(server: Server) -> str:
    return server.url


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


# --- first steps


def test_curl(server: Server) -> None:
    line = ["curl", "-s", f"{server.url}/v1/chat/completions", "-d", BODY]
    line += ["-H", "Content-Type: application/json"]
    reply = subprocess.run(line, capture_output=True, text=True, check=True)
    answered = json.loads(reply.stdout)
    assert answered["choices"] == REPLY["choices"]
    assert answered["usage"] == REPLY["usage"]


def test_an_embedding_has_384_numbers_of_unit_length(client: openai.OpenAI) -> None:
    vector = client.embeddings.create(model="embed", input="Hello").data[0].embedding
    assert len(vector) == 384
    assert math.isclose(math.hypot(*vector), 1, abs_tol=1e-3)
    explicit = client.embeddings.create(model="embed", input="Hello", dimensions=384)
    assert explicit.data[0].embedding == pytest.approx(vector, abs=1e-5)


def test_snippets_of_fastchat_users(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="chat", prompt="Once upon a time", max_tokens=64)
    assert completion.choices[0].text
    assert completion.usage is not None
    assert completion.usage.completion_tokens <= 64
    chat = client.chat.completions.create(
        model="chat", messages=[{"role": "user", "content": "Hello! What is your name?"}]
    )
    assert chat.choices[0].message.content


def test_langchain(server: Server) -> None:
    key = SecretStr("none")
    model = ChatOpenAI(model="chat", base_url=f"{server.url}/v1", api_key=key, temperature=0)
    asked = [SystemMessage(SYSTEM), HumanMessage(QUESTION)]
    assert model.invoke(asked).content == ANSWER
    pieces = [str(chunk.content) for chunk in model.stream(asked)]
    assert len(pieces) > 3
    assert "".join(pieces) == ANSWER

    @tool
    def weather(city: str) -> str:
        """The weather in a city."""
        return city

    forced = model.bind_tools([weather], tool_choice="weather", strict=True)
    message = forced.invoke([HumanMessage("How is the weather in Paris?")])
    assert isinstance(message, AIMessage)
    assert [call["name"] for call in message.tool_calls] == ["weather"]
    assert message.tool_calls[0]["args"].keys() == {"city"}

    vectors = OpenAIEmbeddings(
        model="embed",
        openai_api_base=f"{server.url}/v1",
        openai_api_key=key,
        check_embedding_ctx_length=False,
    ).embed_documents(["one", "two"])
    assert [len(vector) for vector in vectors] == [384, 384]


def test_chat_in_the_terminal(server: Server) -> None:
    line = [sys.executable, "-m", "llmserve", "chat", "chat", "--url", server.url]
    line += ["--temperature", "0", "--max-tokens", "24", "--system", SYSTEM]
    asked = f"{QUESTION}\n!!reset\nSay hi.\n"
    ended = subprocess.run(line, input=asked, capture_output=True, text=True, check=True)
    assert ANSWER in ended.stdout


# --- names


@pytest.mark.parametrize("name", ["chat", "gpt-4o-mini", "chat@2025-10", "twisted"])
def test_an_answer_carries_the_name_that_was_asked_for(client: openai.OpenAI, name: str) -> None:
    answer = client.chat.completions.create(model=name, messages=FRANCE, max_tokens=4)
    assert answer.model == name
    stream = client.chat.completions.create(model=name, messages=FRANCE, max_tokens=4, stream=True)
    assert {chunk.model for chunk in stream} == {name}


def test_an_adapter_answers_for_itself(client: openai.OpenAI) -> None:
    texts = {
        name: client.chat.completions.create(
            model=name, messages=FRANCE, max_tokens=12, temperature=0
        )
        .choices[0]
        .message.content
        for name in ("chat", "twisted")
    }
    assert texts["chat"] != texts["twisted"]


def test_the_list_of_models(client: openai.OpenAI) -> None:
    cards = {card.id: card for card in client.models.list()}
    assert cards.keys() == {"chat", "gpt-4o-mini", "chat@2025-10", "twisted", "embed"}
    assert client.models.retrieve("chat@2025-10").id == "chat@2025-10"
    with pytest.raises(openai.NotFoundError, match="did you mean `chat`"):
        client.models.retrieve("chad")


def test_unknown_model_is_refused_with_the_nearest_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="gpt-4o-mimi", messages=FRANCE)
    assert refused.value.code == "model_not_found"
    assert "did you mean `gpt-4o-mini`" in refused.value.message


def test_unsupported_endpoint_is_refused_with_supported_ones(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"supported: .*embeddings") as refused:
        client.chat.completions.create(model="embed", messages=FRANCE)
    assert refused.value.code == "unsupported_model"
    with pytest.raises(openai.BadRequestError, match=r"supported: .*chat completions"):
        client.embeddings.create(model="chat", input="hi")
    with pytest.raises(openai.BadRequestError, match="does not support transcriptions"):
        client.audio.transcriptions.create(model="chat", file=("a.wav", b"RIFF"))


# --- what vLLM offers


def test_streams_count_tokens_when_asked(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="chat",
        messages=FRANCE,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "Paris" in text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 3


def test_structured_output(client: openai.OpenAI) -> None:
    class City(BaseModel):
        capital: bool
        inhabitants: int

    answer = client.chat.completions.parse(
        model="chat", messages=FRANCE, response_format=City, temperature=0, max_tokens=40
    )
    assert isinstance(answer.choices[0].message.parsed, City)


def test_responses(client: openai.OpenAI) -> None:
    made = client.responses.create(model="chat", input="Say hi.", max_output_tokens=16)
    assert made.output_text
    assert client.responses.retrieve(made.id).output_text == made.output_text
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError, match="no stored response"):
        client.responses.retrieve(made.id)
    slow = client.responses.create(
        model="gpt-4o-mini",
        input="Count up.",
        background=True,
        max_output_tokens=1500,
        extra_body={"ignore_eos": True},  # else it may be done before it is cancelled
    )
    assert client.responses.cancel(slow.id).status == "cancelled"
    types = [event.type for event in client.responses.create(model="chat", input="Hi", stream=True)]
    assert types[0] == "response.created"
    assert types[-1] in ("response.completed", "response.incomplete")


def test_messages(server: Server) -> None:
    body = {"model": "chat", "max_tokens": 16, "messages": FRANCE, "temperature": 0}
    answer = server.post("/v1/messages", **body).json()
    assert answer["type"] == "message"
    assert answer["model"] == "chat"
    assert "Paris" in answer["content"][0]["text"]
    counted = server.post("/v1/messages/count_tokens", model="chat", messages=FRANCE).json()
    assert counted["input_tokens"] == answer["usage"]["input_tokens"]


def test_scores_and_ranks(server: Server) -> None:
    documents = ["The stock market fell.", "A kitten is a young cat."]
    ranked = server.post("/v1/rerank", model="embed", query="small cat", documents=documents).json()
    assert ranked["results"][0]["index"] == 1
    scored = server.post("/v1/score", model="embed", text_1="cat", text_2=["kitten", "tax"]).json()
    kitten, tax = (row["score"] for row in scored["data"])
    assert kitten > tax


def test_tokens_there_and_back(server: Server) -> None:
    tokens = server.post("/tokenize", model="chat", prompt="Hello wörld 👋").json()["tokens"]
    again = server.post("/detokenize", model="chat", tokens=tokens).json()
    assert again["prompt"] == "Hello wörld 👋"


# --- many at once


async def test_32_streams_over_both_models(server: Server) -> None:
    """Each stream is whole and its own, while embeddings of the other model come in between."""
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    async def count(n: int) -> tuple[int, str, int]:
        stream = await client.completions.create(
            model="chat",
            prompt=f"Item {n}:",
            max_tokens=40,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        text, tokens = "", 0
        async for chunk in stream:
            text += chunk.choices[0].text if chunk.choices else ""
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        return n, text, tokens

    async def embed(n: int) -> list[float]:
        reply = await client.embeddings.create(model="embed", input=f"text {n % 4}")
        return reply.data[0].embedding

    alone = [await embed(n) for n in range(4)]
    one = await count(3)
    streams, vectors = await asyncio.gather(
        asyncio.gather(*(count(n) for n in range(32))),
        asyncio.gather(*(embed(n) for n in range(32))),
    )
    assert [n for n, _, _ in streams] == list(range(32))
    assert {tokens for _, _, tokens in streams} == {40}
    assert len({text for _, text, _ in streams}) > 16
    # Sums differ with the batch: the beginning is what must be the same.
    assert streams[3][1][:20] == one[1][:20]
    for n, vector in enumerate(vectors):
        assert math.isclose(sum(map(float.__mul__, vector, alone[n % 4])), 1, abs_tol=1e-2)


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_frees_the_place_in_the_batch(server: Server, stream: bool) -> None:
    body = {"model": "chat", "prompt": "Count:", "max_tokens": 2000, "ignore_eos": True}
    with httpx.Client(timeout=2) as client:
        try:
            with client.stream(
                "POST", f"{server.url}/v1/completions", json=body | {"stream": stream}
            ) as reply:
                pieces = reply.iter_bytes()
                next(pieces)
                until(lambda: server.running("chat") == 1)
        except httpx.ReadTimeout:
            assert not stream
    until(lambda: server.running("chat") == 0)
    until(lambda: server.metric("llmserve_requests_in_flight", model="chat") == 0)


# --- the process


def test_health_ready_version(server: Server) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    ready = httpx.get(f"{server.url}/ready")
    assert ready.status_code == 200
    assert ready.json()["models"] == {"chat": {"state": "ready"}, "embed": {"state": "ready"}}
    assert "version" in httpx.get(f"{server.url}/version").json()


def test_all_engines_are_on_the_metrics_page(server: Server) -> None:
    for model in ("chat", "embed"):
        assert server.metric("vllm:cache_config_info", model_name=model) or server.metric(
            "vllm:request_success_total", model_name=model
        )
        assert server.metric("llmserve_model_state", model=model, state="ready") == 1
    assert server.metric("llmserve_event_loop_lag_seconds_count") > 0


def test_one_server_process_and_each_engines_own(server: Server) -> None:
    engines = server.engines()
    assert len(engines) == 2
    others = [p for p in server.family() if p not in engines and p.ppid() == server.process.pid]
    lines = [" ".join(p.cmdline()) for p in others]
    assert sum("llmserve.engine.structured_output.compiler_process" in line for line in lines) <= 1
    known = ("resource_tracker", "compiler_process", "llmserve::zygote")
    assert all(any(name in line for name in known) for line in lines)
    assert {os.getpgid(p.pid) for p in engines} == {p.pid for p in engines}  # not the terminal's
    workers = [p for p in server.family() if "Worker" in p.name()]
    assert sorted(os.getpgid(p.pid) for p in workers) == sorted(p.pid for p in engines)


def test_only_states_are_printed(server: Server) -> None:
    first, *lines = server.printed().splitlines()
    assert first.startswith("On the CPU: chat in ")
    assert lines[0].startswith("Listening on http://127.0.0.1:")
    assert lines[-1] == f"Serving chat, embed on {server.url}"
    for line in lines[1:-1]:
        assert line.startswith(("chat: ", "embed: ")), server.printed()


# --- an engine dies


def engine_of(server: Server, model: str) -> psutil.Process:
    """The engine core that writes the model's log."""
    files = {engine: Path(f"/proc/{engine.pid}/fd/1").readlink() for engine in server.engines()}
    return next(engine for engine, file in files.items() if file.name == f"model-{model}.log")


def test_killed_engine_restarts_and_other_models_serve(server: Server) -> None:
    over = threading.Event()
    statuses: list[int] = []
    lines: list[str] = []

    def embed() -> None:
        while not over.is_set():
            statuses.append(server.post("/v1/embeddings", model="embed", input="x").status_code)

    def chat() -> None:
        body = {"model": "chat", "prompt": "x", "max_tokens": 2000, "stream": True}
        url = f"{server.url}/v1/completions"
        with httpx.stream("POST", url, json=body | {"ignore_eos": True}, timeout=60) as reply:
            lines.extend(line for line in reply.iter_lines() if line)

    asking = [threading.Thread(target=embed), threading.Thread(target=chat)]
    for each in asking:
        each.start()
    try:
        until(lambda: server.running("chat") == 1)
        engine_of(server, "chat").kill()
        asking[1].join(timeout=30)
        assert not asking[1].is_alive()
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert lines[-1] == "data: [DONE]"
        until(lambda: not httpx.get(f"{server.url}/ready", timeout=10).is_success)
        refused = server.post("/v1/completions", model="chat", prompt="x")
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        until(lambda: httpx.get(f"{server.url}/ready", timeout=10).is_success, START_S)
    finally:
        over.set()
        asking[0].join()
    assert server.post("/v1/completions", model="chat", prompt="x").status_code == 200
    assert len(statuses) > 10
    assert set(statuses) == {200}
    assert server.metric("llmserve_engine_deaths_total", model="chat") == 1
    assert server.metric("llmserve_engine_deaths_total", model="embed") == 0


# --- the end: this test is the last that the server sees


def test_ctrl_c_completes_requests_and_ends_all_processes(server: Server) -> None:
    """As a terminal does it: the signal goes to the whole process group."""
    family = server.family()
    body = {
        "model": "chat",
        "prompt": "Once",
        "max_tokens": 200,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=START_S) as answer:
        lines = answer.iter_lines()
        next(lines)  # the first token: the request runs, however fast the CPU is
        os.killpg(server.process.pid, signal.SIGINT)
        until(lambda: not _accepts(server.url))
        events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["usage"]["completion_tokens"] == 200
    assert server.process.wait(STOP_S) == 0
    _, alive = psutil.wait_procs(family, timeout=STOP_S)
    assert not alive
    _, *last = server.printed().partition("Stopping: 1 requests have up to 600 s")[2].splitlines()
    assert last
    assert all(line.startswith(("chat: ", "embed: ")) for line in last), "no traceback, no warning"
    assert server.temporary is not None
    assert left_in(server.temporary) == set()
    assert not shared_by(family)


def _accepts(url: str) -> bool:
    try:
        httpx.get(f"{url}/health")
    except httpx.ConnectError:
        return False
    return True
