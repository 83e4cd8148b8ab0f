from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from llmserve import __version__
from llmserve.cli import app

SAMPLE = Path(__file__).parents[2] / "models.yaml"


def llmserve(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    (tmp_path / "m").mkdir()
    file = tmp_path / "models.yaml"
    file.write_text("models:\n  chat: {model: m}\n  '[red]': {model: m}\n", encoding="utf-8")
    return file


def test_check_names_the_models(registry: Path) -> None:
    result = llmserve("check", registry)
    assert result.exit_code == 0
    assert result.stdout == f"{registry}: 2 models: chat, [red]\n"
    assert result.stderr == ""


def test_check_of_one_model_is_singular(registry: Path) -> None:
    registry.write_text("models: {chat: {model: m}}\n", encoding="utf-8")
    assert llmserve("check", registry).stdout == f"{registry}: 1 model: chat\n"


@pytest.mark.parametrize("command", ["check", "up"])
def test_a_bad_registry_ends_with_2_and_every_problem_on_stderr(
    command: str, registry: Path
) -> None:
    registry.write_text("models:\n  chat: {model: m, port: 1}\n  embed: {}\n", encoding="utf-8")
    result = llmserve(command, registry)
    assert result.exit_code == 2
    assert result.stderr == (
        "models.yaml:2: models.chat.port: unknown key; it is a key of server\n"
        "models.yaml:3: models.embed.model: is missing\n"
    )
    assert result.stdout == ""


def test_up_on_a_taken_port_ends_with_3(registry: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = llmserve("up", registry, "--port", port)
    assert result.exit_code == 3
    assert result.stderr.startswith(f"port {port} on 127.0.0.1 cannot be bound: ")


def test_the_version() -> None:
    assert llmserve("version").stdout == f"{__version__}\n"


def test_without_a_command_there_is_help() -> None:
    result = llmserve()
    for command in ("up", "check", "chat", "version"):
        assert command in result.output


def test_the_package_is_the_command_too(registry: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmserve", "check", registry.name],
        cwd=registry.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "models.yaml: 2 models: chat, [red]\n"


CHECK = f"""
import contextlib, pathlib
import llmserve.cli
from llmserve.config import load
from llmserve.errors import ConfigError
with contextlib.suppress(ConfigError):
    load(pathlib.Path({str(SAMPLE)!r}))
"""


@pytest.mark.parametrize("work", [CHECK, "import llmserve.server"], ids=["check", "server"])
def test_nothing_heavy_is_imported_before_an_engine_starts(work: str) -> None:
    heavy = "import sys; print(sorted({'vllm', 'torch', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", f"{work}\n{heavy}"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
