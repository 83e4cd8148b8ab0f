"""The server's log with logrotate and on full disks."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llmserve.server.logs import LogFile, mark_served, rotate

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "server.log"


@pytest.fixture
def log(path: Path) -> Iterator[LogFile]:
    handler = LogFile(path)
    yield handler
    handler.close()


def write(log: LogFile, text: str) -> None:
    log.handle(logging.makeLogRecord({"msg": text}))


def test_truncated_log_continues_at_its_start(path: Path, log: LogFile) -> None:
    """logrotate, `copytruncate`."""
    write(log, "before")
    os.truncate(path, 0)
    write(log, "after")
    assert path.read_bytes() == b"after\n"


def test_moved_log_continues_in_a_new_file(path: Path, log: LogFile) -> None:
    """logrotate, `create`."""
    write(log, "before")
    path.rename(path.with_name("server.log-1"))
    write(log, "after")
    assert path.read_text() == "after\n"


def test_log_counts_records_lost_while_its_folder_was_missing(path: Path, log: LogFile) -> None:
    write(log, "before")
    path.unlink()
    path.parent.rename(path.parent.with_name("elsewhere"))
    write(log, "lost")
    write(log, "lost")
    path.parent.mkdir()
    write(log, "after")
    assert path.read_text() == (
        "after\n2 earlier records may be missing: the log could not be written\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_log_on_a_full_disk_is_no_failure(capfd: pytest.CaptureFixture[str]) -> None:
    log = LogFile(Path("/dev/full"))
    for _ in range(1000):
        write(log, "x" * 100)
    assert log._missing
    assert capfd.readouterr() == ("", "")


def test_log_of_the_last_run_that_served_is_kept(path: Path) -> None:
    for text, served in (("first", True), ("second", True), ("third", False), ("fourth", False)):
        rotate(path)
        path.write_text(text)
        if served:
            mark_served(path)
    assert path.read_text() == "fourth"
    assert path.with_name("server.log.1").read_text() == "second"
    mark_served(path)
    rotate(path)
    assert path.with_name("server.log.1").read_text() == "fourth"
