"""Standard streams of a command that cause no traceback.

A stream may be closed, may lack characters, or may lose its reader.
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
_QUEUED = 1000  # parts for a reader that does not read
# As wide as the original characters, so that columns stay aligned.
_REPLACEMENTS = {
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
    """Open closed streams, and replace characters that a stream lacks."""
    codecs.register_error(_ERRORS, _replace)
    for name, mode in _STREAMS:
        stream = getattr(sys, name)
        if stream is None:
            # Occupies the stream's number, which a socket or a log would otherwise get.
            null = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115  # never closed
            setattr(sys, name, null)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if name == "stdin" else _ERRORS)


@contextlib.contextmanager
def enduring() -> Iterator[None]:
    """Keep this process running if standard output or error can no longer be written."""
    streams = Enduring(sys.stdout), Enduring(sys.stderr)
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            yield
        finally:
            finish()


def finish() -> None:
    """Wait briefly for queued output before the process ends."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Enduring):
            stream.finish()


class Enduring:
    """A text stream whose writes neither block nor fail.

    A thread writes. It drops output that fails because of a closed reader or a full disk, and
    output beyond `_QUEUED` parts for a reader that does not read.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._parts: queue.Queue[str] = queue.Queue(_QUEUED)
        self._written = threading.Condition()
        self._unwritten = 0  # parts
        threading.Thread(target=self._write_on, name="terminal", daemon=True).start()

    def write(self, text: str) -> int:
        with contextlib.suppress(queue.Full), self._written:
            self._parts.put_nowait(text)
            self._unwritten += 1
        return len(text)

    def flush(self) -> None:
        """Do nothing: each part is flushed when it is written."""

    def finish(self, within_s: float = 2.0) -> None:
        """Wait until everything is written, for at most `within_s`."""
        with self._written:
            self._written.wait_for(lambda: not self._unwritten, within_s)

    def _write_on(self) -> None:
        while True:
            text = self._parts.get()
            with contextlib.suppress(OSError):
                self._stream.write(text)
                self._stream.flush()
            with self._written:
                self._unwritten -= 1
                self._written.notify_all()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console that prints text unchanged: names may resemble markup or emoji codes."""
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def print_error(message: str) -> None:
    console(stderr=True).print(message, style="red", soft_wrap=True)


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(
        _REPLACEMENTS.get(each, "?" * max(1, cell_len(each))) for each in missing
    ), error.end
