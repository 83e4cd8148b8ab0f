"""The log of the server's process: `server.log`, and errors on the terminal."""

from __future__ import annotations

import contextlib
import copy
import logging
import logging.handlers
import sys
from typing import TYPE_CHECKING

from llmserve.engine.startup_log import keep_last

if TYPE_CHECKING:
    from pathlib import Path

NAME = "server.log"
_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def begin(file: Path) -> None:
    """Log this process, with vLLM's front end, to a new file, and important records to stderr.

    Raises OSError.
    """
    rotate(file)
    to_file = LogFile(file)
    to_file.setFormatter(_Escaping(_FORMAT))
    to_terminal = logging.StreamHandler()
    to_terminal.addFilter(_is_for_terminal)
    to_terminal.setFormatter(_Brief(_FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[to_file, to_terminal])
    logging.captureWarnings(True)
    # torch warns that Triton is missing, which the CPU build does not need.
    logging.getLogger("torch._library").setLevel(logging.ERROR)


def rotate(file: Path) -> None:
    """Keep the log of the previous run as `FILE.1`; drop it if that run ended before it served.

    So starts that fail, however many, leave the log of the last run that served. The mark is a
    file, which also a start that is killed leaves.
    """
    mark = _mark_of(file)
    if mark.exists():
        file.unlink(missing_ok=True)
        return
    keep_last(file)
    mark.touch()


def mark_served(file: Path) -> None:
    """Let the next run keep this log."""
    with contextlib.suppress(OSError):
        _mark_of(file).unlink(missing_ok=True)


def _mark_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.starting")


def _is_for_terminal(record: logging.LogRecord) -> bool:
    """Whether the terminal shows a record: errors, and warnings about a start."""
    is_of_start = record.name == "llmserve.engine.backend" and record.levelno >= logging.WARNING
    return is_of_start or record.levelno >= logging.ERROR


class LogFile(logging.handlers.WatchedFileHandler):
    """Appends to a file that logrotate may truncate, move or remove.

    Records that cannot be written, as on a full disk, are dropped and counted.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(file, encoding="utf-8", errors="backslashreplace")
        self._missing = 0

    def emit(self, record: logging.LogRecord) -> None:
        missing = self._missing
        self._write(record)
        if missing and self._missing == missing:  # the file is writable again
            self._missing = 0
            self._write(_gap(missing))

    def _write(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # the file could not be opened again
            self._missing += 1

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's
        if isinstance(sys.exception(), OSError):
            self._missing += 1
        else:
            super().handleError(record)


def _gap(missing: int) -> logging.LogRecord:
    text = "%d earlier records may be missing: the log could not be written"
    return logging.LogRecord(__name__, logging.ERROR, __file__, 0, text, (missing,), None)


class _Escaping(logging.Formatter):
    """Escapes control characters and indents the further lines of a record.

    Clients choose paths, names and headers, which must not control a terminal or forge a record.
    """

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if text.isprintable() else "\n  ".join(map(_escaped, text.split("\n")))


def _escaped(line: str) -> str:
    return "".join(
        c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode("ascii")
        for c in line
    )


class _Brief(_Escaping):
    """Omits tracebacks, which are in the file."""

    def format(self, record: logging.LogRecord) -> str:
        brief = copy.copy(record)
        brief.exc_info = brief.exc_text = brief.stack_info = None
        return super().format(brief)
