"""The known failures of tests/conformance, and what becomes of a test that has one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import pytest

from tests.conformance import known

ROOT = Path(__file__).parents[2]
KNOWN = known.Known(shows="no tool", owner="model", reason="It is small.")


def report(outcome: Literal["passed", "failed"], shown: str | None = None) -> pytest.TestReport:
    where = ("a.py", 1, "test_a")
    return pytest.TestReport("a.py::test_a", where, {}, outcome, shown, when="call")


def test_a_failure_that_is_known_is_an_xfail_with_its_reason() -> None:
    judged = report("failed", "AssertionError: no tool was called")
    KNOWN.judge(judged)
    assert (judged.outcome, judged.wasxfail) == ("skipped", "model: It is small.")


def test_another_failure_stays_one() -> None:
    judged = report("failed", "TimeoutError")
    KNOWN.judge(judged)
    assert judged.outcome == "failed"


def test_a_pass_is_a_failure_that_names_the_file() -> None:
    judged = report("passed")
    KNOWN.judge(judged)
    assert judged.outcome == "failed"
    assert "remove it from known.yaml" in judged.longreprtext


def test_an_entry_is_found_by_the_end_of_a_test_s_id(tmp_path: Path) -> None:
    file = tmp_path / "known.yaml"
    file.write_text("test_a.py:\n  TestB::test_c[x/y]: {shows: s, owner: vllm, reason: r}\n")
    assert known.read(file) == {"test_a.py::TestB::test_c[x/y]": known.Known("s", "vllm", "r")}


def test_an_empty_file_knows_nothing(tmp_path: Path) -> None:
    (tmp_path / "known.yaml").write_text("")
    assert known.read(tmp_path / "known.yaml") == {}


def test_every_known_failure_has_an_owner_and_is_in_the_docs() -> None:
    text = " ".join((ROOT / "docs" / "conformance.md").read_text(encoding="utf-8").split())
    for key, entry in known.read(ROOT / "tests" / "conformance" / "known.yaml").items():
        assert entry.owner in get_args(known.Owner), key
        assert entry.reason in text, key
