"""What `make` shows while pip installs."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "requirements" / "progress.py"
PIP = """\
Collecting a==1 (from -r x.lock (line 1))
  Downloading a-1-py3-none-any.whl (5 kB)
Ignoring b: markers 'sys_platform == "win32"' don't match your environment
Requirement already satisfied: c==3 in ./lib (from -r x.lock (line 3)) (3)
Collecting d==4 (from -r x.lock (line 4))
Installing collected packages: a, d
Successfully installed a-1 d-4
"""


@pytest.fixture(scope="module")
def progress() -> Any:
    spec = importlib.util.spec_from_file_location("progress", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["progress"] = module
    spec.loader.exec_module(module)
    return module


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(tmp_path: Path, script: str, packages: int = 4) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(SCRIPT), str(tmp_path / "pip.log"), "vllm", str(packages)]
    return subprocess.run(
        [*line, "sh", "-c", script], capture_output=True, text=True, check=False, timeout=60
    )


def test_of_pips_lines_those_that_count_packages_are_shown(progress: Any) -> None:
    seen = progress.Progress("vllm", 4)
    lines = []
    for line in PIP.splitlines():
        seen.read(line)
        lines.append(seen.line(3.2))
    assert lines == [
        "vllm: 1 of 4 packages, 3 s a==1",
        "vllm: 1 of 4 packages, 3 s a==1",
        "vllm: 2 of 4 packages, 3 s a==1",
        "vllm: 3 of 4 packages, 3 s a==1",
        "vllm: 4 of 4 packages, 3 s d==4",
        "vllm: 4 of 4 packages, 3 s installing",
        "vllm: 4 of 4 packages, 3 s installing",
    ]


def test_in_a_terminal_one_line_is_rewritten(progress: Any) -> None:
    out, seen = Terminal(), progress.Progress("vllm", 4)
    shown = progress.Shown(seen, out, columns=30)
    for line in PIP.splitlines():
        seen.read(line)
        shown.look()
    shown.end("done")
    assert out.getvalue().count("\n") == 1
    assert all(len(part) <= 30 for part in out.getvalue().split("\r\x1b[K")[:-1])


def test_elsewhere_there_are_a_few_lines(progress: Any) -> None:
    out, seen = io.StringIO(), progress.Progress("vllm", 160)
    shown = progress.Shown(seen, out)
    for number in range(160):
        seen.read(f"Collecting p{number}==1")
        shown.look()
    shown.end("done")
    assert len(out.getvalue().splitlines()) <= 7


def test_the_output_goes_into_a_file(tmp_path: Path) -> None:
    ended = run(tmp_path, f"cat <<'EOF'\n{PIP}EOF\n")
    assert ended.returncode == 0
    assert (tmp_path / "pip.log").read_text() == PIP
    assert ended.stdout.splitlines()[-1].startswith("vllm: done after ")
    assert "Downloading" not in ended.stdout + ended.stderr


def test_a_failure_shows_the_end_of_the_output_and_where_the_rest_is(tmp_path: Path) -> None:
    ended = run(tmp_path, "for n in $(seq 50); do echo line $n; done; echo ERROR: no >&2; exit 7")
    assert ended.returncode == 7
    lines = ended.stdout.splitlines()
    assert "line 50" in lines
    assert "ERROR: no" in lines
    assert "line 1" not in lines
    assert lines[-1] == f"The whole of it: {tmp_path / 'pip.log'}"


def test_a_command_that_is_not_there_fails(tmp_path: Path) -> None:
    line = [sys.executable, str(SCRIPT), str(tmp_path / "pip.log"), "vllm", "1", "./no-such"]
    ended = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ended.returncode == 127
    assert "./no-such: No such file" in ended.stdout
