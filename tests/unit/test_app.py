from __future__ import annotations

import asyncio
import hashlib
import json
from contextlib import asynccontextmanager
from datetime import datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import pytest
from prometheus_client import Counter

from llmserve import __version__
from llmserve.api.endpoints import ENDPOINTS
from llmserve.api.schedule import SCHEDULE, Schedule
from llmserve.api.sse import DONE, EventStream, PeekableStream, event
from llmserve.errors import EngineError, Overloaded
from llmserve.http import app
from llmserve.http.services import Services
from llmserve.lifecycle.operator import ModelOperator
from llmserve.lifecycle.placement import Level
from llmserve.lifecycle.pool import Pool
from llmserve.lifecycle.replica import State
from llmserve.lifecycle.response_store import owned_by
from llmserve.lifecycle.timings import TIMINGS, LifecycleTimings
from llmserve.metrics import Metrics
from llmserve.registry.spec import Config, ModelSpec, ServerSpec
from llmserve.server import process as server
from tests.fakes import (
    Answer,
    FakeBackend,
    FakeRunning,
    Gate,
    Plan,
    broken,
    error_of,
    failing,
    failure,
    plain,
    soon,
    spec,
    stream,
    until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping

    from starlette.types import ASGIApp

CHAT = "/v1/chat/completions"
HI = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
FRAME = event({"choices": [{"delta": {"content": "a"}}]})
ORIGIN = {"origin": "https://page.example"}


class Box:
    """A server without engines, and a client of it."""

    def __init__(
        self,
        *specs: ModelSpec,
        server: ServerSpec | None = None,
        schedule: Schedule = SCHEDULE,
        timings: LifecycleTimings = TIMINGS,
        **plans: Plan,
    ) -> None:
        models = specs or (
            spec("chat", max_in_flight=1, max_queue=0, aliases=["gpt-4o"]),
            spec("embed"),
        )
        self.server = server or ServerSpec()
        config = Config(file="models.yaml", server=self.server, models=models)
        self.backend = FakeBackend(**plans)
        self.metrics = Metrics()
        self.pool = Pool(models, self.backend, self.metrics, timings=timings)
        self.control = ModelOperator(self.server, self.pool, self.backend, lambda: config)
        services = Services(self.pool, self.metrics, self.control, schedule)
        self.app: ASGIApp = app.build(services)
        self.client = httpx.AsyncClient()

    @property
    def running(self) -> FakeRunning:
        return self.backend.running("chat")

    @property
    def in_flight(self) -> int:
        return self.pool.models["chat"].slots.in_flight

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def requests(
        self, status: int, model: str = "chat", endpoint: str = "chat completions"
    ) -> float:
        return self.count(
            "llmserve_requests_total", model=model, endpoint=endpoint, status=str(status)
        )

    def disconnects(self) -> float:
        return self.count("llmserve_disconnects_total", model="chat", endpoint="chat completions")


@asynccontextmanager
async def asgi(
    *specs: ModelSpec,
    server: ServerSpec | None = None,
    schedule: Schedule = SCHEDULE,
    timings: LifecycleTimings = TIMINGS,
    **plans: Plan,
) -> AsyncIterator[Box]:
    """Without a socket: for answers that come whole."""
    box = Box(*specs, server=server, schedule=schedule, timings=timings, **plans)
    await box.pool.start()
    transport = httpx.ASGITransport(box.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://box") as box.client:
        yield box


async def ask(
    method: str,
    path: str,
    *specs: ModelSpec,
    server: ServerSpec | None = None,
    plans: Mapping[str, Any] | None = None,
    **sent: Any,
) -> httpx.Response:
    """One request to a server of its own."""
    async with asgi(*specs, server=server, **(plans or {})) as box:
        return await box.client.request(method, path, **sent)


@asynccontextmanager
async def real(
    *specs: ModelSpec, server_spec: ServerSpec | None = None, schedule: Schedule = SCHEDULE
) -> AsyncIterator[Box]:
    """On a socket, as `llmserve up` serves it: for streams and clients that leave."""
    server_spec = server_spec or ServerSpec(port=0, drain_timeout=1)
    box = Box(*specs, server=server_spec, schedule=schedule)
    await box.pool.start()
    with server.bind(box.server) as listener:
        port = listener.getsockname()[1]
        uvicorn = server._Uvicorn(server._uvicorn_config(box.server, box.app))
        serving = asyncio.ensure_future(uvicorn.serve(sockets=[listener]))
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as box.client:
                yield box
        finally:
            uvicorn.end()
            await soon(serving, 60)


async def begin(
    box: Box, gate: Gate, body: dict[str, Any], path: str = CHAT
) -> asyncio.Future[httpx.Response]:
    """A request that has reached the gate of its answer."""
    asking = asyncio.ensure_future(box.client.post(path, json=body))
    await soon(gate.reached.wait())
    return asking


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


# --- refusals


@pytest.mark.parametrize(
    ("method", "path", "hint"),
    [
        ("POST", "/v1/chat/completion", "did you mean /v1/chat/completions?"),
        ("GET", "/xyz", "GET /openapi.json lists all routes."),
        # A GET would match as the id of a stored response.
        ("POST", "/v1/responses/compact", "did you mean /v1/responses?"),
        ("POST", "/v1/responses/input_tokens", "did you mean"),
    ],
)
async def test_unknown_route_is_refused_with_a_hint(method: str, path: str, hint: str) -> None:
    reply = await ask(method, path)
    assert reply.status_code == 404
    error = error_of(reply)
    assert error["message"].startswith(f"There is no route `{path}`; {hint}")
    assert (error["type"], error["code"]) == ("invalid_request_error", "unknown_url")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", CHAT, "POST"),
        ("DELETE", "/rerank", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("PUT", "/v1/models/org/name", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("GET", "/v1/responses/r1/cancel", "POST"),
    ],
)
async def test_wrong_method_is_refused_with_the_allowed_ones(
    method: str, path: str, allow: str
) -> None:
    reply = await ask(method, path)
    assert reply.status_code == 405
    assert reply.headers["allow"] == allow
    error = error_of(reply)
    assert error["message"] == f"`{path}` does not support {method}; supported: {allow}."
    assert error["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"", 400, "invalid_json", None),
        (b'{"model": "chat",', 400, "invalid_json", None),
        (b'{"model": "ch\xffat"}', 400, "invalid_json", None),
        (b"[]", 400, "invalid_json", None),
        (b'"chat"', 400, "invalid_json", None),
        (b"{}", 400, "missing_required_parameter", "model"),
        (b'{"model": null}', 400, "missing_required_parameter", "model"),
        (b'{"model": 7}', 400, "invalid_type", "model"),
        (b'{"model": {"a": 1}}', 400, "invalid_type", "model"),
        (b'{"model": "chatt"}', 404, "model_not_found", "model"),
        (b'{"model": "a\\n\\u0000b"}', 404, "model_not_found", "model"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings", "/tokenize"])
async def test_a_bad_body_is_refused_before_a_slot_is_taken(
    path: str, body: bytes, status: int, code: str, param: str | None
) -> None:
    async with asgi() as box:
        reply = await box.client.post(path, content=body)
        assert box.running.calls == []
        assert box.in_flight == 0
    assert reply.status_code == status
    error = error_of(reply)
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)


LIMITED = ServerSpec(max_body=64)
FORM = {"content-type": "multipart/form-data; boundary=x"}
PART = b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\nchat\r\n'
FILE = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'


@pytest.mark.parametrize(
    ("path", "headers", "body"),
    [
        (CHAT, {}, b'{"model": "chat", "a": "' + b"x" * 60 + b'"}'),
        ("/v1/audio/transcriptions", FORM, PART + FILE + b"x" * 60 + b"\r\n--x--\r\n"),
    ],
    ids=["json", "upload"],
)
@pytest.mark.parametrize("chunked", [False, True], ids=["with-length", "chunked"])
async def test_a_body_over_the_limit_is_refused(
    path: str, headers: dict[str, str], body: bytes, *, chunked: bool
) -> None:
    content = chunks(body[:50], body[50:]) if chunked else body
    async with asgi(server=LIMITED) as box:
        reply = await box.client.post(path, headers=headers, content=content)
        assert box.running.calls == []
    assert reply.status_code == 413
    error = error_of(reply)
    assert error["code"] == "request_too_large"
    assert "server.max_body" in error["message"]
    assert "64" in error["message"]


async def test_a_body_of_exactly_the_limit_is_served() -> None:
    body = json.dumps({"model": "chat", "a": ""}).encode()
    body = body.replace(b'""', b'"' + b"x" * (64 - len(body)) + b'"')
    async with asgi(server=LIMITED) as box:
        assert (await box.client.post(CHAT, content=body)).status_code == 200
        assert (await box.client.post(CHAT, content=chunks(body))).status_code == 200
        assert (await box.client.post(CHAT, content=body + b" ")).status_code == 413


@pytest.mark.parametrize("path", ["/v1/models/none", "/v1/none", "/v1/messages/none"])
async def test_error_for_anthropic_s_client_has_its_shape(path: str) -> None:
    reply = await ask("GET", path, headers={"anthropic-version": "2023-06-01"})
    body = reply.json()
    assert (reply.status_code, body["type"]) == (404, "error")
    assert body["error"].keys() == {"type", "message"}
    assert body["error"]["type"] == "not_found_error"


async def test_unforeseen_error_is_sent_without_its_text() -> None:
    async with asgi(chat=Plan(FakeRunning(failing(KeyError("secret"))))) as box:
        reply = await box.client.post(CHAT, json=HI)
        assert box.in_flight == 0
        assert box.requests(500) == 1
    assert reply.status_code == 500
    assert error_of(reply) == {
        "message": "Internal error; its cause is in the server's log.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert "secret" not in reply.text


@pytest.mark.parametrize(
    ("plan", "status", "code", "retry_after"),
    [
        (Plan(FakeRunning(failing(EngineError("step failed")))), 500, "engine_error", None),
        (Plan(FakeRunning(failing(Overloaded("busy", retry_after_s=9)))), 503, "overloaded", "9"),
        (broken(), 503, "model_failed", None),
    ],
)
async def test_error_of_a_model_is_sent_with_its_status(
    plan: Plan, status: int, code: str, retry_after: str | None
) -> None:
    async with asgi(chat=plan) as box:
        reply = await box.client.post(CHAT, json=HI)
        assert box.in_flight == 0
    assert (reply.status_code, error_of(reply)["code"]) == (status, code)
    assert reply.headers.get("retry-after") == retry_after


async def test_a_full_model_refuses_before_the_first_byte() -> None:
    gate = Gate()
    async with asgi(chat=Plan(FakeRunning(plain(gate=gate)))) as box:
        first = await begin(box, gate, HI)
        reply = await box.client.post(CHAT, json=HI)
        other = await box.client.post("/v1/embeddings", json={"model": "embed"})
        gate.opened.set()
        assert (await soon(first)).status_code == 200
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "1"
    assert error_of(reply)["code"] == "overloaded"
    assert other.status_code == 200


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"content-type": "application/json"}, b'{"model": "chat"}'),
        ({"content-type": "multipart/form-data"}, b"x"),
        (FORM, b"no form at all"),
    ],
)
async def test_audio_that_is_no_form_is_refused(headers: dict[str, str], body: bytes) -> None:
    reply = await ask("POST", "/v1/audio/transcriptions", headers=headers, content=body)
    assert reply.status_code == 400
    error_of(reply)


# --- what reaches the model


@pytest.mark.parametrize(
    ("path", "name"),
    [(p, e.id) for e in ENDPOINTS if not e.multipart for p in e.paths],
)
async def test_every_path_reaches_its_endpoint(path: str, name: str) -> None:
    async with asgi() as box:
        reply = await box.client.post(path, json={"model": "gpt-4o", "k": [1]})
        (call,) = box.running.calls
        assert box.requests(200, endpoint=name) == 1
    assert reply.status_code == 200
    assert (call.endpoint, call.asked) == (name, "gpt-4o")
    assert call.body == {"model": "gpt-4o", "k": [1]}


async def test_an_upload_reaches_the_model_with_its_fields() -> None:
    async with asgi() as box:
        reply = await box.client.post(
            "/v1/audio/transcriptions",
            data={"model": "chat", "timestamp_granularities[]": ["word", "segment"]},
            files={"file": ("a.wav", b"RIFF")},
        )
        (call,) = box.running.calls
        closed = call.body["file"].file.closed
        await call.body["file"].close()
    assert reply.status_code == 200
    assert call.body["model"] == "chat"
    assert call.body["timestamp_granularities[]"] == ["word", "segment"]
    assert call.body["file"].filename == "a.wav"
    assert closed, "the upload's temporary file is given back with the answer"


@pytest.mark.parametrize("aliases", [[], ["gpt-4o"]])
async def test_the_only_model_needs_no_name(aliases: list[str]) -> None:
    reply = await ask("POST", CHAT, spec("chat", aliases=aliases), json={"messages": []})
    assert reply.status_code == 200


# --- keys

KEYED = ServerSpec(api_keys=("k-one", "k-two"))
NO_KEY = "The request has no API key; send `Authorization: Bearer KEY`."
WRONG_KEY = "The API key is not one of server.api_keys."


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer k-one"},
        {"authorization": "bearer k-two"},
        {"x-api-key": "k-two"},
    ],
)
async def test_any_of_the_keys_opens_in_either_header(headers: dict[str, str]) -> None:
    async with asgi(server=KEYED) as box:
        assert (await box.client.post(CHAT, json=HI, headers=headers)).status_code == 200
        assert (await box.client.get("/metrics", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, NO_KEY),
        ({"authorization": "Bearer "}, NO_KEY),
        ({"authorization": "Basic azpr"}, NO_KEY),
        ({"authorization": "Bearer k-on"}, WRONG_KEY),
        ({"authorization": "Bearer k-one2"}, WRONG_KEY),
        ({"x-api-key": "K-ONE"}, WRONG_KEY),
        ({"x-api-key": "schl\u00fcssel"}, WRONG_KEY),
    ],
)
async def test_no_key_and_a_wrong_one_are_refused(headers: dict[str, str], message: str) -> None:
    sent = [(key.encode(), value.encode()) for key, value in headers.items()]
    async with asgi(server=KEYED) as box:
        reply = await box.client.post(CHAT, json=HI, headers=sent)
        assert box.running.calls == []
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    error = error_of(reply)
    assert (error["message"], error["code"]) == (message, "invalid_api_key")


async def test_only_health_is_open() -> None:
    async with asgi(server=KEYED) as box:
        assert (await box.client.get("/health")).status_code == 200
        paths = [path for endpoint in ENDPOINTS for path in endpoint.paths]
        paths += [
            "/metrics",
            "/ready",
            "/version",
            "/v1/models",
            "/openapi.json",
            "/xyz",
            "/healthy",
        ]
        for path in paths:
            assert (await box.client.get(path)).status_code == 401, path
            assert (await box.client.post(path)).status_code == 401, path


# --- browsers

CORS = ServerSpec(api_keys=("k-one",), allowed_origins=("https://page.example",))


async def test_a_preflight_needs_no_key() -> None:
    asks = {
        **ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    reply = await ask("OPTIONS", CHAT, headers=asks, server=CORS)
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == "https://page.example"
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert "authorization" in reply.headers["access-control-allow-headers"].lower()


@pytest.mark.parametrize(
    ("method", "path", "key", "answer", "status"),
    [
        ("POST", CHAT, "k-one", plain(), 200),
        ("POST", CHAT, "wrong", plain(), 401),
        ("POST", "/xyz", "k-one", plain(), 404),
        ("GET", CHAT, "k-one", plain(), 405),
        ("POST", CHAT, "k-one", failing(Overloaded("busy", retry_after_s=1)), 503),
        ("POST", CHAT, "k-one", failing(KeyError("x")), 500),
    ],
)
async def test_a_page_of_an_allowed_origin_can_read_every_answer(
    method: str, path: str, key: str, answer: Answer, status: int
) -> None:
    headers = ORIGIN | {"x-api-key": key}
    reply = await ask(
        method,
        path,
        json=HI,
        headers=headers,
        server=CORS,
        plans={"chat": Plan(FakeRunning(answer))},
    )
    assert reply.status_code == status
    assert reply.headers["access-control-allow-origin"] == "https://page.example"
    assert "x-request-id" in reply.headers["access-control-expose-headers"].lower()


async def test_page_of_another_origin_gets_no_cors_headers() -> None:
    headers = {"origin": "https://evil.example", "x-api-key": "k-one"}
    for server_spec in (CORS, KEYED):
        reply = await ask("GET", "/v1/models", headers=headers, server=server_spec)
        assert "access-control-allow-origin" not in reply.headers


# --- request ids


async def test_a_request_id_comes_back_and_reaches_the_model() -> None:
    async with asgi() as box:
        reply = await box.client.post(CHAT, json=HI, headers={"x-request-id": "trace 7/a"})
        (call,) = box.running.calls
    assert reply.headers["x-request-id"] == call.request_id == "trace 7/a"


@pytest.mark.parametrize(
    "given", [None, b"", b"x" * 129, b"caf\xc3\xa9", b"a\tb"], ids=lambda given: repr(given)[:12]
)
async def test_a_missing_or_ill_formed_request_id_is_replaced(given: bytes | None) -> None:
    headers = {} if given is None else {b"x-request-id": given}
    async with asgi() as box:
        reply = await box.client.post(CHAT, json=HI, headers=headers)
        (call,) = box.running.calls
    (request_id,) = reply.headers.get_list("x-request-id")
    assert len(request_id) == 32
    assert call.request_id == request_id


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("GET", "/xyz", 404),
        ("GET", CHAT, 405),
        ("POST", CHAT, 400),
        ("POST", CHAT + "/x", 404),
    ],
)
async def test_every_answer_has_a_request_id(method: str, path: str, status: int) -> None:
    reply = await ask(method, path, headers={"x-request-id": "r1"})
    assert reply.status_code == status
    assert reply.headers.get_list("x-request-id") == ["r1"]


async def test_refused_key_and_crash_have_a_request_id() -> None:
    crashing = {"chat": Plan(FakeRunning(failing(KeyError("x"))))}
    refused = await ask("GET", "/ready", server=KEYED)
    crashed = await ask("POST", CHAT, json=HI, plans=crashing)
    assert [len(reply.headers["x-request-id"]) for reply in (refused, crashed)] == [32, 32]


# --- streams, and clients that leave


async def test_a_stream_comes_frame_by_frame() -> None:
    gate = Gate()
    async with real() as box:
        box.running.answer = stream(FRAME, gate=gate, first_within_s=1)
        async with box.client.stream("POST", CHAT, json=HI | {"stream": True}) as reply:
            assert reply.status_code == 200
            assert reply.headers["cache-control"] == "no-cache"
            assert reply.headers["x-accel-buffering"] == "no"
            assert reply.headers["content-type"].startswith("text/event-stream")
            assert len(reply.headers["x-request-id"]) == 32
            parts = reply.aiter_raw()
            assert await soon(anext(parts)) == FRAME
            assert box.in_flight == 1
            gate.opened.set()
            assert b"".join([part async for part in parts]) == b""
        await until(lambda: box.in_flight == 0)
        await until(lambda: box.requests(200) == 1)
        assert not gate.cancelled
        assert box.disconnects() == 0


async def test_frames_are_sent_as_they_are() -> None:
    async with real() as box:
        box.running.answer = stream(FRAME, FRAME, DONE)
        reply = await box.client.post(CHAT, json=HI)
    assert reply.content == FRAME + FRAME + DONE


async def _leaves_a_plain_answer(box: Box, gate: Gate) -> None:
    box.running.answer = plain(gate=gate)
    await _leave_without_answer(box, gate)


async def _leaves_while_the_first_frame_is_waited_for(box: Box, gate: Gate) -> None:
    box.running.answer = stream(gate=gate, first_within_s=30)
    await _leave_without_answer(box, gate)


async def _leave_without_answer(box: Box, gate: Gate) -> None:
    asking = await begin(box, gate, HI)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def _leaves_between_headers_and_first_frame(box: Box, gate: Gate) -> None:
    box.running.answer = stream(gate=gate)
    async with box.client.stream("POST", CHAT, json=HI):
        await soon(gate.reached.wait())


async def _leaves_in_mid_stream(box: Box, gate: Gate) -> None:
    box.running.answer = stream(FRAME, gate=gate)
    async with box.client.stream("POST", CHAT, json=HI) as reply:
        parts = reply.aiter_raw()
        await soon(anext(parts))
        await soon(gate.reached.wait())


@pytest.mark.parametrize(
    "leave",
    [
        _leaves_a_plain_answer,
        _leaves_while_the_first_frame_is_waited_for,
        _leaves_between_headers_and_first_frame,
        _leaves_in_mid_stream,
    ],
)
async def test_disconnect_cancels_the_request_and_is_counted(
    leave: Callable[[Box, Gate], Coroutine[Any, Any, None]],
) -> None:
    gate = Gate()
    async with real() as box:
        await leave(box, gate)
        await soon(gate.left.wait())
        assert gate.cancelled
        await until(lambda: box.in_flight == 0)
        box.running.answer = plain()
        assert (await box.client.post(CHAT, json=HI)).status_code == 200
        assert box.disconnects() == 1


async def test_a_client_that_leaves_while_it_sends_takes_no_slot() -> None:
    async with real() as box:
        host, port = box.client.base_url.host, box.client.base_url.port
        _, writer = await asyncio.open_connection(host, port)
        writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{{".encode())
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        await until(lambda: box.requests(499, model="") == 1)
        assert box.running.calls == []
        assert box.in_flight == 0


async def test_broken_stream_releases_its_slot() -> None:
    async def breaking() -> AsyncIterator[bytes]:
        yield FRAME
        raise KeyError("secret")

    async def answer(_: object) -> EventStream:
        return EventStream(PeekableStream(breaking(), failure))  # type: ignore[arg-type]  # an async generator

    async with real() as box:
        box.running.answer = answer
        with pytest.raises(httpx.RemoteProtocolError):
            await box.client.post(CHAT, json=HI)
        await until(lambda: box.in_flight == 0)


# --- the server's own routes


async def test_health_of_a_failed_model_is_ok() -> None:
    reply = await ask("GET", "/health", plans={"embed": broken()})
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("plans", "status", "embed"),
    [({}, 200, "ready"), ({"embed": broken("OSError: no space left")}, 503, "failed")],
)
async def test_ready_has_the_state_of_each_model(
    plans: dict[str, Plan], status: int, embed: str
) -> None:
    """The cause of a failure is for the operator."""
    reply = await ask("GET", "/ready", plans=plans)
    states = {"chat": {"state": "ready"}, "embed": {"state": embed}}
    assert reply.status_code == status
    assert reply.json() == {"ready": status == 200, "models": states}


async def test_ready_has_the_state_of_each_replica() -> None:
    loading = Plan(reports=((State.DOWNLOADING, "0.1 of 2 GiB"),), gate=Gate())
    models = (spec("chat", replicas=2), spec("embed", replicas=2))
    plans: dict[str, Any] = {
        "chat/0": broken("OSError: no space left"),
        "embed/1": broken(),
        "embed/0": loading,
    }
    box = Box(*models, **plans)
    starting = asyncio.ensure_future(box.pool.start())
    await until(lambda: bool(box.pool.models["chat"].ready))
    await until(lambda: box.pool.replicas[3].state is State.FAILED)
    transport = httpx.ASGITransport(box.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://box") as client:
        reply = await client.get("/ready")
    starting.cancel()
    downloading = {"state": "downloading", "note": "0.1 of 2 GiB"}
    assert reply.status_code == 503
    assert reply.json()["models"] == {
        "chat": {"state": "ready", "replicas": [{"state": "failed"}, {"state": "ready"}]},
        "embed": downloading | {"replicas": [downloading, {"state": "failed"}]},
    }


async def test_a_model_is_ready_with_one_of_its_replicas() -> None:
    plans: dict[str, Any] = {"chat/0": broken()}
    async with asgi(spec("chat", replicas=2), **plans) as box:
        assert (await box.client.get("/ready")).status_code == 200
        (card,) = (await box.client.get("/v1/models")).json()["data"]
        assert card["max_model_len"] == 2048
        for _ in range(3):
            assert (await box.client.post(CHAT, json=HI)).status_code == 200
        assert len(box.backend.running("chat/1").calls) == 3


async def test_replicas_share_the_requests() -> None:
    async with asgi(spec("chat", replicas=3)) as box:
        for _ in range(6):
            assert (await box.client.post(CHAT, json=HI)).status_code == 200
        calls = [len(box.backend.running(f"chat/{number}").calls) for number in range(3)]
        tokens = [replica.load.tokens for replica in box.pool.replicas]
    assert calls == [2, 2, 2]
    assert tokens == [0, 0, 0]


SHOWN = (
    spec("chat", aliases=["gpt-4o"], loras={"sql": "/loras/sql"}),
    spec("org/embed"),
    spec("draft", hidden=True),
)


async def test_model_list_has_every_public_name_once() -> None:
    """One list for clients of OpenAI and Anthropic: each ignores the other's fields."""
    async with asgi(*SHOWN) as box:
        body = (await box.client.get("/v1/models")).json()
        card = (await box.client.get("/v1/models/chat")).json()
    assert (body["object"], body["has_more"]) == ("list", False)
    assert [card["id"] for card in body["data"]] == ["chat", "gpt-4o", "sql", "org/embed"]
    assert (body["first_id"], body["last_id"]) == ("chat", "org/embed")
    for each in body["data"]:
        assert (each["object"], each["max_model_len"]) == ("model", 2048)
        assert datetime.fromisoformat(each["created_at"]).timestamp() == each["created"]
    assert body["data"][0] == card
    assert body["data"][2]["parent"] == "chat"
    assert (card["type"], card["display_name"], card["lifecycle"]) == ("model", "chat", "active")


@pytest.mark.parametrize("path", ["/v1/models/org/embed", "/v1/models/org%2Fembed"])
async def test_a_name_with_a_slash_has_a_card(path: str) -> None:
    reply = await ask("GET", path, *SHOWN)
    assert (reply.status_code, reply.json()["id"]) == (200, "org/embed")


async def test_an_unknown_model_has_no_card() -> None:
    reply = await ask("GET", "/v1/models/org/embedd", *SHOWN)
    assert reply.status_code == 404
    assert "did you mean `org/embed`?" in error_of(reply)["message"]


async def test_a_hidden_model_is_served() -> None:
    reply = await ask("POST", CHAT, *SHOWN, json=HI | {"model": "draft"})
    assert reply.status_code == 200


async def test_card_of_a_failed_model_has_no_length() -> None:
    reply = await ask("GET", "/v1/models/embed", plans={"embed": broken()})
    assert "max_model_len" not in reply.json()


async def test_version_is_that_of_the_package() -> None:
    assert (await ask("GET", "/version")).json() == {"version": __version__}


@pytest.mark.parametrize("holder", ["chat", "embed"])
async def test_stored_response_of_any_model_is_found(holder: str) -> None:
    async with asgi() as box:
        store_response(box, holder)
        got = await box.client.get("/v1/responses/r1")
        cancelled = await box.client.post("/v1/responses/r1/cancel")
        unstreamed = await box.client.get("/v1/responses/r1?stream=true&starting_after=4")
        missing = await box.client.get("/v1/responses/r2")
    assert got.json() == {"id": "r1", "status": "queued"}
    assert cancelled.json() == {"id": "r1", "status": "cancelled"}
    assert unstreamed.status_code == 400
    assert missing.status_code == 404
    assert error_of(missing)["code"] == "not_found"


async def test_a_deleted_response_is_gone() -> None:
    async with asgi() as box:
        store_response(box, "embed")
        deleted = await box.client.delete("/v1/responses/r1")
        again = await box.client.delete("/v1/responses/r1")
    assert deleted.json() == {"id": "r1", "object": "response", "deleted": True}
    assert error_of(again)["code"] == "not_found"


def store_response(box: Any, holder: str, owner: str = "") -> None:
    handler = box.backend.running(holder).handler
    with owned_by(owner):
        handler.response_store["r1"] = SimpleNamespace(id="r1", status="queued")


async def test_stored_response_of_stopped_model_is_found() -> None:
    async with asgi() as box:
        store_response(box, "chat")
        (replica,) = box.pool.models["chat"].replicas
        await box.pool.life.lower(replica, Level.STOPPED)
        assert replica.running is None
        got = await box.client.get("/v1/responses/r1")
    assert got.json() == {"id": "r1", "status": "queued"}


async def test_stored_response_of_another_key_is_not_found() -> None:
    keys = {"a": {"authorization": "Bearer a"}, "b": {"authorization": "Bearer b"}}
    async with asgi(server=ServerSpec(api_keys=("a", "b"))) as box:
        store_response(box, "chat", hashlib.sha256(b"a").hexdigest())
        for key, status in (("a", 200), ("b", 404)):
            got = await box.client.get("/v1/responses/r1", headers=keys[key])
            assert got.status_code == status
        deleting = await box.client.delete("/v1/responses/r1", headers=keys["b"])
        assert deleting.status_code == 404
        cancelling = "/v1/responses/r1/cancel"
        assert (await box.client.post(cancelling, headers=keys["b"])).status_code == 404
        assert (await box.client.post(cancelling, headers=keys["a"])).status_code == 200


# --- figures


async def test_requests_are_counted_by_model_endpoint_and_status() -> None:
    async with asgi() as box:
        for name in ("chat", "gpt-4o", "unknown"):
            await box.client.post(CHAT, json=HI | {"model": name})
        await box.client.post("/v1/embeddings", json={"model": "embed"})
        await box.client.get("/health")
        page = (await box.client.get("/metrics")).text
    lines = [line for line in page.splitlines() if line.startswith("llmserve_requests_total")]
    assert sorted(lines) == [
        'llmserve_requests_total{endpoint="chat completions",model="",status="404"} 1.0',
        'llmserve_requests_total{endpoint="chat completions",model="chat",status="200"} 2.0',
        'llmserve_requests_total{endpoint="embeddings",model="embed",status="200"} 1.0',
    ]


async def test_a_refusal_of_a_known_model_is_counted_as_its_own() -> None:
    async with asgi(embed=broken()) as box:
        await box.client.post("/v1/embeddings", json={"model": "embed"})
        assert box.requests(503, model="embed", endpoint="embeddings") == 1


async def test_the_metrics_page_has_the_engines_figures() -> None:
    async with asgi() as box:
        Counter("vllm:steps", "Steps.", registry=box.running.registry).inc(3)
        reply = await box.client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    assert "vllm:steps_total 3.0" in reply.text


# --- the server's end


@pytest.mark.parametrize("streamed", [True, False])
async def test_request_that_outlasts_the_drain_gets_an_error(streamed: bool) -> None:
    gate = Gate()
    answer = stream(b"data: 1\n\n", gate=gate) if streamed else plain(gate=gate)
    async with asgi(chat=Plan(running=FakeRunning(answer))) as box:
        asking = await begin(box, gate, {"model": "chat"})
        await soon(box.pool.drain(0.05))
        reply = await soon(asking)
    if streamed:
        assert reply.status_code == 200
        assert reply.text.endswith("data: shutting_down\n\n")
    else:
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "shutting_down"
    assert gate.cancelled


@pytest.mark.parametrize(
    ("server_spec", "method", "words"),
    [
        (ServerSpec(), "POST", "must be in server.allowed_origins; allowed: none."),
        (KEYED, "POST", "must be in server.allowed_origins; allowed: none."),
        (ServerSpec(allowed_origins=("https://one",)), "POST", "allowed: `https://one`."),
        (
            ServerSpec(allowed_origins=("https://two",), allowed_methods=("GET",)),
            "POST",
            "The method `POST` of the preflight must be in server.allowed_methods; allowed: `GET`.",
        ),
        (
            ServerSpec(allowed_origins=("https://two",), allowed_headers=("x-mine",)),
            "POST",
            "The headers `x-other` of the preflight must be in server.allowed_headers",
        ),
    ],
)
async def test_refused_preflight_names_the_setting(
    server_spec: ServerSpec, method: str, words: str
) -> None:
    asks = {
        "origin": "https://two",
        "access-control-request-method": method,
        "access-control-request-headers": "x-other",
    }
    reply = await ask("OPTIONS", CHAT, headers=asks, server=server_spec)
    assert reply.status_code == 400
    error = error_of(reply)
    assert error["code"] == "cors_refused"
    assert words in error["message"]
    assert "restart the server" in error["message"]


async def test_options_without_preflight_returns_allowed_methods() -> None:
    for headers in ({}, {"origin": "http://box"}):
        reply = await ask("OPTIONS", CHAT, headers=headers)
        assert (reply.status_code, reply.headers["allow"]) == (405, "POST")


# --- paths


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/chat/completions/", 200),
        ("POST", "/v1//chat/completions", 200),
        ("POST", "//v1/chat//completions//", 200),
        ("GET", "/v1/models/", 200),
        ("GET", "/v1/models/chat/", 200),
        ("GET", "//health", 200),
        ("HEAD", "/v1/models/", 200),
        ("GET", "/ready/", 200),
        ("GET", "/", 404),
        ("GET", "//", 404),
        ("GET", "/v1/", 404),
        ("GET", "/v1/models/%2F", 404),
        ("GET", "/v1/chat/completions/", 405),
        ("POST", "/v1/models/", 405),
    ],
)
async def test_path_with_more_slashes_is_the_same_route(
    method: str, path: str, status: int
) -> None:
    sent = HI if method == "POST" else None
    reply = await ask(method, f"http://box{path}", json=sent)
    assert reply.status_code == status, reply.text


@pytest.mark.parametrize("name", ["a//b", "a/", "/a", "org/model"])
async def test_name_with_slashes_is_found_where_they_are_escaped(name: str) -> None:
    reply = await ask("GET", f"http://box/v1/models/{quote(name, safe='')}", spec(name))
    assert reply.json()["id"] == name


@pytest.mark.parametrize("path", ["//admin/models", "/admin//models/", "/%61dmin/models"])
async def test_path_with_more_slashes_has_the_same_access(path: str) -> None:
    async with asgi(server=ServerSpec(admin_key="a-key")) as box:
        assert (await box.client.get(f"http://box{path}")).status_code == 401
        with_key = await box.client.get(f"http://box{path}", headers={"x-api-key": "a-key"})
        assert with_key.status_code == 200


async def test_path_with_more_slashes_is_counted_as_its_route() -> None:
    async with asgi() as box:
        await box.client.post(f"http://box{CHAT}/", json=HI)
    assert box.requests(200) == 1


# --- pages


async def test_page_without_cors_cannot_use_a_model() -> None:
    """A no-cors POST has a content type that needs no preflight."""
    headers = ORIGIN | {"content-type": "text/plain"}
    async with asgi() as box:
        reply = await box.client.post(CHAT, content=json.dumps(HI), headers=headers)
        assert box.running.calls == []
    assert (reply.status_code, error_of(reply)["code"]) == (403, "origin_refused")


async def test_readme_s_curl_is_served() -> None:
    """`curl -d` sends this content type."""
    headers = {"content-type": "application/x-www-form-urlencoded", "user-agent": "curl/8"}
    reply = await ask("POST", CHAT, content=json.dumps(HI), headers=headers)
    assert reply.status_code == 200


async def raw(box: Box, *parts: bytes) -> bytes:
    """What a server on a socket answers to bytes, until it closes."""
    url = box.client.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    for part in parts:
        writer.write(part)
        await writer.drain()
    received = await soon(reader.read())
    writer.close()
    return received


@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_body_of_an_upgrade_offer_is_no_request(upgrade: bytes, framing: str) -> None:
    body = json.dumps(HI).encode()
    inside = b"GET /admin/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    async with real() as box:
        for content, answered in ((body, 200), (inside, 400)):
            length = b"Content-Length: %d\r\n\r\n%b" % (len(content), content)
            chunks = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (
                len(content),
                content,
            )
            sent = (
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: " + upgrade + b"\r\n"
                b"HTTP2-Settings: AAMAAABkAAQ\r\n" + (length if framing == "length" else chunks)
            )
            reply = await raw(box, sent)
            assert reply.startswith(b"HTTP/1.1 %d " % answered)
            assert reply.count(b"HTTP/1.1 ") == 1
            assert b'"models"' not in reply


async def test_page_that_rebinds_a_name_reaches_no_route() -> None:
    async with real() as box:
        sent = b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
        reply = await raw(box, sent)
        assert reply.startswith(b"HTTP/1.1 403 ")
        assert b"host_refused" in reply
        local = sent.replace(b"evil.example", b"localhost")
        assert (await raw(box, local)).startswith(b"HTTP/1.1 200 ")


async def test_http_1_0_stream_of_a_model_has_no_chunks() -> None:
    async with real() as box:
        box.running.answer = stream(FRAME, DONE)
        body = json.dumps(HI | {"stream": True}).encode()
        head = b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body)
        reply = await raw(box, head + body)
    head, _, events = reply.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert events == FRAME + DONE


async def test_path_in_the_log_is_escaped(caplog: pytest.LogCaptureFixture) -> None:
    async with asgi() as box:
        box.pool.registry = None  # type: ignore[assignment]  # unforeseen
        reply = await box.client.get("http://box/v1/models/a%0Dforged%1b%5B2J")
    assert reply.status_code == 500
    (record,) = (each for each in caplog.records if "unforeseen" in each.message)
    assert record.message.startswith("path=`/v1/models/a")
    assert record.message.isprintable()
