"""The end of a file that grows."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

BLOCK = 64 * 2**10  # read at once


class LogFollower:
    """A file from its last lines on, also over one that is cut or replaced, as `tail -F` does."""

    def __init__(self, path: Path, lines: int) -> None:
        self._path = path
        self._lines = lines
        self._at: int | None = None  # None: not looked at yet
        self._file: tuple[int, int] | None = None

    def read(self) -> bytes:
        """What is new, a block at most; nothing while there is nothing, or no file."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            self._at = 0  # the one that comes is new from its start
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
    """Where the last lines of a file begin, of which the very last may have no end."""
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
