from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmserve.engine.worker import plugin


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
    assert plugin.log_file(Path("logs"), model) == Path("logs") / file


def test_names_that_differ_have_files_that_differ() -> None:
    names = ["a/b", "a%2Fb", "a b", "a_b", "a", "a+0", "a+1", "a.0", "a/0"]
    files = {plugin.log_file(Path("logs"), name) for name in names}
    files |= {plugin.log_file(Path("logs"), "a", number) for number in (0, 1)}
    assert len(files) == len(names) + 2


@pytest.mark.parametrize("letter", ["x", "%", "\u00e9", "\u6f22", "\U0001f600"])
def test_the_longest_name_makes_a_file(tmp_path: Path, letter: str) -> None:
    names = [letter * 128, letter * 127 + "y"]
    files = {plugin.log_file(tmp_path, name, 63) for name in names}
    assert len(files) == 2
    for file in files:
        file.with_name(file.name + ".1").touch()  # as the log before is called
        assert file.parent == tmp_path


@pytest.mark.parametrize("instance", ["3-1712345678", "3-1712345678_dp1"])
def test_an_engine_core_knows_which_replica_it_is(instance: str) -> None:
    assert plugin.instance_of(3, "1712345678") == "3-1712345678"
    assert plugin._replica_of(instance) == 3


@pytest.mark.parametrize("instance", ["1712345678", "0f3ab_dp1"], ids=["alone", "vLLM's others"])
def test_an_engine_core_without_siblings_has_no_number(instance: str) -> None:
    assert plugin._replica_of(instance) is None


def test_the_server_s_own_process_stays_as_it_is() -> None:
    before = os.getpgid(0)
    plugin.enter()
    assert os.getpgid(0) == before
