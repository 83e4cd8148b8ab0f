from __future__ import annotations

import io
import json
import os
import re
import select
import socket
import subprocess
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from llmserve.cli.chat import (
    HELP,
    Answer,
    ChatClient,
    ChatOptions,
    Conversation,
    Delta,
    Loop,
    Message,
    parse_delta,
)
from llmserve.cli.client import sse_data
from llmserve.cli.errors import CommandError
from tests.unit.app_server import AppServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from starlette.requests import Request

HI: list[Message] = [{"role": "user", "content": "hi"}]
DONE = b"data: [DONE]\n\n"


def frame(content: str | None = None, finish: str | None = None, **delta: str) -> bytes:
    choice = {"index": 0, "delta": {"content": content, **delta}, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode() + b"\n\n"


def usage(tokens: int) -> bytes:
    chunk = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": tokens}}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def odd_stream() -> Iterator[bytes]:
    """CRLF, comments, data over two lines, U+2028, and a cut through an é."""
    yield b": ping - 2026\r\n\r\n"
    head, tail = frame("caf\u00e9\u2028!").rstrip(b"\n").split(b"\xc3")
    yield head + b"\xc3"
    time.sleep(0.02)
    yield tail + b"\r"
    time.sleep(0.02)
    yield b'\n\r\nevent: x\r\ndata: {"choices":\r\ndata: [{"finish_reason": "stop"}]}\r\n\r\n'
    yield b"data:[DONE]\r\n\r\n"


class Server(AppServer):
    """Answers by the name of the model; `bodies` are the chat requests."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.names = ["plain"]
        self.owner = "someone"
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        super().__init__(Starlette(routes=routes), graceful_s=1)

    async def models(self, request: Request) -> Response:
        if request.headers.get("authorization") == "Bearer wrong":
            return JSONResponse({"error": {"message": "Wrong key."}}, 401)
        return JSONResponse(
            {"data": [{"id": n, "object": "model"} | self._abilities(n) for n in self.names]}
        )

    def _abilities(self, name: str) -> dict[str, list[str]]:
        if self.owner != "llmserve":
            return {}
        return {"endpoints": ["embeddings"] if name == "embed" else ["chat completions"]}

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        name = body["model"]
        if name == "embed":
            error = {
                "message": "The model `embed` does not support chat.",
                "code": "unsupported_model",
            }
            return JSONResponse({"error": error}, 400)
        self.bodies.append(body)
        refusals: dict[str, Response] = {
            "loading": JSONResponse({"error": {"message": "loading,\ntry later"}}, 503),
            "nowhere": JSONResponse({"error": {"message": "The model `nowhere` is not"}}, 404),
            "proxy": PlainTextResponse("Bad Gateway", 502),
            "page": PlainTextResponse("<html>"),
        }
        if name in refusals:
            return refusals[name]
        asked = body["messages"][-1]["content"]
        streams: dict[str, Callable[[], Iterator[bytes]]] = {
            "plain": lambda: iter([frame("You said "), frame(asked, "stop"), usage(7), DONE]),
            "odd": odd_stream,
            "thinks": lambda: iter([frame(reasoning="hm"), frame("yes", "stop"), usage(2), DONE]),
            "mid": lambda: iter([frame("half"), b'data: {"error": {"message": "died"}}\n\n']),
            "short": lambda: iter([frame("half")]),
            "slow": lambda: slow(asked),
            "hangs": hangs,
        }
        return StreamingResponse(streams[name](), media_type="text/event-stream")


def slow(asked: str) -> Iterator[bytes]:
    if asked == "quick":
        yield frame("QUICK", "stop")
        yield DONE
        return
    for i in range(200):
        yield frame(f"tick{i} ")
        time.sleep(0.05)


def hangs() -> Iterator[bytes]:
    yield b": ping\n\n"
    time.sleep(1)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def stream(url: str, model: str, timeout_s: float = 600, **options: Any) -> list[Delta]:
    with closing(ChatClient(ChatOptions(url=url, **options), timeout_s)) as client:
        return list(client.answer(model, HI))


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.content for delta in deltas)


def run_loop(
    url: str, lines: list[str | type[BaseException]], *, interactive: bool = True, **options: Any
) -> tuple[Loop, str, str]:
    out, err = io.StringIO(), io.StringIO()
    coming = iter(lines)

    def read(_prompt: str) -> str:
        line = next(coming, EOFError)
        if isinstance(line, str):
            return line
        raise line

    chosen = ChatOptions(url=url, **options)
    with closing(ChatClient(chosen)) as client:
        loop = Loop(client, chosen, read, out, err, interactive)
        loop.start()
        loop.run()
    return loop, out.getvalue(), err.getvalue()


STREAM = (
    b": ping\r\n\r\ndata: a\r\ndata:  \xc3\xa9\r\nid: 1\r\n\r\ndata\n\ndata: b\xe2\x80\xa8c\n\n"
)


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_events_are_the_same_wherever_the_bytes_are_cut(size: int, ending: bytes) -> None:
    raw = STREAM.replace(b"\r\n", b"\n").replace(b"\n", ending) + b": end" + ending
    chunks = [raw[i : i + size] for i in range(0, len(raw), size)]
    assert list(sse_data(chunks)) == ["a\n \u00e9", "", "b\u2028c"]


def test_unfinished_event_is_no_event() -> None:
    assert list(sse_data([b"data: a\n\ndata: b\n"])) == ["a"]


@pytest.mark.parametrize("data", ["", "no json", "[1]", "3", "null", '{"choices": 3}'])
def test_invalid_chunk_is_an_error(data: str) -> None:
    with pytest.raises(CommandError, match="invalid chat chunk"):
        parse_delta(data)


def test_deltas_may_lack_anything() -> None:
    assert parse_delta('{"choices": []}') == Delta()
    assert parse_delta('{"choices": [{"delta": null}], "usage": null, "error": null}') == Delta()
    assert parse_delta('{"choices": [{"delta": {"reasoning_content": "r"}}]}').reasoning == "r"


def test_summary_counts_from_the_first_token() -> None:
    answer = Answer(sent_s=10.0)
    assert answer.summary() == "~0 tokens"
    for i in range(5):
        answer.add(Delta(content="x"), 10.5 + i / 4)
    assert answer.summary() == "~5 tokens, 4.0 tokens/s, first after 0.50 s"
    answer.add(Delta(tokens=9, finish="length"), 99.0)
    expected = "9 tokens, 8.0 tokens/s, first after 0.50 s, stopped at the token limit"
    assert answer.summary() == expected


@pytest.mark.parametrize(("scheme", "suffix"), [("http://", ""), ("http://", "/v1/"), ("", "/v1")])
def test_stream(server: Server, scheme: str, suffix: str) -> None:
    url = scheme + server.url.removeprefix("http://") + suffix
    deltas = stream(url, "plain", temperature=0.0, max_tokens=5)
    assert text_of(deltas) == "You said hi"
    assert deltas[-1].tokens == 7
    assert server.bodies == [
        {
            "model": "plain",
            "messages": HI,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.0,
            "max_tokens": 5,
        }
    ]


def test_stream_of_odd_bytes(server: Server) -> None:
    assert text_of(stream(server.url, "odd")) == "caf\u00e9\u2028!"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "^The model `nowhere` is not$"),
        ("loading", "^loading,\ntry later$"),
        ("proxy", "/v1/chat/completions: 502 Bad Gateway$"),
        ("page", "did not return an event stream"),
        ("mid", "^died$"),
        ("short", "the stream ended before the answer was complete"),
    ],
)
def test_failures_of_a_request(server: Server, model: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        stream(server.url, model)


def test_silent_server(server: Server) -> None:
    with pytest.raises(CommandError, match="no answer in time"):
        stream(server.url, "hangs", timeout_s=0.2)


def test_refused_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with pytest.raises(CommandError, match=rf"^http://127.0.0.1:{port}: no connection .*refused"):
        stream(f"127.0.0.1:{port}", "plain")


@pytest.mark.parametrize("url", ["ftp://host", "http://host:port"])
def test_invalid_url(url: str) -> None:
    with pytest.raises(CommandError, match=r"request failed"):
        stream(url, "plain")


def test_wrong_key_names_the_option(server: Server) -> None:
    client = ChatClient(ChatOptions(url=server.url, key="wrong"))
    with (
        closing(client),
        pytest.raises(CommandError, match=r"Wrong key\. Set the key with --key or LLMSERVE_KEY"),
    ):
        client.models()


def test_llmserve_models_that_cannot_chat_are_not_listed(server: Server) -> None:
    server.names = ["embed", "plain"]
    with closing(ChatClient(ChatOptions(url=server.url))) as client:
        assert client.models() == ["embed", "plain"]
        server.owner = "llmserve"
        assert client.models() == ["plain"]
    assert server.bodies == []


def test_conversation_saves_and_loads_itself(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    cut: Message = {"role": "assistant", "content": "caf\u00e9 \ud83d", "cut": True}
    Conversation("brief", [*HI, cut]).save(str(file))
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert saved[:2] == [{"role": "system", "content": "brief"}, *HI]
    loaded = Conversation("another")
    assert loaded.load(str(file)) == f"Loaded 2 messages from {file}."
    assert loaded == Conversation("brief", [*HI, {**cut, "content": "caf\u00e9 ?"}])


@pytest.mark.parametrize(
    "text", ["", "{}x", '{"a": 1}', '[{"role": "user"}]', "[1]", '[{"role": "x", "content": ""}]']
)
def test_loading_an_invalid_file_changes_nothing(tmp_path: Path, text: str) -> None:
    file = tmp_path / "talk.json"
    file.write_text(text)
    talk = Conversation("brief", list(HI))
    with pytest.raises(CommandError, match="not a conversation; expected a list"):
        talk.load(str(file))
    assert talk == Conversation("brief", HI)


def test_conversation_removes_exchanges() -> None:
    talk = Conversation("brief", [*HI, {"role": "assistant", "content": "a"}, *HI])
    talk.remove()
    assert len(talk.messages) == 2
    talk.remove()
    with pytest.raises(CommandError, match="has no message yet"):
        talk.remove()
    talk.messages = list(HI)
    talk.reset()
    assert talk == Conversation("brief", [])


def test_whole_conversation_is_sent(server: Server) -> None:
    loop, out, err = run_loop(server.url, ["one", "", "two"], system="brief")
    assert [m["content"] for m in server.bodies[1]["messages"]] == [
        "brief",
        "one",
        "You said one",
        "two",
    ]
    assert "You said two\n" in out
    assert "[7 tokens, " in out
    assert (err, loop.failed) == ("", False)


def test_regen_replaces_the_answer(server: Server) -> None:
    loop, _, _ = run_loop(server.url, ["one", "!!regen"])
    assert server.bodies[0] == server.bodies[1]
    assert len(loop.conversation.messages) == 2


@pytest.mark.parametrize("model", ["mid", "loading", "nowhere"])
def test_failed_answer_does_not_change_the_conversation(server: Server, model: str) -> None:
    loop, _, err = run_loop(server.url, ["one", f"!!model {model}", "two", "!!regen"])
    assert [m["content"] for m in loop.conversation.messages] == ["one", "You said one"]
    assert re.fullmatch(r"(Error: .*\n){2}", err)
    assert loop.failed


def test_commands(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    lines: list[str | type[BaseException]] = [
        "one",
        f"!!save {file}",
        "!!remove",
        "!!remove",
        "!!reset",
        "!!system be brief",
        "!!model",
        "!!help",
        "!!nonsense",
        f"!!load {tmp_path}/none",
        "!!save",
        f"!!load {file}",
        "!!exit",
        "never",
    ]
    loop, out, err = run_loop(server.url, lines)
    assert len(server.bodies) == 1
    assert [m["content"] for m in loop.conversation.messages] == ["one", "You said one"]
    assert loop.conversation.system == ""  # as in the file
    assert HELP in out
    assert "Model: plain." in out
    errors = err.splitlines()
    assert len(errors) == 4
    assert "has no message yet" in errors[0]
    assert "unknown command !!nonsense" in errors[1]


def test_user_chooses_a_model(server: Server) -> None:
    server.names = ["short", "plain", "mid"]
    loop, out, _ = run_loop(server.url, ["7", "x", "2", "one"])
    assert loop.model == "plain"
    assert "  2  plain" in out


def test_no_model_that_chats(server: Server) -> None:
    server.names = []
    with pytest.raises(CommandError, match="no chat model"):
        run_loop(server.url, [])


def test_pipe_takes_the_first_model_and_prints_answers_only(server: Server) -> None:
    server.names = ["thinks", "plain"]
    _, out, err = run_loop(server.url, ["one", "!!model plain", "two"], interactive=False)
    assert out == "yes\nYou said two\n"
    assert err == "Model: thinks, the first of thinks, plain\n"


def test_multiline_takes_all_to_the_end_but_commands(server: Server) -> None:
    lines: list[str | type[BaseException]] = ["!!reset", "a", "", " b", EOFError, "c"]
    run_loop(server.url, lines, multiline=True)
    assert [body["messages"][-1]["content"] for body in server.bodies] == ["a\n\n b", "c"]


def test_reasoning_is_dim_and_apart(server: Server) -> None:
    _, out, _ = run_loop(server.url, ["one"], model="thinks")
    assert "\x1b[2mhm\x1b[22m\nyes\n" in out


def test_answers_do_not_drive_the_terminal(server: Server) -> None:
    _, out, _ = run_loop(server.url, ["\x1b[2J\r\x9b"])
    assert "You said \u241b[2J\u240d\ufffd\n" in out
    _, out, _ = run_loop(server.url, ["\x1b[2J"], interactive=False)
    assert out == "You said \x1b[2J\n"


def test_ctrl_c_twice_at_the_prompt_leaves(server: Server) -> None:
    lines: list[str | type[BaseException]] = [KeyboardInterrupt, "one", *[KeyboardInterrupt] * 2]
    _, out, _ = run_loop(server.url, [*lines, "never"])
    assert out.count("Ctrl-C again") == 2
    assert len(server.bodies) == 1


MAIN = """
import os, signal, sys
from llmserve import terminal
from llmserve.cli.chat import ChatOptions, chat
terminal.prepare()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent process may ignore it
if sys.stdin.isatty():
    os.close(os.open(os.ttyname(0), os.O_RDWR))  # ours from now on: ^C becomes SIGINT
sys.exit(chat(ChatOptions(url=sys.argv[1], model=sys.argv[2] if sys.argv[2:] else None)))
"""


def run_pipe(url: str, model: str, text: bytes) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", MAIN, url, model]
    return subprocess.run(command, input=text, capture_output=True, timeout=30, check=False)


def test_pipe_exit_codes(server: Server) -> None:
    good = run_pipe(server.url, "plain", b"one\n\ntwo \xff\xc3\xa9")
    assert good.stdout.decode() == "You said one\nYou said two \ufffd\u00e9\n"
    assert (good.stderr, good.returncode) == (b"", 0)
    bad = run_pipe(server.url, "mid", b"one\ntwo\n")
    assert (bad.stdout, bad.stderr) == (b"half\nhalf\n", b"Error: died\nError: died\n")
    assert bad.returncode == 1
    none = run_pipe("127.0.0.1:1", "plain", b"one\n")
    assert re.fullmatch(rb"Error: http://127.0.0.1:1: no connection .*\n", none.stderr)
    assert none.returncode == 1


class Pty:
    def __init__(self, *arguments: str) -> None:
        self._master, slave = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt_prompt(self) -> None:
        # input() shows the prompt a little before it waits, and a signal in between may
        # stay unseen until the next key.
        time.sleep(0.5)
        self.type("\x03")

    def expect(self, pattern: str, within_s: float = 60) -> str:
        """The output up to the end of the pattern; the next call starts after it."""
        deadline_s = time.monotonic() + within_s
        while not (match := re.search(pattern, self.screen)):
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"no {pattern!r} in {self.screen!r}"
            if select.select([self._master], [], [], left_s)[0]:
                self.screen += os.read(self._master, 65536).decode(errors="replace")
        seen, self.screen = self.screen[: match.end()], self.screen[match.end() :]
        return seen

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def test_ctrl_c_stops_the_answer_only(server: Server) -> None:
    with closing(Pty(server.url, "slow")) as pty:
        pty.expect("> ")
        pty.type("count\n")
        pty.expect("tick3 ")
        pty.type("\x03")
        seen = pty.expect(r"\[stopped, ~\d+ tokens[^\]]*\]")
        pty.expect("> ")
        assert "Traceback" not in seen
        pty.type("quick\n")
        pty.expect("QUICK\r\n")
        pty.expect("> ")
        pty.type("\x04")
        assert pty.process.wait(60) == 0
    stopped, asked = server.bodies[1]["messages"][1:]
    assert stopped["role"] == "assistant"
    assert re.match(r"tick0 tick1 tick2 tick3 ", stopped["content"])
    assert set(stopped) == {"role", "content"}
    assert asked["content"] == "quick"


def test_ctrl_c_before_the_first_token_removes_the_message(server: Server) -> None:
    with closing(Pty(server.url, "hangs")) as pty:
        pty.expect("> ")
        pty.type("one\n")
        while not server.bodies:
            assert pty.process.poll() is None
            time.sleep(0.01)
        pty.type("\x03")
        pty.expect("your message was removed")
        pty.expect("> ")
        pty.type("!!model plain\n")
        pty.expect("> ")
        pty.type("two\n")
        pty.expect("You said two")
        pty.expect("> ")
        pty.interrupt_prompt()
        pty.expect("Ctrl-C again")
        pty.expect("> ")
        pty.interrupt_prompt()
        assert pty.process.wait(60) == 0
    assert len(server.bodies[1]["messages"]) == 1
