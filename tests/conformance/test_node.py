"""The Node clients: openai-node, Anthropic's TypeScript SDK, Vercel's AI SDK.

Each file of `node/` runs once, under Node's own test runner; each of its tests is one here.
"""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

NODE = Path(__file__).with_name("node")
FILES = ("openai", "anthropic", "vercel")
if not (NODE / "node_modules").is_dir():
    pytest.skip("no node_modules: `make conformance` installs them", allow_module_level=True)


def run(*command: str, timeout_s: float = 60, **environment: str) -> list[dict[str, Any]]:
    ended = subprocess.run(
        ["node", *command],
        cwd=NODE,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert lines, ended.stdout + ended.stderr
    return lines


TESTS = [(file, test["name"]) for file in FILES for test in run(f"{file}.mjs", LIST="1")]


@pytest.fixture(scope="session")
def failures(origin: str) -> Callable[[str], dict[str, str | None]]:
    """What each test of a file shows, None where it passes."""

    @cache
    def of(file: str) -> dict[str, str | None]:
        command = ["--test", "--test-reporter=./reporter.mjs", f"{file}.mjs"]
        lines = run(*command, timeout_s=900, ORIGIN=origin)
        return {line["name"]: line["failure"] for line in lines}

    return of


@pytest.mark.parametrize(
    ("file", "name"), TESTS, ids=[f"{file}-{name.replace(' ', '_')}" for file, name in TESTS]
)
def test_node(failures: Callable[[str], dict[str, str | None]], file: str, name: str) -> None:
    failure = failures(file)[name]
    if failure is not None:
        pytest.fail(failure, pytrace=False)
