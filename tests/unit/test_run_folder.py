from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llmserve.engine import run_folder
from llmserve.engine.run_folder import SOCKETS, RunFolder
from llmserve.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Iterator

HOLD = """
import os, sys
from llmserve.engine import run_folder
folder = run_folder.RunFolder.make()
run_folder.register_process()
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /dev/shm."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(run_folder, "_SHARED", folder)
    return folder


@pytest.fixture
def base() -> Iterator[Path]:
    """Short, as pytest's folders are not."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def left(base: Path) -> list[str]:
    return sorted(each.name for each in base.iterdir())


def test_run_folder_is_private_and_goes_at_the_end(base: Path, shared: Path) -> None:
    env = {"TMPDIR": str(base)}
    folder = RunFolder.make(env)
    assert env[SOCKETS] == str(folder.path)
    assert folder.path.parent == base
    assert folder.path.stat().st_mode & 0o077 == 0
    (folder.path / "0a1b-socket").touch()
    folder.remove()
    assert left(base) == []
    assert env == {"TMPDIR": str(base)}


def test_base_that_was_asked_for_is_used_and_restored(base: Path, shared: Path) -> None:
    env = {SOCKETS: str(base)}
    folder = RunFolder.make(env)
    assert folder.path.parent == base
    folder.remove()
    assert env == {SOCKETS: str(base)}


def test_sockets_have_a_short_path_where_tmpdir_is_long(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    folder = RunFolder.make({"TMPDIR": str(long)})
    try:
        assert len(os.fsencode(folder.path / ("0" * 36))) <= 107
        assert left(long) == []
    finally:
        folder.remove()


@pytest.mark.parametrize("name", ["TMPDIR", "TEMP", "TMP"])
def test_temporary_folder_that_cannot_be_written_is_told(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cases = {"none": "No such file or directory", "file": "Not a directory"}
    for value, why in cases.items():
        place = str(tmp_path / value)
        with pytest.raises(StartupError) as refused:
            RunFolder.make({name: place})
        assert refused.value.message == (
            f"cannot create a file in {name}={place}: {why}; "
            f"set {name} to a writable folder or unset it"
        )


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_temporary_folder_of_others_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StartupError, match="Permission denied"):
        RunFolder.make({"TMPDIR": str(tmp_path)})


def test_without_a_folder_for_sockets_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_bases", lambda env: [Path("/proc")])
    with pytest.raises(StartupError, match="no folder for sockets: /proc: not writable"):
        RunFolder.make({})


def test_next_start_removes_what_a_killed_server_left(base: Path, shared: Path) -> None:
    env = {"TMPDIR": str(base)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env=os.environ | env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        path = Path(server.stdout.readline().strip())
        of_engine = shared / f"__KMP_REGISTERED_LIB_{server.pid}_{os.getuid()}"
        of_others = shared / f"__KMP_REGISTERED_LIB_{os.getpid()}_{os.getuid()}"
        of_engine.touch()
        of_others.touch()
        (path / str(os.getpid())).touch()  # a number that another process has now
        RunFolder.make(env).remove()
        assert path.exists(), "its server lives"
        server.kill()
    own = RunFolder.make(env)
    assert left(base) == [own.path.name]
    assert left(shared) == [of_others.name]
    own.remove()


def test_folders_of_others_are_left_alone(base: Path, shared: Path) -> None:
    (base / "llmserve-notes").mkdir()  # without a lock
    (base / "llmserve-file").touch()
    (base / "llmserve-link").symlink_to(base / "llmserve-notes")
    RunFolder.make({"TMPDIR": str(base)}).remove()
    assert left(base) == ["llmserve-file", "llmserve-link", "llmserve-notes"]


def test_engine_process_clears_up_after_those_before_it(base: Path, shared: Path) -> None:
    env = {"TMPDIR": str(base)}
    folder = RunFolder.make(env)
    ended = subprocess.Popen(["true"])
    ended.wait()
    (folder.path / str(ended.pid)).touch()
    (shared / f"__KMP_REGISTERED_LIB_{ended.pid}_{os.getuid()}").touch()
    run_folder.register_process(env)
    assert left(folder.path) == sorted([str(os.getpid()), "lock"])
    assert left(shared) == []
    folder.remove()


def test_process_of_no_server_leaves_no_mark(tmp_path: Path) -> None:
    run_folder.register_process({})
    run_folder.register_process({SOCKETS: str(tmp_path)})
    assert left(tmp_path) == []
