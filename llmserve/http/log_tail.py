"""Reading the end of a log file while an engine writes it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

BLOCK = 64 * 2**10  # bytes of one read


class LogFollower:
    """Reads a file from its last lines on, also a truncated or replaced one, as `tail -F`."""

    def __init__(self, path: Path, lines: int) -> None:
        self._path = path
        self._lines = lines
        self._at: int | None = None  # None before the first read
        self._file: tuple[int, int] | None = None

    def read(self) -> bytes:
        """Return new bytes, at most a block; none without a file."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            self._at = 0  # a later file is read from its start
            return b""
        with file:
            self._at = file.seek(self._next(file))
            part = file.read(BLOCK)
            self._at += len(part)
            return part

    def _next(self, file: BinaryIO) -> int:
        stat = os.fstat(file.fileno())
        before, self._file = self._file, (stat.st_dev, stat.st_ino)
        if self._at is None:
            return last_lines(file, self._lines)
        same = before == self._file and self._at <= stat.st_size
        return self._at if same else 0


def last_lines(file: BinaryIO, lines: int) -> int:
    """Return the position of the last lines of a file; the last one may be incomplete."""
    size = file.seek(0, os.SEEK_END)
    if lines == 0:
        return size
    end = max(0, size - 1)  # a line break there ends the last line
    while end:
        start = max(0, end - BLOCK)
        file.seek(start)
        block = file.read(end - start)
        at = len(block)
        while (at := block.rfind(b"\n", 0, at)) >= 0:
            lines -= 1
            if lines == 0:
                return start + at + 1
        end = start
    return 0
