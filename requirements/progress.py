"""Runs pip with one line of progress in place of its own output, which goes into a file.

usage: progress.py LOG LABEL PACKAGES COMMAND...

The line is rewritten in a terminal; elsewhere there are a few. If the command fails, the end of
the file follows. Only the standard library: this runs before anything is installed.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

LAST_LINES = 30  # of a log that tells why
LOOK_S = 0.5
# How pip begins to tell what it does with a package; the last: it does nothing.
PACKAGE = ("Collecting ", "Requirement already satisfied: ", "Ignoring ")
INSTALLING = "Installing collected packages"


class Progress:
    """What pip has done so far, by the lines that it prints."""

    def __init__(self, label: str, packages: int) -> None:
        self.label = label
        self.packages = packages
        self.seen = 0
        self.doing = ""

    def read(self, line: str) -> None:
        if line.startswith(PACKAGE):
            self.seen += 1
            self.doing = line.removeprefix(PACKAGE[0]).split()[0] if line[0] == "C" else self.doing
        elif line.startswith(INSTALLING):
            self.seen = self.packages
            self.doing = "installing"

    def quarter(self) -> int:
        """Of the packages, and one more for installing them."""
        return 4 * self.seen // max(1, self.packages) + (self.doing == "installing")

    def line(self, seconds: float) -> str:
        count = f"{min(self.seen, self.packages)} of {self.packages}"
        what = f" {self.doing}" if self.doing else ""
        return f"{self.label}: {count} packages, {seconds:.0f} s{what}"


class Shown:
    """The line, rewritten in a terminal; elsewhere one for each quarter."""

    def __init__(self, progress: Progress, out: TextIO, columns: int = 79) -> None:
        self._progress = progress
        self._out = out
        self._columns = columns
        self._began = time.monotonic()
        self._quarter = -1

    def look(self) -> None:
        if self._out.isatty():
            self._write(f"\r\x1b[K{self._line()[: self._columns]}")
        elif self._progress.quarter() > self._quarter:
            self._quarter = self._progress.quarter()
            self._write(f"{self._line()}\n")

    def end(self, verdict: str) -> None:
        start = "\r\x1b[K" if self._out.isatty() else ""
        seconds = time.monotonic() - self._began
        self._write(f"{start}{self._progress.label}: {verdict} after {seconds:.0f} s\n")

    def _line(self) -> str:
        return self._progress.line(time.monotonic() - self._began)

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def run(log: Path, label: str, packages: int, command: list[str], out: TextIO) -> int:
    """The command's exit code."""
    progress = Progress(label, packages)
    shown = Shown(progress, out)
    ended = threading.Event()

    def watch() -> None:
        shown.look()
        while not ended.wait(LOOK_S):
            shown.look()

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        code = _logged(log, progress, command)
    except OSError as error:
        code = 127
        log.write_text(f"{command[0]}: {error.strerror}\n", encoding="utf-8")
    finally:
        ended.set()
        watching.join()
    shown.end("failed" if code else "done")
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        out.write("\n".join([*lines[-LAST_LINES:], f"The whole of it: {log}", ""]))
    return code


def _logged(log: Path, progress: Progress, command: list[str]) -> int:
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(  # noqa: S603 - no shell, the Makefile's own words
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as running,
    ):
        assert running.stdout is not None  # noqa: S101 - for mypy
        try:
            for line in running.stdout:
                file.write(line)
                file.flush()
                progress.read(line)
        except BaseException:
            running.terminate()
            raise
        return running.wait()


def main() -> int:
    log, label, packages, *command = sys.argv[1:]
    try:
        return run(Path(log), label, int(packages), command, sys.stdout)
    except KeyboardInterrupt:
        sys.stdout.write("\ninterrupted; make goes on where it was\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
