"""Commands as processes with the streams of a shell, a pipe or a service."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from llmserve import terminal
from tests.unit.app_server import AppServer
from tests.unit.test_admin import served
from tests.unit.test_operate import operator as operator  # noqa: PLC0414  # a fixture

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.test_admin import FakeOperator

ASCII = {"PYTHONIOENCODING": "ascii:strict"}
IN_A_TERMINAL = {"TTY_COMPATIBLE": "1", "FORCE_COLOR": "1"}
STRICT_C = {
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONIOENCODING": ":strict",
}


def llmserve(
    *words: str | bytes, env: dict[str, str], **options: object
) -> subprocess.CompletedProcess[bytes]:
    line: list[str | bytes] = [sys.executable, "-m", "llmserve", *words]
    plain = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("LC_", "LANG", "PYTHONIO", "PYTHONUTF8"))
    }
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        line, env=plain | env, capture_output=True, check=False, **options
    )


@pytest.fixture
def registry(tmp_path: Path) -> str:
    file = tmp_path / "models.yaml"
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model.bin").write_text("weights", encoding="utf-8")
    file.write_text("models: {café: {model: ., memory: 8GiB}}", encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("env", [ASCII, ASCII | IN_A_TERMINAL, STRICT_C])
@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["check"], b": 1 model: caf?"),
        (["plan", "--gpus", "1xH100-80G"], b"caf?"),
        (["plan", "--gpus", "1xH100-80G", "--json"], b'"caf\\u00e9"'),
    ],
)
def test_characters_that_a_terminal_lacks_are_replaced(
    words: list[str], shown: bytes, env: dict[str, str], registry: str
) -> None:
    command, *options = words
    ended = llmserve(command, registry, *options, env=env)
    assert b"Traceback" not in ended.stderr
    assert shown in ended.stdout.replace(b"\x1b[32m", b"").replace(b"\x1b[0m", b"")
    ended.stdout.decode("ascii")


def test_bars_of_a_plan_have_ascii_replacements(registry: str) -> None:
    ended = llmserve("plan", registry, "--gpus", "1xH100-80G", env=ASCII)
    assert b"#" in ended.stdout or b":" in ended.stdout
    assert b"????" not in ended.stdout


@pytest.mark.parametrize("env", [ASCII, STRICT_C])
def test_commands_and_chat_print_to_an_ascii_terminal(
    env: dict[str, str], operator: FakeOperator, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = [model | {"note": "café"} for model in operator.models()]
    monkeypatch.setattr(operator, "models", lambda: shown)
    with AppServer(served(operator)) as server:
        for words in (["ps"], ["events", "--json"]):
            ended = llmserve(*words, "--url", server.url, env=env)
            assert b"Traceback" not in ended.stderr, words
            assert ended.stdout
        chat = llmserve("chat", "--url", server.url, env=env, input="é\n".encode())
        assert b"Traceback" not in chat.stderr
        listed = json.loads(llmserve("ps", "--json", "--url", server.url, env=env).stdout)
        assert listed["models"] == shown


@pytest.mark.parametrize("words", [["ps"], ["load", "b\u00fcro"], ["chat"]])
def test_arguments_outside_the_locale_are_no_traceback(words: list[str]) -> None:
    url = "http://127.0.0.1:1/\u00fc".encode()
    ended = llmserve(*(each.encode() for each in words), "--url", url, env=STRICT_C, input=b"")
    assert b"Traceback" not in ended.stderr
    assert ended.returncode in (1, 3)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_traceback(closed: str, registry: str) -> None:
    for words in (f"check {registry}", "chat --url http://127.0.0.1:1"):
        line = f"{sys.executable} -m llmserve {words} {closed}"
        ended = subprocess.run(["sh", "-c", line], capture_output=True, check=False)
        assert b"Traceback" not in ended.stderr
        assert ended.returncode == (0 if words.startswith("check") else 1)


def test_closed_reader_ends_a_command_quietly(registry: str) -> None:
    line = f"{sys.executable} -m llmserve plan {registry} --gpus 1xH100-80G --json"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as out:
        ended = subprocess.run(line.split(), stdout=out, stderr=subprocess.PIPE, check=False)
    assert (ended.returncode, ended.stderr) == (1, b"")


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, text)

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "no space")


def test_enduring_stream_drops_output_that_fails() -> None:
    stream = terminal.Enduring(Gone())
    print("lost", file=stream, flush=True)
    stream.finish(60)
    assert not stream.isatty()


def test_enduring_stream_writes_in_order_and_all_at_the_end() -> None:
    written = io.StringIO()
    stream = terminal.Enduring(written)
    for number in range(500):
        print(number, file=stream)
    stream.finish(60)
    assert written.getvalue().splitlines() == [str(number) for number in range(500)]


def test_enduring_stream_does_not_wait_for_its_reader() -> None:
    """A terminal after Ctrl-S, or a hanging connection."""
    read, write = os.pipe()
    with os.fdopen(write, "w") as out, os.fdopen(read) as reader:
        stream = terminal.Enduring(out)
        for _ in range(5000):  # more than a pipe and the queue hold
            print("x" * 1000, file=stream, flush=True)
        stream.finish(0.01)
        seen = threading.Thread(target=reader.read)
        seen.start()
        stream.finish(60)
        assert stream._unwritten == 0
        out.close()
        seen.join()


def test_names_are_no_markup_and_no_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.console().print("[red]a:100:b[/red] 1.5")
    assert capsys.readouterr().out == "[red]a:100:b[/red] 1.5\n"
