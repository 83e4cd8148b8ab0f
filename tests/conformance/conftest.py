"""One server for all clients, the known failures, and a table of results."""

from __future__ import annotations

import os
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.conformance import known
from tests.integration.conftest import Server, write_registry

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KNOWN = known.read(HERE / "known.yaml")
START_S = 600  # the engines start, also on a machine that is busy
KEY = "none"  # the server has no keys, but clients insist on one
# LiteLLM fetches its list of prices as it is imported: nothing here leaves this machine.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
# The clients are in an environment of their own.
collect_ignore_glob = [] if find_spec("langchain_tests") else ["test_*.py"]


@pytest.fixture(scope="session")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server for all clients: one that runs at LLMSERVE_URL, or else its own."""
    if url := os.environ.get("LLMSERVE_URL"):
        yield url
        return
    content = yaml.safe_load((HERE / "models.yaml").read_text(encoding="utf-8"))
    for model in content["models"].values():
        model["model"] = str((HERE / model["model"]).resolve())
    registry = write_registry(tmp_path_factory.mktemp("server"), **content)
    python = os.environ.get("LLMSERVE_PYTHON", str(ROOT / ".venv/bin/python"))
    with Server(registry, python) as running:
        running.wait_for(r"Serving .* on http", START_S)
        yield running.url


@pytest.fixture(scope="session")
def base_url(origin: str) -> str:
    return f"{origin}/v1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if item.path.is_relative_to(HERE)]
    for item in ours:
        item.add_marker(pytest.mark.conformance)
    names = {known.key_of(item) for item in ours}
    modules = {item.path.name for item in ours}
    if not any("::" in argument for argument in config.args):
        unused = {key for key in KNOWN if key.partition("::")[0] in modules} - names
        if unused:
            raise pytest.UsageError(f"known.yaml: no such tests: {', '.join(sorted(unused))}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    found = KNOWN.get(known.key_of(item)) if item.path.is_relative_to(HERE) else None
    if found is not None and call.when == "call":
        found.judge(report)
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of docs/conformance.md."""
    outcomes: dict[str, Counter[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped", "xfailed"):
        for report in terminalreporter.stats.get(outcome, ()):
            module = Path(report.nodeid.partition("::")[0])
            if module.parent == HERE.relative_to(ROOT):
                outcomes.setdefault(module.stem, Counter())[outcome] += 1
    if not outcomes:
        return
    terminalreporter.section("conformance")
    terminalreporter.write_line("| module | passed | known failures | failed | skipped |")
    terminalreporter.write_line("|---|---|---|---|---|")
    for name, count in sorted(outcomes.items()):
        row = [
            count["passed"],
            count["xfailed"],
            count["failed"] + count["error"],
            count["skipped"],
        ]
        terminalreporter.write_line(f"| {name} | {' | '.join(map(str, row))} |")
