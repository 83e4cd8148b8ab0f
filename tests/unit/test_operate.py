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
from pydantic import SecretStr
from rich.console import Console
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from typer.testing import CliRunner, Result

from llmserve.cli import operate
from llmserve.cli.errors import NoServer, Refused
from llmserve.cli.main import app as cli
from llmserve.errors import ConfigError, StartupError
from tests.unit.app_server import AppServer
from tests.unit.test_admin import FakeOperator, change, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from starlette.types import Receive, Scope, Send


class Eventful(FakeOperator):
    """Two events, and then the server ends."""

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        yield change("warming")
        yield change("ready") | {"note": "", "lost": 2}


@pytest.fixture
def operator(tmp_path: Path) -> FakeOperator:
    return Eventful(tmp_path)


@pytest.fixture
def server(operator: FakeOperator) -> Iterator[AppServer]:
    with AppServer(served(operator)) as running:
        yield running


def llmserve(server: AppServer, *words: str) -> Result:
    return CliRunner().invoke(cli, [*words, "--url", server.url], env={"TZ": "UTC"})


def rows(text: str) -> list[list[str]]:
    return [re.split(r"\s{3,}", line.rstrip()) for line in text.splitlines()]


# --- ps


def test_ps_has_a_row_for_each_of_several_replicas(server: AppServer) -> None:
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


def test_models_for_programs_are_the_server_s_own(
    server: AppServer, operator: FakeOperator
) -> None:
    assert json.loads(llmserve(server, "ps", "--json").stdout) == {"models": operator.models()}


def test_a_long_note_is_not_cut_where_no_terminal_is(
    operator: FakeOperator, tmp_path: Path
) -> None:
    class Wordy(FakeOperator):
        def models(self) -> list[dict[str, Any]]:
            return [self._model("chat", [], 1) | {"note": "[red]" + "why " * 100 + "end"}]

    with AppServer(served(Wordy(tmp_path))) as server:
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
    ("seconds", "text"),
    [(0.0, "0 s"), (59.4, "59 s"), (60, "1.0 m"), (5400, "1.5 h"), (86400 * 2.5, "2.5 d")],
)
def test_span_is_in_the_largest_unit(seconds: float, text: str) -> None:
    assert operate.span(seconds) == text


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
def test_change_prints_the_new_state(
    words: tuple[str, ...],
    done: tuple[object, ...],
    state: str,
    server: AppServer,
    operator: FakeOperator,
) -> None:
    result = llmserve(server, *words)
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.fullmatch(rf"{done[1]}: {state} \d+\.\d s\n", result.stdout)
    assert operator.done == [done]


def test_refused_change_does_not_end_the_others(server: AppServer, operator: FakeOperator) -> None:
    result = llmserve(server, "sleep", "chatt", "chat")
    assert result.exit_code == 1
    assert result.stdout.startswith("chat: sleeping ")
    assert result.stderr == (
        "The model `chatt` does not exist; did you mean `chat`? "
        "models here: chat, gpt-4o, org/embed.\n"
    )
    assert operator.done == [("sleep", "chat")]


def test_change_as_json_is_a_line_a_model(server: AppServer, operator: FakeOperator) -> None:
    result = llmserve(server, "load", "chat", "org/embed", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(line.pop("seconds") >= 0 for line in lines)
    assert lines == operator.models()


def test_failed_start_prints_the_reason(server: AppServer, operator: FakeOperator) -> None:
    operator.fails = StartupError("no such GPU")
    result = llmserve(server, "load", "chat")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "no such GPU\n")


# --- reload


def test_reload_prints_the_changes(server: AppServer, operator: FakeOperator) -> None:
    assert llmserve(server, "reload", "--dry-run").stdout == "chat: restarts\ncode: added\n"
    answer = json.loads(llmserve(server, "reload", "--json").stdout)
    assert answer == {"changed": True, "lines": ["chat: restarts", "code: added"]}
    assert operator.done == [("reload", True), ("reload", False)]


def test_reload_without_changes_prints_so(tmp_path: Path) -> None:
    class Same(FakeOperator):
        async def reload(self, *, dry_run: bool) -> dict[str, Any]:
            return {"changed": False, "lines": []}

    with AppServer(served(Same(tmp_path))) as server:
        assert llmserve(server, "reload").stdout == "Nothing has changed.\n"


def test_a_bad_registry_ends_with_2_and_every_problem(
    server: AppServer, operator: FakeOperator
) -> None:
    operator.fails = ConfigError(["models.yaml:2: a", "models.yaml:3: b"])
    result = llmserve(server, "reload")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "models.yaml:2: a\nmodels.yaml:3: b\n"


# --- events


def test_events_are_printed_until_the_server_ends(
    server: AppServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "localtime", time.gmtime)
    result = llmserve(server, "events")
    assert result.stdout == (
        "00:00:00 chat/1: loading -> warming: 4 s\n"
        "00:00:00 chat/1: loading -> ready (2 earlier events lost)\n"
    )
    assert result.exit_code == 3
    assert result.stderr.startswith(f"{server.url}: the server has ended; ")


def test_events_for_programs_are_a_line_each(server: AppServer) -> None:
    first, _ = llmserve(server, "events", "--json").stdout.splitlines()
    assert json.loads(first) == change("warming")


def test_events_that_fail_end_with_the_server_s_words(tmp_path: Path) -> None:
    class Failing(FakeOperator):
        async def events(self) -> AsyncIterator[dict[str, Any]]:
            yield change("warming")
            raise StartupError("no more events")

    with AppServer(served(Failing(tmp_path))) as server:
        result = llmserve(server, "events")
    assert (result.exit_code, result.stderr) == (1, "no more events\n")
    assert len(result.stdout.splitlines()) == 1


# --- logs


def test_a_log_comes_as_it_was_written(server: AppServer, operator: FakeOperator) -> None:
    written = b"first\n\x1b[1mbold\x1b[0m caf\xc3\xa9 \xff\r\nlast"
    operator.log_of("chat", 1).write_bytes(written)
    result = llmserve(server, "logs", "gpt-4o", "--replica", "1", "-n", "2")
    assert (result.exit_code, result.stdout_bytes) == (0, written.removeprefix(b"first\n"))


def test_a_log_for_programs_is_an_object_a_line(server: AppServer, operator: FakeOperator) -> None:
    operator.log_of("chat", 0).write_text("a\u2028b\n\nlast", encoding="utf-8")
    result = llmserve(server, "logs", "chat", "--json")
    lines = [json.loads(line)["line"] for line in result.stdout.rstrip("\n").split("\n")]
    assert lines == ["a\u2028b", "", "last"]


def test_a_log_is_followed_until_the_server_ends(server: AppServer, operator: FakeOperator) -> None:
    log = operator.log_of("chat", 0)
    log.write_bytes(b"one\n")
    with closing(operate.AdminClient(server.url, None)) as client:
        parts = client.log("chat", lines=5, replica=0, follow=True)
        assert next(parts) == b"one\n"
        with log.open("ab") as more:
            more.write(b"two\n")
        assert next(parts) == b"two\n"
        server.stop()
        with pytest.raises(NoServer, match=server.url):
            next(parts)


# --- keys, and other servers


def test_key_is_sent_and_a_missing_one_is_named(operator: FakeOperator) -> None:
    with AppServer(served(operator, SecretStr("k\u00e9y"))) as server:
        assert llmserve(server, "ps", "--key", "k\u00e9y").exit_code == 0
        environment = {"LLMSERVE_ADMIN_KEY": "k\u00e9y", "LLMSERVE_URL": f"{server.url}/v1/"}
        assert CliRunner().invoke(cli, ["ps"], env=environment).exit_code == 0
        result = llmserve(server, "ps")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "The request has no admin key; send `Authorization: Bearer KEY`. "
        "Set the key with --key or LLMSERVE_ADMIN_KEY.\n"
    )


@pytest.mark.parametrize(
    "words", [["ps"], ["load", "chat", "embed"], ["reload"], ["logs", "chat"], ["events"]]
)
def test_no_server_ends_with_3_and_names_the_url(words: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"127.0.0.1:{closed.getsockname()[1]}"
    result = CliRunner().invoke(cli, [*words, "--url", url])
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith(f"http://{url}: no connection (")
    assert result.stderr.endswith("; name another server with --url or LLMSERVE_URL\n")
    assert result.stderr.count("\n") == 1


def test_invalid_url_ends_with_3() -> None:
    result = CliRunner().invoke(cli, ["ps", "--url", "http://[::1"])
    assert (result.exit_code, result.stdout) == (3, "")
    assert "http://[::1: request failed (" in result.stderr


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
    assert result.stderr.startswith(f"{url}: request failed (")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (JSONResponse(["odd"]), "unexpected answer; check --url"),
        (JSONResponse({"object": "list"}), "unexpected answer; check --url"),
        (PlainTextResponse("<html>"), "unexpected answer; check --url"),
        (PlainTextResponse("Bad Gateway", 502), "/admin/models: 502 Bad Gateway"),
        (JSONResponse({"detail": "Not Found"}, 404), "Not Found"),
        (JSONResponse(["odd"], 400), "odd"),
    ],
)
def test_another_server_is_no_traceback(answer: Any, message: str) -> None:
    async def models(_: object) -> Any:
        return answer

    with AppServer(Starlette(routes=[Route("/admin/models", models)])) as server:
        result = llmserve(server, "ps")
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr


def test_ctrl_c_ends_a_command_with_130(server: AppServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Iterator[object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(operate.AdminClient, "events", interrupted)
    result = llmserve(server, "events")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")


class Proxy(AppServer):
    """Answers every request and keeps its key."""

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


def test_key_for_a_loopback_server_goes_to_no_proxy(server: AppServer, proxy: Proxy) -> None:
    client = operate.AdminClient(server.url, "k")
    assert [model["name"] for model in client.models()] == ["chat", "org/embed"]
    client.close()
    assert proxy.seen == []


def test_server_of_another_machine_is_asked_through_a_proxy(proxy: Proxy) -> None:
    client = operate.AdminClient("http://box.example:8000", "k")
    with pytest.raises(Refused, match="502 proxied"):
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
