"""What `llmserve up` shows while models start."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

from rich.live import Live
from rich.table import Table
from rich.text import Text

from llmserve.pool import STARTING, State

if TYPE_CHECKING:
    from rich.console import Console

    from llmserve.pool import Entry

_STYLES = {State.READY: "green", State.FAILED: "bold red", State.STOPPED: "dim"}


class Display(Protocol):
    def add(self, entries: list[Entry]) -> None: ...
    def changed(self, entry: Entry) -> None: ...
    def live(self) -> AbstractContextManager[object]:
        """What is shown while models start."""
        ...


def display(console: Console) -> Display:
    """A live table in a terminal, a line for each change elsewhere."""
    return LiveTable(console) if console.is_terminal else Lines(console)


class Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, State] = {}

    def add(self, entries: list[Entry]) -> None:
        pass

    def changed(self, entry: Entry) -> None:
        if self._shown.get(entry.name) is entry.state:
            return
        self._shown[entry.name] = entry.state
        started = entry.state in (State.READY, State.FAILED)
        seconds = f" {entry.seconds:.1f} s" if started else ""
        note = f": {entry.note}" if entry.note else ""
        self._console.print(
            f"{entry.name}: {entry.state}{seconds}{note}",
            style=_STYLES.get(entry.state, ""),
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def live(self) -> AbstractContextManager[object]:
        return nullcontext()


class LiveTable(Lines):
    """A table while models start, then lines."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._entries: list[Entry] = []
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._table)

    def add(self, entries: list[Entry]) -> None:
        self._entries = entries

    def changed(self, entry: Entry) -> None:
        if self._live.is_started:
            self._live.refresh()
        else:
            super().changed(entry)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for heading in ("MODEL", "STATE", "SECONDS", ""):
            table.add_column(heading, style="dim" if not heading else "", no_wrap=bool(heading))
        for entry in self._entries:
            starting = entry.state in STARTING
            seconds = time.monotonic() - entry.started if starting else entry.seconds
            state = Text(entry.state, style=_STYLES.get(entry.state, "yellow"))
            table.add_row(Text(entry.name), state, f"{seconds:.1f}", Text(entry.note))
        return table

    def live(self) -> AbstractContextManager[object]:
        return self._live
