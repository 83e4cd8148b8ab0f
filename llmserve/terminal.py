"""Standard streams of a command: what is missing there ends no command with a traceback.

A stream may be closed, may lack characters, and its reader may go.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import queue
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
_ERRORS = "llmserve.plain"
_WAITING = 1000  # parts for a reader that does not read
# As wide as what they stand for: tables and pictures keep their columns.
_PLAIN = {
    "█": "#",
    "▓": "=",
    "▒": "-",
    "░": ":",
    "▂": "_",
    "·": ".",
    "≥": ">",
    "…": ".",
    "\N{REPLACEMENT CHARACTER}": "?",
}


def prepare() -> None:
    """Open what is closed, and have characters replaced that a stream has not."""
    codecs.register_error(_ERRORS, _plain)
    for name, mode in _STREAMS:
        stream = getattr(sys, name)
        if stream is None:
            # Takes the stream's number, which would else become a socket's or a log's.
            null = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115  # never closed
            setattr(sys, name, null)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if name == "stdin" else _ERRORS)


@contextlib.contextmanager
def enduring() -> Iterator[None]:
    """Let this process go on when standard output or error can no longer be written."""
    streams = Enduring(sys.stdout), Enduring(sys.stderr)
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            yield
        finally:
            finish()


def finish() -> None:
    """Before the process ends: wait a while for what is written."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Enduring):
            stream.finish()


class Enduring:
    """A text stream whose writer neither waits nor fails, whatever its reader does.

    A thread writes. What is left out: all that fails, where the reader has gone or the disk is
    full, and what comes while `_WAITING` parts wait for a reader that does not read.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._parts: queue.Queue[str] = queue.Queue(_WAITING)
        self._written = threading.Condition()
        self._left = 0  # parts that are not written yet
        threading.Thread(target=self._write_on, name="terminal", daemon=True).start()

    def write(self, text: str) -> int:
        with contextlib.suppress(queue.Full), self._written:
            self._parts.put_nowait(text)
            self._left += 1
        return len(text)

    def flush(self) -> None:
        """Nothing: each part is flushed when it is written."""

    def finish(self, within_s: float = 2.0) -> None:
        """Wait until all is written, or no longer."""
        with self._written:
            self._written.wait_for(lambda: not self._left, within_s)

    def _write_on(self) -> None:
        while True:
            text = self._parts.get()
            with contextlib.suppress(OSError):
                self._stream.write(text)
                self._stream.flush()
            with self._written:
                self._left -= 1
                self._written.notify_all()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console that prints text as it stands: names may look like markup or codes of emoji."""
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def print_error(message: str) -> None:
    console(stderr=True).print(message, style="red", soft_wrap=True)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(each, "?" * max(1, cell_len(each))) for each in lacking), error.end
