"""Real processes of a zygote that imports nothing. tests/contract/test_zygote.py has vLLM's."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from llmserve.engine.parent_watch import ParentWatch
from tests import zygotes
from tests.zygotes import zygote

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from llmserve.engine.zygote import Zygote

WITHIN_S = 30.0


@pytest.fixture(autouse=True)
def exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the zygote is to report them."""
    monkeypatch.setattr("llmserve.engine.zygote._EXIT_CODE_S", WITHIN_S)


@pytest.fixture(scope="module")
def running() -> Iterator[Zygote]:
    with zygote() as made:
        yield made


def pid_of(zygote: Zygote) -> int:
    assert zygote._watch is not None
    (pid,) = zygote._watch.pids
    return pid


def start(zygote: Zygote, target: Callable[..., None] = zygotes.sleep, *arguments: Any) -> Any:
    zygotes.hide_current_test()
    process = zygote.context().Process(target=target, args=arguments, name="EngineCore")
    process.start()
    return process


def is_forked(process: Any) -> bool:
    return type(process._popen).__module__ == "llmserve.engine.zygote"


def end(process: Any) -> None:
    process.kill()
    process.join(WITHIN_S)


def file_of(path: Path) -> Any:
    deadline = time.monotonic() + WITHIN_S
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return json.loads(path.read_text())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def facts(zygote: Zygote, path: Path) -> dict[str, Any]:
    process = start(zygote, zygotes.report, str(path))
    process.join(WITHIN_S)
    assert process.exitcode == 0
    assert is_forked(process)
    found: dict[str, Any] = file_of(path)
    return found


@pytest.mark.parametrize(("target", "arguments", "code"), [
    (zygotes.exit_with, (0,), 0),
    (zygotes.exit_with, (7,), 7),
    (os.kill, (0, signal.SIGTERM), -signal.SIGTERM),
])  # fmt: skip
def test_fork_that_ends_has_its_exit_code(
    running: Zygote, target: Any, arguments: tuple[int, ...], code: int
) -> None:
    if target is os.kill:
        process = start(running)
        process.terminate()
    else:
        process = start(running, target, *arguments)
    process.join(WITHIN_S)
    assert process.exitcode == code
    assert not process.is_alive()
    assert is_forked(process)


def test_fork_has_the_environment_of_its_request(
    running: Zygote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    found = facts(running, tmp_path / "a")["environment"]
    zygotes.hide_current_test()
    assert found == dict(os.environ) | {"SET_BY_IMPORT": "1"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "CUDA_VISIBLE_DEVICES" not in facts(running, tmp_path / "b")["environment"]


def test_forks_share_no_state_that_a_spawned_process_has_of_its_own(
    running: Zygote, tmp_path: Path
) -> None:
    other = start(running)
    first, second = facts(running, tmp_path / "a"), facts(running, tmp_path / "b")
    end(other)
    assert first["parent"] == second["parent"] == pid_of(running)
    assert first["random"] != second["random"]
    assert len(first["files"]) == len(second["files"])
    assert all(each["signals"] and each["threads"] == 1 for each in (first, second))


def test_fork_runs_its_exit_handlers(running: Zygote, tmp_path: Path) -> None:
    process = start(running, zygotes.report_at_exit, str(tmp_path / "file"))
    process.join(WITHIN_S)
    assert (tmp_path / "file").read_text() == "ended"


def test_watched_fork_leads_a_group_and_ends_with_its_watch(
    running: Zygote, tmp_path: Path
) -> None:
    watch = ParentWatch()
    with watch.watching():
        process = start(running, zygotes.start_worker, str(tmp_path / "pids"))
    core, worker = file_of(tmp_path / "pids")
    assert watch.pids == [process.pid] == [core]
    assert os.getpgid(worker) == os.getpgid(core) == core
    assert psutil.Process(worker).ppid() == pid_of(running)
    watch.kill()
    process.join(WITHIN_S)
    assert process.exitcode == -signal.SIGKILL
    until(lambda: not psutil.pid_exists(worker))


def test_worker_of_a_killed_core_ends(running: Zygote, tmp_path: Path) -> None:
    watch = ParentWatch()
    with watch.watching():
        process = start(running, zygotes.start_worker, str(tmp_path / "pids"))
    core, worker = file_of(tmp_path / "pids")
    os.kill(core, signal.SIGKILL)
    process.join(WITHIN_S)
    until(lambda: not psutil.pid_exists(worker))


def test_20_starts_and_ends_leave_nothing(running: Zygote) -> None:
    def state() -> tuple[int, int, int]:
        zygote = psutil.Process(pid_of(running))
        return psutil.Process().num_fds(), zygote.num_fds(), len(zygote.children())

    def run() -> None:
        process = start(running, zygotes.exit_with, 0)
        process.join(WITHIN_S)
        assert is_forked(process)
        process.close()

    run()
    until(lambda: state()[2] == 0)  # the zygote collects an ended fork after its end is seen
    gc.collect()  # files of other tests
    before = state()
    for _ in range(20):
        run()
    until(lambda: all(now <= then for now, then in zip(state(), before, strict=True)))


# --- A process is spawned instead


def spawned(zygote: Zygote, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    with caplog.at_level(logging.WARNING):
        process = start(zygote, zygotes.exit_with, 7)
    process.join(WITHIN_S)
    assert process.exitcode == 7
    assert not is_forked(process)
    (record,) = caplog.records
    assert record.getMessage() == f"EngineCore is spawned instead of forked: {reason}"
    caplog.clear()


def test_refusal_spawns(caplog: pytest.LogCaptureFixture) -> None:
    with zygote(zygotes.refuse) as made:
        for _ in range(2):
            spawned(made, caplog, zygotes.REASON)


@pytest.mark.parametrize("kind", [zygotes.end, zygotes.end_after_fork])
def test_zygote_that_ends_before_its_answer_spawns(
    kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with zygote(kind, import_s=0.0, answer_s=WITHIN_S) as made:
        for _ in range(2):
            spawned(made, caplog, "the zygote has ended")


def test_zygote_killed_before_a_request_spawns(caplog: pytest.LogCaptureFixture) -> None:
    with zygote() as made:
        end(start(made))
        os.kill(pid_of(made), signal.SIGKILL)
        until(lambda: psutil.Process(pid_of(made)).status() == psutil.STATUS_ZOMBIE)
        spawned(made, caplog, "the zygote has ended")


def test_zygote_that_hangs_spawns_after_its_bound(caplog: pytest.LogCaptureFixture) -> None:
    with zygote(zygotes.hang, import_s=0.5, answer_s=0.5) as made:
        spawned(made, caplog, "the zygote did not answer in time")
        began_s = time.monotonic()
        with contextlib.suppress(Exception):
            made.fork(b"", memoryview(b""), [])
        assert time.monotonic() - began_s < 0.4  # it is not asked again


def test_stopped_zygote_forks_nothing_when_it_continues(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with zygote(answer_s=0.5) as made:
        end(start(made))
        stopped = psutil.Process(pid_of(made))
        stopped.suspend()
        with caplog.at_level(logging.WARNING):
            process = start(made, zygotes.report, str(tmp_path / "file"))
        process.join(WITHIN_S)
        assert file_of(tmp_path / "file")["pid"] == process.pid
        assert not is_forked(process)
        until(lambda: stopped.status() == psutil.STATUS_ZOMBIE)  # killed


def test_fork_whose_requester_gives_up_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zygote() as made:
        end(start(made))
        monkeypatch.setattr(made, "_receive", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(made, zygotes.report, str(tmp_path / "file"))
        monkeypatch.undo()
        process = start(made)
        until(lambda: len(psutil.Process(pid_of(made)).children()) == 1)
        end(process)
        assert not (tmp_path / "file").exists()


def test_changed_variable_spawns(
    running: Zygote, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KMP_AFFINITY", "explicit")
    spawned(running, caplog, "KMP_AFFINITY has changed since the server started")
    monkeypatch.delenv("KMP_AFFINITY")
    monkeypatch.delenv("PATH")
    with caplog.at_level(logging.WARNING):
        process = start(running, zygotes.exit_with, 0)
    process.join(WITHIN_S)
    assert caplog.records[0].getMessage().endswith("PATH has changed since the server started")


def test_replaced_program_spawns(
    running: Zygote, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setattr("multiprocessing.spawn._python_exe", os.fsencode(sys.executable + "3"))
    with caplog.at_level(logging.WARNING), contextlib.suppress(OSError):
        start(running, zygotes.exit_with, 7)
    assert "its program is replaced" in caplog.text


# --- The zygote's end


def test_zygote_killed_leaves_its_forks_and_their_end_is_seen() -> None:
    with zygote() as made:
        process = start(made)
        os.kill(pid_of(made), signal.SIGKILL)
        until(lambda: psutil.Process(process.pid).ppid() != pid_of(made))
        assert process.is_alive()
        end(process)
        assert process.exitcode == 255


def test_zygote_ends_with_its_server() -> None:
    with zygote() as made:
        end(start(made))
        own = psutil.Process(pid_of(made))
        made.kill()
        assert own.wait(WITHIN_S) == -signal.SIGKILL
    made.kill()
