from __future__ import annotations

import io

import pytest
from rich.console import Console

from llmserve.lifecycle.replica import Replica, State
from llmserve.server.startup_display import Lines, LiveTable, display
from tests import fakes
from tests.fakes import spec


def replica(
    name: str, state: State, note: str = "", seconds: float = 0.0, *, number: int = 0, of: int = 1
) -> Replica:
    made = fakes.replica(spec(name, replicas=of), number)
    made.state, made.note, made.seconds = state, note, seconds
    return made


def plain_console(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width)


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_terminal_has_a_table_and_a_file_lines() -> None:
    assert isinstance(display(terminal()), LiveTable)
    assert type(display(plain_console())) is Lines


def test_a_line_for_each_change_of_state() -> None:
    console = plain_console()
    shown = display(console)
    chat = replica("chat", State.DOWNLOADING)
    shown.add([chat])
    with shown.live():
        shown.changed(chat)
        for chat.note in ("0.10 of 0.27 GiB", "0.20 of 0.27 GiB"):
            shown.changed(chat)
        chat.state, chat.note = State.LOADING, ""
        shown.changed(chat)
        chat.state, chat.seconds = State.READY, 41.23
        shown.changed(chat)
    assert text(console) == "chat: downloading\nchat: loading\nchat: ready 41.2 s\n"


def test_failure_is_one_line_with_its_cause() -> None:
    console = plain_console(width=40)
    cause = "ValueError: [red]no[/red] KV cache for max_model_len 32768; " + "x" * 60
    display(console).changed(replica("org/chat", State.FAILED, cause, 3.0))
    assert text(console) == f"org/chat: failed 3.0 s: {cause}\n"


@pytest.mark.parametrize(
    ("state", "note", "seconds", "shown"),
    [
        (State.WAITING, "", 0.0, ["waiting"]),
        (State.DOWNLOADING, "0.10 of 0.27 GiB", 0.0, ["downloading", "0.10 of 0.27 GiB"]),
        (State.READY, "", 41.23, ["ready", "41.2"]),
        (
            State.FAILED,
            "ValueError: [no] memory",
            3.0,
            ["failed", "3.0", "ValueError: [no] memory"],
        ),
    ],
)
def test_the_table_has_model_state_seconds_and_note(
    state: State, note: str, seconds: float, shown: list[str]
) -> None:
    console = terminal()
    table = display(console)
    table.add([replica("chat[1]", state, note, seconds)])
    with table.live():
        pass
    drawn = text(console)
    for expected in ["MODEL", "STATE", "SECONDS", "chat[1]", *shown]:
        assert expected in drawn


def test_table_shows_changes_and_lines_follow_it() -> None:
    console = terminal()
    table = display(console)
    chat = replica("chat", State.LOADING)
    table.add([chat])
    with table.live():
        chat.state, chat.seconds = State.READY, 9.5
        table.changed(chat)
        assert "ready" in text(console)
        assert "chat: ready" not in text(console)
    chat.state, chat.note = State.FAILED, "its engine died"
    table.changed(chat)
    assert text(console).endswith("chat: failed 9.5 s: its engine died\n")


def test_a_long_cause_is_wrapped_and_not_cut() -> None:
    console = terminal()
    table = display(console)
    cause = " ".join(f"word{i}" for i in range(60))
    table.add([replica("chat", State.FAILED, cause)])
    with table.live():
        pass
    assert "word59" in text(console)


def test_each_of_several_replicas_has_a_row_and_a_line() -> None:
    several = [replica("chat", State.LOADING, number=number, of=2) for number in (0, 1)]
    several += [replica("chat/0", State.LOADING)]  # another model
    console = terminal()
    table = display(console)
    table.add(several)
    with table.live():
        pass
    for name in ("chat/0", "chat/1"):
        assert name in text(console)
    console = plain_console()
    lines = display(console)
    for each in several:
        lines.changed(each)
    assert text(console) == "chat/0: loading\nchat/1: loading\nchat/0: loading\n"
