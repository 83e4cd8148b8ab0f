from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llmserve import child


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("chat", "model-chat.log"),
        ("org/name", "model-org%2Fname.log"),
        ("a b@c", "model-a b@c.log"),
        ("..", "model-...log"),
        ("caf\u00e9", "model-caf%C3%A9.log"),
    ],
)
def test_each_model_has_a_log_file_inside_the_folder(model: str, file: str) -> None:
    assert child.log_file(Path("logs"), model) == Path("logs") / file


def test_names_that_differ_have_files_that_differ() -> None:
    names = ["a/b", "a%2Fb", "a b", "a_b", "a", "a+0", "a+1", "a.0", "a/0"]
    files = {child.log_file(Path("logs"), name) for name in names}
    files |= {child.log_file(Path("logs"), "a", number) for number in (0, 1)}
    assert len(files) == len(names) + 2


@pytest.mark.parametrize("instance", ["3-1712345678", "3-1712345678_dp1"])
def test_an_engine_core_knows_which_replica_it_is(instance: str) -> None:
    assert child.instance_of(3, "1712345678") == "3-1712345678"
    assert child._replica_of(instance) == 3


@pytest.mark.parametrize("instance", ["1712345678", "0f3ab_dp1"], ids=["alone", "vLLM's others"])
def test_an_engine_core_without_siblings_has_no_number(instance: str) -> None:
    assert child._replica_of(instance) is None


PARENT = """
import multiprocessing, sys
from llmserve import child

if __name__ == "__main__":
    child.guard()
    spawned = multiprocessing.get_context("spawn").Process(target=__import__(sys.argv[1]).work)
    spawned.start()
    print(spawned.pid, flush=True)
    spawned.join()
"""
SLOW = """
import multiprocessing, time

if multiprocessing.current_process().name != "MainProcess":
    time.sleep(60)  # as vLLM's imports

def work() -> None:
    raise AssertionError("it should have ended while it imported this")
"""


def test_a_spawned_process_ends_with_a_server_killed_early(tmp_path: Path) -> None:
    """Also while it imports what it is to run, before any of that can look after it."""
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "slow.py").write_text(SLOW)
    path = os.pathsep.join([str(tmp_path), str(Path(child.__file__).parents[1])])
    server = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py"), "slow"],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,
    )
    assert server.stdout is not None
    spawned = psutil.Process(int(server.stdout.readline()))
    try:
        until_guarded(spawned)
        server.kill()
        server.wait()
        _, alive = psutil.wait_procs([spawned], timeout=20)
        assert not alive
    finally:
        server.stdout.close()
        if spawned.is_running():
            spawned.kill()


def until_guarded(process: psutil.Process) -> None:
    """A thread of its own, beside the one that imports."""
    end = time.monotonic() + 20
    while process.num_threads() < 2:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_server_s_own_process_stays_as_it_is() -> None:
    before = os.getpgid(0)
    child.enter()
    assert os.getpgid(0) == before
