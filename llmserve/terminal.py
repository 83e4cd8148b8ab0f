"""Standard streams of a command: what is missing there ends no command with a traceback.

A stream may be closed, may lack characters, and its reader may go.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console

if TYPE_CHECKING:
    from typing import TextIO

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
_ERRORS = "llmserve.plain"
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
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if name == "stdin" else _ERRORS)


def endure() -> None:
    """Let this process go on when standard output or error can no longer be written."""
    sys.stdout, sys.stderr = Enduring(sys.stdout), Enduring(sys.stderr)  # type: ignore[assignment]


class Enduring:
    """A text stream that drops what cannot be written: its reader has gone, or its disk is full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console that prints text as it stands: names may look like markup or codes of emoji."""
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(each, "?" * max(1, cell_len(each))) for each in lacking), error.end
