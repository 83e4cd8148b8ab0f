from __future__ import annotations

import asyncio
import io
import json
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette

from llmserve.api.endpoints import error_response
from llmserve.errors import ConfigError, LLMServeError, ModelNotFound, StartupError
from llmserve.http import admin, auth, log_tail
from llmserve.registry.spec import ServerSpec
from tests.fakes import error_of, until
from tests.listening import listening

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from pydantic import SecretStr
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send


class FakeOperator:
    """Two models; `done` is what it was asked to do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: list[tuple[Any, ...]] = []
        self.listeners: set[asyncio.Queue[dict[str, Any]]] = set()
        self.fails: LLMServeError | None = None
        self.states = {"chat": "ready", "org/embed": "stopped"}

    def models(self) -> list[dict[str, Any]]:
        return [self._model("chat", ["gpt-4o"], 2), self._model("org/embed", [], 1)]

    def _model(self, name: str, aliases: list[str], count: int) -> dict[str, Any]:
        state = self.states[name]
        return {
            "name": name,
            "aliases": aliases,
            "start": "eager",
            "pinned": False,
            "priority": 0,
            "state": state,
            "level": state,
            "in_flight": 3,
            "queued": 1,
            "idle_s": 90.0,
            "swaps": 7,
            "deaths": 0,
            "note": "",
            "replicas": [self._replica(state, number) for number in range(count)],
        }

    def _replica(self, state: str, number: int) -> dict[str, Any]:
        up = state == "ready"
        return {
            "number": number,
            "state": state,
            "level": state,
            "note": "warm" if up else "",
            "devices": [number, number + 2],
            "since_s": 1.0,
            "start_s": 41.0,
            "wake_s": 2.25 if up else None,
            "gpu_bytes": 3 * 2**30 if up else 0,
            "host_bytes": 0,
            "pid": 7,
        }

    def model(self, name: str) -> dict[str, Any]:
        by_name = {each: shown for shown in self.models() for each in names_of(shown)}
        if name not in by_name:
            raise ModelNotFound(name, by_name)
        return by_name[name]

    async def load(self, name: str) -> None:
        await self._do("load", name, state="ready")

    async def unload(self, name: str, *, drain: bool) -> None:
        await self._do("unload", name, drain, state="stopped")

    async def sleep(self, name: str) -> None:
        await self._do("sleep", name, state="sleeping")

    async def wake(self, name: str) -> None:
        await self._do("wake", name, state="ready")

    async def _do(self, action: str, name: str, *arguments: object, state: str) -> None:
        if self.fails is not None:
            raise self.fails
        own = self.model(name)["name"]
        self.done.append((action, own, *arguments))
        self.states[own] = state

    async def reload(self, *, dry_run: bool) -> dict[str, Any]:
        if self.fails is not None:
            raise self.fails
        self.done.append(("reload", dry_run))
        return {"changed": True, "lines": ["chat: restarts", "code: added"]}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.listeners.add(queue)
        try:
            while True:
                happened = await queue.get()
                if happened.get("to") == "broken":
                    raise LLMServeError("no more events")
                yield happened
        finally:
            self.listeners.discard(queue)

    def happens(self, to: str) -> None:
        for queue in self.listeners:
            queue.put_nowait(change(to))

    def log_of(self, name: str, replica: int) -> Path:
        return self.folder / f"{name.replace('/', '-')}-{replica}.log"


def names_of(shown: dict[str, Any]) -> list[str]:
    return [shown["name"], *shown["aliases"]]


def change(to: str) -> dict[str, Any]:
    return {"at": 0.0, "model": "chat", "replica": 1, "from": "loading", "to": to, "note": "4 s"}


def served(operator: FakeOperator, key: SecretStr | None = None) -> ASGIApp:
    """The routes behind `check`, as the server has them."""

    async def render(_: Request, error: Exception) -> Response:
        return error_response(cast("LLMServeError", error))

    app = Starlette(routes=admin.table(), exception_handlers={LLMServeError: render})
    app.state.services = SimpleNamespace(operator=operator)

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            auth.check(scope, ServerSpec(admin_key=key))
        except LLMServeError as error:
            await error_response(error)(scope, receive, send)
        else:
            await app(scope, receive, send)

    return guarded


@pytest.fixture
def operator(tmp_path: Path) -> FakeOperator:
    return FakeOperator(tmp_path)


@pytest.fixture
def http(operator: FakeOperator) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(served(operator))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost:8000/admin")


@pytest.fixture
async def live(operator: FakeOperator) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server on a socket: for answers that do not end by themselves."""
    async with (
        listening(served(operator)) as url,
        httpx.AsyncClient(base_url=f"{url}/admin") as client,
    ):
        yield client


def test_every_route_is_behind_the_check() -> None:
    assert all(auth.is_admin(route.path) for route in admin.table())


# --- models


async def test_all_models(http: httpx.AsyncClient, operator: FakeOperator) -> None:
    assert (await http.get("/models")).json() == {"models": operator.models()}


@pytest.mark.parametrize(
    ("asked", "name"), [("chat", "chat"), ("gpt-4o", "chat"), ("org/embed", "org/embed")]
)
async def test_one_model_by_any_of_its_names(
    asked: str, name: str, http: httpx.AsyncClient
) -> None:
    assert (await http.get(f"/models/{asked}")).json()["name"] == name


@pytest.mark.parametrize("action", ["load", "unload", "sleep", "wake"])
async def test_unknown_model_is_refused_with_known_names(
    action: str, http: httpx.AsyncClient, operator: FakeOperator
) -> None:
    for reply in (await http.get("/models/chatt"), await http.post(f"/models/chatt/{action}")):
        assert reply.status_code == 404
        assert error_of(reply)["message"] == (
            "The model `chatt` does not exist; did you mean `chat`? "
            "models here: chat, gpt-4o, org/embed."
        )
    assert operator.done == []


@pytest.mark.parametrize(
    ("path", "body", "done", "state"),
    [
        ("org/embed/load", b"", ("load", "org/embed"), "ready"),
        ("gpt-4o/load", b"{}", ("load", "chat"), "ready"),
        ("chat/unload", b"", ("unload", "chat", True), "stopped"),
        ("chat/unload", b'{"drain": false}', ("unload", "chat", False), "stopped"),
        ("chat/sleep", b"", ("sleep", "chat"), "sleeping"),
        ("org/embed/wake", b"", ("wake", "org/embed"), "ready"),
    ],
)
async def test_command_changes_a_model_and_returns_its_state(
    path: str,
    body: bytes,
    done: tuple[object, ...],
    state: str,
    http: httpx.AsyncClient,
    operator: FakeOperator,
) -> None:
    reply = await http.post(f"/models/{path}", content=body)
    assert (reply.status_code, reply.json()["state"]) == (200, state)
    assert operator.done == [done]


async def test_load_that_fails_returns_the_cause(
    http: httpx.AsyncClient, operator: FakeOperator
) -> None:
    operator.fails = StartupError("no such GPU")
    reply = await http.post("/models/chat/load")
    assert (reply.status_code, error_of(reply)["message"]) == (500, "no such GPU")


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("models/chat/unload", '{"drain": "no"}', "`drain` must be true or false; it is `no`"),
        ("models/chat/unload", '{"drian": false}', "`drian` is not a known key. Allowed: drain"),
        ("models/chat/load", '{"drain": true}', "Allowed: no keys"),
        ("reload", '{"dry_run": 1}', "`dry_run`"),
        ("reload", "[]", "must be a JSON object"),
        ("reload", "{", "not valid JSON"),
    ],
)
async def test_invalid_body_changes_nothing(
    path: str, body: str, message: str, http: httpx.AsyncClient, operator: FakeOperator
) -> None:
    reply = await http.post(path, content=body)
    assert reply.status_code == 400
    assert re.search(message, error_of(reply)["message"])
    assert operator.done == []


async def test_a_large_body_is_refused(http: httpx.AsyncClient, operator: FakeOperator) -> None:
    allowed = await http.post("/reload", content=b" " * (2**16 - 2) + b"{}")
    refused = await http.post("/reload", content=b" " * (2**16 - 1) + b"{}")
    assert (allowed.status_code, refused.status_code) == (200, 413)
    assert error_of(refused)["message"] == "The body has more than 65536 bytes, the limit."
    assert operator.done == [("reload", False)]


# --- the registry


@pytest.mark.parametrize(("body", "dry"), [({}, False), ({"dry_run": True}, True)])
async def test_the_registry_is_read_again(
    body: dict[str, bool], dry: bool, http: httpx.AsyncClient, operator: FakeOperator
) -> None:
    reply = await http.post("/reload", json=body)
    assert reply.json() == {"changed": True, "lines": ["chat: restarts", "code: added"]}
    assert operator.done == [("reload", dry)]


async def test_invalid_registry_is_a_request_error(
    http: httpx.AsyncClient, operator: FakeOperator
) -> None:
    operator.fails = ConfigError(["models.yaml:2: a", "models.yaml:3: b"])
    reply = await http.post("/reload")
    assert reply.status_code == 400
    assert error_of(reply) == {
        "message": "models.yaml:2: a\nmodels.yaml:3: b",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_registry",
    }


# --- events


async def test_events_are_streamed_until_the_client_disconnects(
    live: httpx.AsyncClient, operator: FakeOperator
) -> None:
    async with live.stream("GET", "/events") as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        await until(lambda: bool(operator.listeners))
        operator.happens("ready")
        frames = reply.aiter_text()
        head, data, *_ = (await anext(frames)).split("\n")
        assert head == "event: state"
        assert json.loads(data.removeprefix("data: ")) == change("ready")
    await until(lambda: not operator.listeners)


async def test_events_that_fail_end_with_the_error(
    live: httpx.AsyncClient, operator: FakeOperator
) -> None:
    async with live.stream("GET", "/events") as reply:
        await until(lambda: bool(operator.listeners))
        operator.happens("broken")
        text = "".join([part async for part in reply.aiter_text()])
    assert text.startswith('event: error\ndata: {"error":{"message":"no more events"')


# --- logs


async def test_the_last_lines_of_a_replica(http: httpx.AsyncClient, operator: FakeOperator) -> None:
    operator.log_of("chat", 1).write_text("a\nb\n\u00e9\n", encoding="utf-8")
    reply = await http.get("/models/gpt-4o/logs", params={"lines": 2, "replica": 1})
    assert reply.headers["content-type"] == "text/plain; charset=utf-8"
    assert reply.text == "b\n\u00e9\n"


async def test_a_name_with_slashes_has_a_log(
    http: httpx.AsyncClient, operator: FakeOperator
) -> None:
    operator.log_of("org/embed", 0).write_text("x\n" * 300, encoding="utf-8")
    assert (await http.get("/models/org/embed/logs")).text == "x\n" * 200


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ({"replica": 2}, 400, "`chat` has no replica 2; it has 0, 1."),
        ({"lines": -1}, 400, "`lines` must be at least 0; it is `-1`"),
        ({"lines": 100_001}, 400, "`lines` must be at most 100000; it is `100001`"),
        ({"line": 1}, 400, "Allowed: lines, replica, follow."),
        ({"follow": "maybe", "lines": "all"}, 400, "`lines` must be .*; `follow` must be "),
        ({}, 404, "`chat` has no log yet"),
    ],
)
async def test_log_query_that_is_invalid_is_refused(
    query: dict[str, Any], status: int, message: str, http: httpx.AsyncClient
) -> None:
    reply = await http.get("/models/chat/logs", params=query)
    assert reply.status_code == status
    assert re.search(message, error_of(reply)["message"])


async def test_a_log_is_followed_over_a_cut_and_a_new_file(
    live: httpx.AsyncClient, operator: FakeOperator
) -> None:
    log = operator.log_of("chat", 0)
    log.write_text("one\ntwo\n", encoding="utf-8")
    async with live.stream("GET", "/models/chat/logs?lines=1&follow=true") as reply:
        text = reply.aiter_text()
        assert await anext(text) == "two\n"
        with log.open("a", encoding="utf-8") as more:
            more.write("three")
        assert await anext(text) == "three"
        log.write_text("cut\n", encoding="utf-8")
        assert await anext(text) == "cut\n"
        log.replace(log.with_name("old"))
        log.write_text("longer than before\n", encoding="utf-8")
        assert await anext(text) == "longer than before\n"


async def test_a_log_that_is_not_there_yet_can_be_followed(
    live: httpx.AsyncClient, operator: FakeOperator
) -> None:
    async with live.stream("GET", "/models/chat/logs?follow=true") as reply:
        assert reply.status_code == 200
        operator.log_of("chat", 0).write_text("new\n", encoding="utf-8")
        assert await anext(reply.aiter_text()) == "new\n"


def test_a_file_that_comes_later_is_new_from_its_start(tmp_path: Path) -> None:
    end = log_tail.LogFollower(tmp_path / "log", 0)
    assert end.read() == b""
    (tmp_path / "log").write_bytes(b"one\ntwo\n")
    assert end.read() == b"one\ntwo\n"
    assert end.read() == b""


async def test_a_head_of_a_log_that_is_followed_ends(
    http: httpx.AsyncClient, operator: FakeOperator
) -> None:
    operator.log_of("chat", 0).write_text("x\n", encoding="utf-8")
    async with asyncio.timeout(60):
        assert (await http.head("/models/chat/logs?follow=true")).status_code == 200


def test_a_long_log_is_read_in_blocks(tmp_path: Path) -> None:
    log = tmp_path / "log"
    whole = b"".join(b"%d\n" % n for n in range(50_000))
    log.write_bytes(whole)
    end = log_tail.LogFollower(log, 40_000)
    parts = list(iter(end.read, b""))
    assert b"".join(parts) == b"".join(whole.splitlines(keepends=True)[-40_000:])
    assert max(map(len, parts)) == 2**16


@given(st.lists(st.sampled_from([b"\n", b"a", b"\r", b"bc"])), st.integers(0, 8), st.integers(1, 5))
def test_the_last_lines_are_those_of_the_text(parts: list[bytes], lines: int, block: int) -> None:
    text = b"".join(parts)
    split = io.BytesIO(text).readlines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_tail, "BLOCK", block)
        at = log_tail.last_lines(io.BytesIO(text), lines)
    assert text[at:] == b"".join(split[max(0, len(split) - lines) :])
