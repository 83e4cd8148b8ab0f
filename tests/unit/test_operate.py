from __future__ import annotations

import io
import json
import re
import socket
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn
from pydantic import SecretStr
from rich.console import Console
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from typer.testing import CliRunner, Result

from llmserve.cli import operate
from llmserve.cli.main import app as cli
from llmserve.errors import ConfigError, StartupError
from tests.unit.test_admin import FakeOperator, change, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from starlette.types import ASGIApp, Receive, Scope, Send


class Server:
    """An app on a port of its own, in a thread."""

    def __init__(self, app: ASGIApp) -> None:
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._sock.getsockname()[1]}"
        config = uvicorn.Config(
            app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=0
        )
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._uvicorn.run, args=([self._sock],))

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._sock.close()

    def stop(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join()


class Eventful(FakeOperator):
    """Two events, and then the server ends."""

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        yield change("warming")
        yield change("ready") | {"note": "", "lost": 2}


@pytest.fixture
def operator(tmp_path: Path) -> FakeOperator:
    return Eventful(tmp_path)


@pytest.fixture
def server(operator: FakeOperator) -> Iterator[Server]:
    with Server(served(operator)) as running:
        yield running


def llmserve(server: Server, *words: str) -> Result:
    return CliRunner().invoke(cli, [*words, "--url", server.url], env={"TZ": "UTC"})


def rows(text: str) -> list[list[str]]:
    return [re.split(r"\s{3,}", line.rstrip()) for line in text.splitlines()]


# --- ps


def test_models_are_a_table_with_a_row_for_each_of_several_replicas(server: Server) -> None:
    result = llmserve(server, "ps")
    assert (result.exit_code, result.stderr) == (0, "")
    heading, *shown = result.stdout.splitlines()
    assert heading.split("   ")[0] == "MODEL"
    assert [re.sub(r"\s+", " ", row).strip() for row in shown] == [
        "chat ready ready 3 1 1.5 m 0,2,1,3 6.0 - 7",
        "chat/0 ready ready 0,2 3.0 2.2 warm",
        "chat/1 ready ready 1,3 3.0 2.2 warm",
        "org/embed stopped stopped 3 1 1.5 m 0,2 - - 7",
    ]
    assert shown[1].startswith("  chat/0")


def test_models_for_programs_are_the_server_s_own(server: Server, operator: FakeOperator) -> None:
    assert json.loads(llmserve(server, "ps", "--json").stdout) == {"models": operator.models()}


def test_a_long_note_is_not_cut_where_no_terminal_is(
    operator: FakeOperator, tmp_path: Path
) -> None:
    class Wordy(FakeOperator):
        def models(self) -> list[dict[str, Any]]:
            return [self._model("chat", [], 1) | {"note": "[red]" + "why " * 100 + "end"}]

    with Server(served(Wordy(tmp_path))) as server:
        shown = llmserve(server, "ps").stdout
    assert "[red]" + "why " * 100 + "end" in shown
    assert len(shown.splitlines()) == 2


def test_a_narrow_terminal_folds_notes_alone() -> None:
    model = FakeOperator.__new__(FakeOperator)
    model.states = {"chat": "failed"}
    shown = io.StringIO()
    console = Console(file=shown, width=100, force_terminal=True, color_system=None)
    note = "the engine's process ended without an error message; its log is long"
    console.print(operate.table([model._model("chat", [], 1) | {"note": note}]))
    heading, first, *folded = shown.getvalue().splitlines()
    assert heading.split()[-1] == "NOTE"
    assert first.startswith("chat ")
    assert folded
    assert all(not line[: heading.index("NOTE")].strip() for line in folded)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.0, "0 s"), (59.4, "59 s"), (60, "1.0 m"), (5400, "1.5 h"), (86400 * 2.5, "2.5 d")],
)
def test_times_are_told_in_their_largest_unit(seconds: float, told: str) -> None:
    assert operate.span(seconds) == told


# --- load, unload, sleep, wake


@pytest.mark.parametrize(
    ("words", "done", "state"),
    [
        (("load", "org/embed"), ("load", "org/embed"), "ready"),
        (("unload", "gpt-4o"), ("unload", "chat", True), "stopped"),
        (("unload", "chat", "--now"), ("unload", "chat", False), "stopped"),
        (("sleep", "chat"), ("sleep", "chat"), "sleeping"),
        (("wake", "chat"), ("wake", "chat"), "ready"),
    ],
)
def test_a_model_is_steered_and_its_state_told(
    words: tuple[str, ...],
    done: tuple[object, ...],
    state: str,
    server: Server,
    operator: FakeOperator,
) -> None:
    result = llmserve(server, *words)
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.fullmatch(rf"{done[1]}: {state} \d+\.\d s\n", result.stdout)
    assert operator.done == [done]


def test_what_is_refused_does_not_keep_the_rest(server: Server, operator: FakeOperator) -> None:
    result = llmserve(server, "sleep", "chatt", "chat")
    assert result.exit_code == 1
    assert result.stdout.startswith("chat: sleeping ")
    assert result.stderr == (
        "The model `chatt` does not exist; did you mean `chat`? "
        "models here: chat, gpt-4o, org/embed.\n"
    )
    assert operator.done == [("sleep", "chat")]


def test_steering_for_programs_is_a_line_a_model(server: Server, operator: FakeOperator) -> None:
    result = llmserve(server, "load", "chat", "org/embed", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(line.pop("seconds") >= 0 for line in lines)
    assert lines == operator.models()


def test_why_a_model_does_not_start_is_told(server: Server, operator: FakeOperator) -> None:
    operator.fails = StartupError("no such GPU")
    result = llmserve(server, "load", "chat")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "no such GPU\n")


# --- reload


def test_what_a_changed_registry_changes_is_told(server: Server, operator: FakeOperator) -> None:
    assert llmserve(server, "reload", "--dry-run").stdout == "chat: restarts\ncode: added\n"
    answer = json.loads(llmserve(server, "reload", "--json").stdout)
    assert answer == {"changed": True, "lines": ["chat: restarts", "code: added"]}
    assert operator.done == [("reload", True), ("reload", False)]


def test_that_nothing_changed_is_told(tmp_path: Path) -> None:
    class Same(FakeOperator):
        async def reload(self, *, dry_run: bool) -> dict[str, Any]:
            return {"changed": False, "lines": []}

    with Server(served(Same(tmp_path))) as server:
        assert llmserve(server, "reload").stdout == "Nothing has changed.\n"


def test_a_bad_registry_ends_with_2_and_every_problem(
    server: Server, operator: FakeOperator
) -> None:
    operator.fails = ConfigError(["models.yaml:2: a", "models.yaml:3: b"])
    result = llmserve(server, "reload")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "models.yaml:2: a\nmodels.yaml:3: b\n"


# --- events


def test_events_are_told_until_the_server_ends(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "localtime", time.gmtime)
    result = llmserve(server, "events")
    assert result.stdout == (
        "00:00:00 chat/1: loading -> warming: 4 s\n"
        "00:00:00 chat/1: loading -> ready (2 events before it are lost)\n"
    )
    assert result.exit_code == 3
    assert result.stderr.startswith(f"{server.url}: the server has ended; ")


def test_events_for_programs_are_a_line_each(server: Server) -> None:
    first, _ = llmserve(server, "events", "--json").stdout.splitlines()
    assert json.loads(first) == change("warming")


def test_events_that_fail_end_with_the_server_s_words(tmp_path: Path) -> None:
    class Failing(FakeOperator):
        async def events(self) -> AsyncIterator[dict[str, Any]]:
            yield change("warming")
            raise StartupError("no more events")

    with Server(served(Failing(tmp_path))) as server:
        result = llmserve(server, "events")
    assert (result.exit_code, result.stderr) == (1, "no more events\n")
    assert len(result.stdout.splitlines()) == 1


# --- logs


def test_a_log_comes_as_it_was_written(server: Server, operator: FakeOperator) -> None:
    written = b"first\n\x1b[1mbold\x1b[0m caf\xc3\xa9 \xff\r\nlast"
    operator.log_of("chat", 1).write_bytes(written)
    result = llmserve(server, "logs", "gpt-4o", "--replica", "1", "-n", "2")
    assert (result.exit_code, result.stdout_bytes) == (0, written.removeprefix(b"first\n"))


def test_a_log_for_programs_is_an_object_a_line(server: Server, operator: FakeOperator) -> None:
    operator.log_of("chat", 0).write_text("a\u2028b\n\nlast", encoding="utf-8")
    result = llmserve(server, "logs", "chat", "--json")
    lines = [json.loads(line)["line"] for line in result.stdout.rstrip("\n").split("\n")]
    assert lines == ["a\u2028b", "", "last"]


def test_a_log_is_followed_until_the_server_ends(server: Server, operator: FakeOperator) -> None:
    log = operator.log_of("chat", 0)
    log.write_bytes(b"one\n")
    with closing(operate.AdminClient(server.url, None)) as client:
        parts = client.log("chat", lines=5, replica=0, follow=True)
        assert next(parts) == b"one\n"
        with log.open("ab") as more:
            more.write(b"two\n")
        assert next(parts) == b"two\n"
        server.stop()
        with pytest.raises(operate.NoServer, match=server.url):
            next(parts)


# --- keys, and servers that are none


def test_a_key_is_sent_and_asked_for(operator: FakeOperator) -> None:
    with Server(served(operator, SecretStr("k\u00e9y"))) as server:
        assert llmserve(server, "ps", "--key", "k\u00e9y").exit_code == 0
        environment = {"LLMSERVE_ADMIN_KEY": "k\u00e9y", "LLMSERVE_URL": f"{server.url}/v1/"}
        assert CliRunner().invoke(cli, ["ps"], env=environment).exit_code == 0
        result = llmserve(server, "ps")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "No admin key came; send `Authorization: Bearer KEY`. "
        "Give it with --key or LLMSERVE_ADMIN_KEY.\n"
    )


@pytest.mark.parametrize(
    "words", [["ps"], ["load", "chat", "embed"], ["reload"], ["logs", "chat"], ["events"]]
)
def test_no_server_ends_with_3_and_says_where_it_was_looked_for(words: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"127.0.0.1:{closed.getsockname()[1]}"
    result = CliRunner().invoke(cli, [*words, "--url", url])
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith(f"http://{url}: no server answers (")
    assert result.stderr.endswith("; name another server with --url or LLMSERVE_URL\n")
    assert result.stderr.count("\n") == 1


def test_a_url_that_is_none_ends_with_3() -> None:
    result = CliRunner().invoke(cli, ["ps", "--url", "http://[::1"])
    assert (result.exit_code, result.stdout) == (3, "")
    assert "http://[::1: the request failed (" in result.stderr


def test_a_server_that_ends_before_its_answer_ends_with_3() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            listener.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        result = CliRunner().invoke(cli, ["load", "chat", "--url", url])
        thread.join()
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith(f"{url}: the request failed (")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (JSONResponse(["odd"]), "did not answer as llmserve does"),
        (JSONResponse({"object": "list"}), "did not answer as llmserve does"),
        (PlainTextResponse("<html>"), "did not answer as llmserve does"),
        (PlainTextResponse("Bad Gateway", 502), "/admin/models: 502 Bad Gateway"),
        (JSONResponse({"detail": "Not Found"}, 404), "Not Found"),
        (JSONResponse(["odd"], 400), "odd"),
    ],
)
def test_another_server_is_no_traceback(answer: Any, told: str) -> None:
    async def models(_: object) -> Any:
        return answer

    with Server(Starlette(routes=[Route("/admin/models", models)])) as server:
        result = llmserve(server, "ps")
    assert (result.exit_code, result.stdout) == (1, "")
    assert told in result.stderr


def test_ctrl_c_ends_a_command_with_130(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Iterator[object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(operate.AdminClient, "events", interrupted)
    result = llmserve(server, "events")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")


class Proxy(Server):
    """Answers every request itself, and keeps what it saw."""

    def __init__(self) -> None:
        self.seen: list[str] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            self.seen.append(dict(scope["headers"]).get(b"authorization", b"").decode())
            await PlainTextResponse("proxied", 502)(scope, receive, send)

        super().__init__(app)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    running = Proxy()
    with running:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"):
            monkeypatch.setenv(name, running.url)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield running


def test_key_for_a_loopback_server_goes_to_no_proxy(server: Server, proxy: Proxy) -> None:
    client = operate.AdminClient(server.url, "k")
    assert [model["name"] for model in client.models()] == ["chat", "org/embed"]
    client.close()
    assert proxy.seen == []


def test_server_of_another_machine_is_asked_through_a_proxy(proxy: Proxy) -> None:
    client = operate.AdminClient("http://box.example:8000", "k")
    with pytest.raises(operate.Refused, match="502 proxied"):
        client.models()
    client.close()
    assert proxy.seen == ["Bearer k"]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("org/embed", "models/org/embed"),
        ("a//b", "models/a%2F%2Fb"),
        ("a/", "models/a%2F"),
        ("a b", "models/a%20b"),
    ],
)
def test_path_of_a_model_keeps_its_slashes(name: str, path: str) -> None:
    assert operate._model(name) == path
