"""Failures that are known: which test, what it shows, whose it is and why."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import yaml

if TYPE_CHECKING:
    from pathlib import Path

    import pytest
    from _pytest.reports import TestReport

Owner = Literal["llmserve", "vllm", "model", "client"]


@dataclass(frozen=True)
class Known:
    shows: str  # a pattern in the failure's text
    owner: Owner
    reason: str

    def judge(self, report: TestReport) -> None:
        """Turn this failure into an xfail; a pass fails, and so does another failure."""
        if report.passed:
            report.outcome = "failed"
            report.longrepr = f"a known failure passes: remove it from known.yaml ({self.reason})"
        elif report.failed and re.search(self.shows, report.longreprtext):
            report.outcome = "skipped"
            report.wasxfail = f"{self.owner}: {self.reason}"


def read(file: Path) -> dict[str, Known]:
    """Known failures by the part of a test's id that starts with the file's name."""
    modules: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    return {
        f"{module}::{test}": Known(**entry)
        for module, tests in modules.items()
        for test, entry in tests.items()
    }


def key_of(item: pytest.Item) -> str:
    """The item's id without its folder; a parameter may hold slashes."""
    return item.nodeid[item.nodeid.index(item.path.name) :]
