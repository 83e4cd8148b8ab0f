"""The output of `llmserve up` while models start."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

from rich.live import Live
from rich.table import Table
from rich.text import Text

from llmserve.lifecycle.replica import STARTING, State

if TYPE_CHECKING:
    from rich.console import Console

    from llmserve.lifecycle.replica import Replica

_SHOWN_S = 0.5  # shorter steps of a start are not shown
_STYLES = {State.READY: "green", State.FAILED: "bold red", State.STOPPED: "dim"}


class Display(Protocol):
    def add(self, replicas: list[Replica]) -> None: ...
    def changed(self, replica: Replica) -> None: ...
    def live(self) -> AbstractContextManager[object]:
        """The context in which models start."""
        ...


def display(console: Console) -> Display:
    """A live table on a terminal; otherwise a line for each change."""
    return LiveTable(console) if console.is_terminal else Lines(console)


class Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[Replica, State] = {}

    def add(self, replicas: list[Replica]) -> None:
        pass

    def changed(self, replica: Replica) -> None:
        if self._shown.get(replica) is replica.state:
            return
        self._shown[replica] = replica.state
        started = replica.state in (State.READY, State.FAILED)
        seconds = f" {replica.seconds:.1f} s" if started else ""
        note = f": {_note(replica)}" if _note(replica) else ""
        line = f"{replica.name}: {replica.state}{seconds}{note}"
        self._console.print(Text(line, _STYLES.get(replica.state, "")), soft_wrap=True)

    def live(self) -> AbstractContextManager[object]:
        return nullcontext()


class LiveTable(Lines):
    """A table while models start, then lines."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._replicas: list[Replica] = []
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._table)

    def add(self, replicas: list[Replica]) -> None:
        self._replicas = replicas

    def changed(self, replica: Replica) -> None:
        if self._live.is_started:
            self._live.refresh()
        else:
            super().changed(replica)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for heading in ("MODEL", "STATE", "SECONDS", ""):
            table.add_column(heading, style="dim" if not heading else "", no_wrap=bool(heading))
        for replica in self._replicas:
            starting = replica.state in STARTING
            seconds = time.monotonic() - replica.started if starting else replica.seconds
            state = Text(replica.state, style=_STYLES.get(replica.state, "yellow"))
            table.add_row(Text(replica.name), state, f"{seconds:.1f}", Text(_note(replica)))
        return table

    def live(self) -> AbstractContextManager[object]:
        return self._live


def _note(replica: Replica) -> str:
    """The replica's note, or the durations of its start if it is ready."""
    if replica.state is not State.READY:
        return replica.note
    steps = [(step, seconds) for step, seconds in replica.took.items() if seconds >= _SHOWN_S]
    return ", ".join(f"{step.replace('_', ' ')} {seconds:.1f}" for step, seconds in steps)
