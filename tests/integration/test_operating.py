"""Commands of an operator: load, unload, reload.

All tests share one server and run in this order: each continues from the state of the last.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.integration.conftest import CHAT, EMBED, START_S, Server, rewrite, until, write_registry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STORY: dict[str, Any] = {
    "model": "chat",
    "prompt": "Once upon a time",
    "max_tokens": 400,
    "temperature": 0,
    "ignore_eos": True,
}


def llmserve(server: Server, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "llmserve", *words, "--url", server.url]
    return subprocess.run(line, capture_output=True, text=True, timeout=START_S, check=False)


def model(server: Server, name: str) -> dict[str, Any]:
    shown: dict[str, Any] = httpx.get(f"{server.url}/admin/models/{name}", timeout=10).json()
    return shown


def engines(server: Server) -> set[int]:
    return {each.pid for each in server.engines()}


def pid(server: Server, name: str) -> int | None:
    found: int | None = model(server, name)["replicas"][0]["pid"]
    return found


def stream(server: Server, body: dict[str, Any]) -> Iterator[str]:
    """The lines of an answer that are not empty."""
    body = body | {"stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=START_S) as reply:
        assert reply.status_code == 200
        yield from filter(None, reply.iter_lines())


def text_of(lines: list[str]) -> str:
    *events, last = [line.removeprefix("data: ") for line in lines if not line.startswith(":")]
    assert last == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two models that start on demand."""
    small = {"max_model_len": 512, "dtype": "float32"}
    models = {
        "chat": {"model": CHAT, "kv_cache": "256MiB", "engine": small},
        "embed": {"model": EMBED, "kv_cache": "64MiB"},
    }
    registry = write_registry(
        tmp_path_factory.mktemp("operating"), defaults={"start": "lazy"}, models=models
    )
    with Server(registry) as running:
        yield running.ready()


@pytest.fixture(scope="module")
def happened(box: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file to which `llmserve events` writes, an object a line."""
    file = tmp_path_factory.mktemp("events") / "events.jsonl"
    line = [sys.executable, "-m", "llmserve", "events", "--json", "--url", box.url]
    with file.open("w") as out:
        listening = subprocess.Popen(line, stdout=out, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        yield file
    finally:
        listening.terminate()
        listening.wait()


def steps(happened: Path, name: str) -> list[str]:
    """The states of a model since `events` began."""
    events = map(json.loads, happened.read_text().splitlines())
    return [event["to"] for event in events if event["model"] == name]


def test_lazy_model_starts_on_its_first_request(box: Server, happened: Path) -> None:
    assert (model(box, "chat")["state"], engines(box)) == ("stopped", set())
    lines = list(stream(box, STORY | {"max_tokens": 8}))
    assert lines[0].startswith(": chat is "), "a sign of life before the answer"
    assert text_of(lines)
    assert (model(box, "chat")["state"], engines(box)) == ("ready", {pid(box, "chat")})
    until(lambda: steps(happened, "chat")[-1:] == ["ready"])


def test_a_reload_loses_no_byte(box: Server) -> None:
    whole = box.post("/v1/completions", **STORY).json()["choices"][0]["text"]
    before = pid(box, "chat")
    lines: list[str] = []
    reading = threading.Thread(target=lambda: lines.extend(stream(box, STORY)))
    reading.start()
    until(lambda: box.running("chat") == 1)

    rewrite(box.registry, "chat", aliases=["story"], max_in_flight=7)
    ended = llmserve(box, "reload")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("chat: changed live (")
    assert "1024 -> 7" in ended.stdout
    assert box.running("chat") == 1, "the stream is still running"

    reply = box.post("/v1/completions", **STORY | {"model": "story", "max_tokens": 2})
    assert (reply.status_code, reply.json()["model"]) == (200, "story")
    reading.join()
    assert text_of(lines) == whole
    assert pid(box, "story") == before


def test_a_registry_with_mistakes_changes_nothing(box: Server) -> None:
    good, before = box.registry.read_text(), model(box, "chat")["aliases"]
    rewrite(box.registry, "chat", aliases=["tale"], max_in_flihgt=3)
    ended = llmserve(box, "reload")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "models.chat.max_in_flihgt: unknown key; nearest: max_in_flight" in ended.stderr
    assert model(box, "chat")["aliases"] == before
    assert box.post("/v1/completions", **STORY | {"max_tokens": 2}).status_code == 200
    box.registry.write_text(good)
    assert llmserve(box, "reload").stdout == "Nothing has changed.\n"


def test_load_is_shown_by_ps_events_and_logs(box: Server, happened: Path) -> None:
    loaded = llmserve(box, "load", "embed")
    assert (loaded.returncode, loaded.stderr) == (0, "")
    assert loaded.stdout.startswith("embed: ready ")
    assert engines(box) == {pid(box, "chat"), pid(box, "embed")}
    until(lambda: steps(happened, "embed")[-1:] == ["ready"])
    assert "loading" in steps(happened, "embed")

    table = llmserve(box, "ps").stdout.splitlines()
    rows = [row.split()[:3] for row in table[1:]]
    assert rows == [["chat", "ready", "ready"], ["embed", "ready", "ready"]]
    shown = json.loads(llmserve(box, "ps", "--json").stdout)["models"]
    assert [each["name"] for each in shown] == ["chat", "embed"]
    log = llmserve(box, "logs", "embed", "-n", "3")
    assert (log.returncode, len(log.stdout.splitlines())) == (0, 3)


def test_unload_ends_one_engine(box: Server) -> None:
    unknown = llmserve(box, "unload", "caht")
    assert unknown.returncode == 1
    assert "did you mean `chat`?" in unknown.stderr
    ended = llmserve(box, "unload", "chat")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("chat: stopped ")
    assert engines(box) == {pid(box, "embed")}
    assert box.post("/v1/embeddings", model="embed", input="x").status_code == 200


def test_unload_now_ends_a_load(box: Server) -> None:
    loads: list[subprocess.CompletedProcess[str]] = []
    loading = threading.Thread(target=lambda: loads.append(llmserve(box, "load", "chat")))
    loading.start()
    until(lambda: len(engines(box)) == 2)
    ended = llmserve(box, "unload", "--now", "chat")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("chat: stopped ")
    until(lambda: engines(box) == {pid(box, "embed")})
    loading.join()
    assert loads[0].returncode == 1
    assert loads[0].stderr.startswith("The model `chat` is stopped: it was unloaded")


def test_idle_model_stops(box: Server, happened: Path) -> None:
    rewrite(box.registry, "embed", idle={"stop_after": "2s"})
    assert llmserve(box, "reload").returncode == 0
    until(lambda: steps(happened, "embed")[-2:] == ["draining", "stopped"])
    assert (model(box, "embed")["state"], engines(box)) == ("stopped", set())
