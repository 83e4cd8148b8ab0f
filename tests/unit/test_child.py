from __future__ import annotations

import os
from pathlib import Path

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


def test_log_file_of_a_long_name_can_be_made(tmp_path: Path) -> None:
    """A name may have 128 characters, each of which may be 12 in the file's name."""
    names = ["\U0001f600" * 127 + end for end in "ab"]
    files = {child.log_file(tmp_path, name, 1023) for name in names}
    assert len(files) == 2
    for file in files:
        file.with_name(f"{file.name}.1").touch()


@pytest.mark.parametrize("instance", ["3-1712345678", "3-1712345678_dp1"])
def test_an_engine_core_knows_which_replica_it_is(instance: str) -> None:
    assert child.instance_of(3, "1712345678") == "3-1712345678"
    assert child._replica_of(instance) == 3


@pytest.mark.parametrize("instance", ["1712345678", "0f3ab_dp1"], ids=["alone", "vLLM's others"])
def test_an_engine_core_without_siblings_has_no_number(instance: str) -> None:
    assert child._replica_of(instance) is None


def test_the_server_s_own_process_stays_as_it_is() -> None:
    before = os.getpgid(0)
    child.enter()
    assert os.getpgid(0) == before
