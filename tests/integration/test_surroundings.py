"""A server's streams, logs and temporary folders; no model is loaded."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.integration.conftest import (
    CHAT,
    rewrite,
    until,
    write_certificate,
    write_registry,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

LAZY = {"chat": {"model": CHAT, "start": "lazy"}}


@contextmanager
def up(registry: Path, **streams: Any) -> Iterator[Any]:
    """`llmserve up`; killed at the end if it still runs."""
    line = [sys.executable, "-m", "llmserve", "up", str(registry)]
    process = subprocess.Popen(line, start_new_session=True, **streams)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def listening(process: Any) -> None:
    """Read what it prints up to that line."""
    assert any(line.startswith(b"Listening on") for line in process.stdout)


def port_of(registry: Path) -> int:
    """Of the server, once it has one and answers."""
    logs = registry.parent / "logs"
    until(lambda: any(each.name.isdecimal() for each in logs.glob("*")), within_s=60)
    return next(int(each.name) for each in logs.iterdir())


def names(port: int) -> list[str]:
    cards = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=60).json()["data"]
    return [card["id"] for card in cards]


def test_server_whose_readers_are_closed_continues(tmp_path: Path) -> None:
    """As `llmserve up | head -1`, or a log daemon that restarts."""
    registry = write_registry(tmp_path, models=LAZY)
    with up(registry, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        listening(process)
        port = port_of(registry)
        process.stdout.close()
        process.stderr.close()
        for name in ("one", "two"):
            rewrite(registry, "chat", aliases=[name])
            process.send_signal(signal.SIGHUP)
            until(lambda: name in names(port), within_s=60)  # noqa: B023  # waited for here
        registry.write_text("models: {}")
        process.send_signal(signal.SIGHUP)
        log = tmp_path / "logs" / str(port) / "server.log"
        until(lambda: "nothing has changed" in log.read_text(), within_s=60)
        assert names(port) == ["chat", "two"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_server_with_unwritable_output_continues(tmp_path: Path) -> None:
    registry = write_registry(tmp_path, models=LAZY)
    with Path("/dev/full").open("w") as full, up(registry, stdout=full, stderr=full) as process:
        port = port_of(registry)
        rewrite(registry, "chat", aliases=["one"])
        until(lambda: bool(names(port)), within_s=60)
        process.send_signal(signal.SIGHUP)
        until(lambda: "one" in names(port), within_s=60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_server_without_streams_serves(tmp_path: Path) -> None:
    """As a daemon starts it."""
    registry = write_registry(tmp_path, models=LAZY)
    line = f"exec {sys.executable} -m llmserve up {registry} <&- >&- 2>&-"
    process = subprocess.Popen(["sh", "-c", line], start_new_session=True)
    try:
        port = port_of(registry)
        assert names(port) == ["chat"]
        streams = [Path(f"/proc/{process.pid}/fd/{number}").readlink() for number in range(3)]
        assert streams == [Path(os.devnull)] * 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_truncated_log_has_no_hole_and_the_last_is_kept(tmp_path: Path) -> None:
    port = 0
    for run in range(2):
        registry = write_registry(tmp_path, server={"port": port}, models=LAZY)
        with up(registry, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            port = port_of(registry)
            until(lambda: answers(port), within_s=60)  # noqa: B023  # waited for here
            log = tmp_path / "logs" / str(port) / "server.log"
            if run == 0:
                log.write_text(log.read_text() + "the first run\n")
                os.truncate(log, 0)
                log.write_text("the first run\n")
            process.send_signal(signal.SIGHUP)
            until(lambda: "has not changed" in log.read_text(), within_s=60)  # noqa: B023  # here too
            assert b"\0" not in log.read_bytes()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    assert "the first run" not in log.read_text()
    assert "the first run" in log.with_name("server.log.1").read_text()
    second = log.read_text()
    refused = write_registry(tmp_path, server={"port": port, "host_memory": "1MiB"}, models=LAZY)
    for _ in range(2):
        with up(refused, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            assert process.wait(60) == 2
    assert log.with_name("server.log.1").read_text() == second


def answers(port: int) -> bool:
    try:
        return bool(names(port))
    except httpx.HTTPError:
        return False


def test_missing_temporary_folder_ends_the_server_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = write_registry(tmp_path, models=LAZY)
    missing = str(tmp_path / "none")
    monkeypatch.setenv("TMPDIR", missing)
    with up(registry, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        _, printed = process.communicate(timeout=120)
    assert process.returncode == 3
    assert printed.decode().startswith(f"cannot create a file in TMPDIR={missing}: No such file")
    assert not (tmp_path / "logs").exists()


def test_start_removes_files_of_a_killed_server(tmp_path: Path, temporary: Path) -> None:
    registry = write_registry(tmp_path, models=LAZY)
    for number in (signal.SIGKILL, signal.SIGTERM):
        with up(registry, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            listening(process)
            assert len(list(temporary.iterdir())) == 1
            process.send_signal(number)
            assert process.wait(60) == (0 if number is signal.SIGTERM else -number)
    assert list(temporary.iterdir()) == []


def test_key_with_a_pass_phrase_is_refused_without_a_prompt(tmp_path: Path) -> None:
    tls = write_certificate(tmp_path, "-passout", "pass:secret")
    registry = write_registry(tmp_path, server=tls, models=LAZY)
    master, slave = os.openpty()
    shown = bytearray()

    def read() -> None:
        try:
            while part := os.read(master, 1 << 12):
                shown.extend(part)
        except OSError:  # the other end is closed
            pass

    reading = threading.Thread(target=read)
    reading.start()
    with up(registry, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        assert process.wait(120) == 2
    reading.join()
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())
    assert "key.pem has a pass phrase" in text
    assert "PEM pass phrase" not in text
