from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
from typer.testing import CliRunner, Result

from llmserve import __version__
from llmserve.cli.main import app
from llmserve.engine import environment
from llmserve.gpus import nvml
from llmserve.gpus.device import GIB, described
from llmserve.gpus.nvml import Holder
from llmserve.server import logs as serverlog
from tests.unit.shapes import LLAMA_8B
from tests.unit.test_survey import llama

if TYPE_CHECKING:
    from llmserve.gpus.device import Box

OPERATING = ("ps", "load", "unload", "sleep", "wake", "reload", "logs", "events")
SAMPLE = Path(__file__).parents[2] / "models.yaml"


def llmserve(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "model.bin").write_text("weights")
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


def test_check_lists_problems_of_model_files(tmp_path: Path) -> None:
    llama(tmp_path / "m")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    (tmp_path / "models.yaml").write_text(
        "models:\n"
        "  fine: {model: m}\n"
        "  long: {model: m, engine: {max_model_len: 200000}}\n"
        "  small: {model: m, kv_cache: 1MiB}\n"
        "  lora: {model: lora}\n"
        "  tuned: {model: m, loras: {sql: empty}}\n"
        "  away: {model: org/nowhere}\n"
        "  bare: {model: bare}\n"
        "  random: {model: bare, engine: {load_format: dummy}}\n",
        encoding="utf-8",
    )
    result = llmserve("check", tmp_path / "models.yaml")
    assert result.exit_code == 2
    lines = result.stderr.replace(f"{tmp_path}/", "").splitlines()
    assert lines == [
        "models.yaml:3: models.long.engine: max_model_len 200,000 exceeds the model's context of 131,072 tokens",
        "models.yaml:4: models.small.kv_cache: a KV cache of 0.0 GiB is too small; 131,072 tokens need 16.0 GiB; what would fit: kv_cache: 16.1GiB",
        "models.yaml:5: models.lora.model: cannot be loaded: lora is an adapter and not a model; list it in `loras` of its base model",
        "models.yaml:6: models.tuned.model: cannot be loaded: adapter sql: empty: has no adapter_config.json; it is a folder and not an adapter",
        "models.yaml:8: models.bare.model: cannot be loaded: bare: has no weights: no *.safetensors, *.bin or *.pt file; download the model again, or set `engine: {load_format: dummy}` for random weights",
    ]


@pytest.mark.parametrize("command", ["check", "plan", "up"])
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
    for command in ("up", "check", "plan", "chat", "version", *OPERATING):
        assert f" {command} " in result.output


@pytest.mark.parametrize("command", OPERATING)
def test_help_of_a_server_command_has_its_options(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "120", "NO_COLOR": "1"})
    for word in ("--url", "LLMSERVE_URL", "http://127.0.0.1:8000", "LLMSERVE_ADMIN_KEY", "--json"):
        assert word in shown.output


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
import llmserve.cli.main
from llmserve.registry.loader import load
from llmserve.errors import ConfigError
with contextlib.suppress(ConfigError):
    load(pathlib.Path({str(SAMPLE)!r}))
"""


@pytest.mark.parametrize("work", [CHECK, "import llmserve.server.process"], ids=["check", "server"])
def test_nothing_heavy_is_imported_before_an_engine_starts(work: str) -> None:
    heavy = "import sys; print(sorted({'vllm', 'torch', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", f"{work}\n{heavy}"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# --- plan


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry of two models that can be planned: `big` is of 16 GiB, `odd` has `memory`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("llmserve.checkpoint.shape.read", lambda spec, hub: LLAMA_8B)
    for folder in ("m", "n"):
        (tmp_path / folder).mkdir()
    file = tmp_path / "models.yaml"
    file.write_text(
        "server: {log_dir: logs}\n"
        "models:\n"
        "  big: {model: m, devices: [0]}\n"
        "  odd: {model: n, memory: 30GiB, devices: [1]}\n",
        encoding="utf-8",
    )
    return file


def see(monkeypatch: pytest.MonkeyPatch, box: Box, used: int = 0) -> None:
    """As on a machine with these GPUs and vLLM's build for CUDA."""
    monkeypatch.setattr(nvml, "visible", lambda: box)
    monkeypatch.setattr(nvml, "used_bytes", lambda gpu: used)
    monkeypatch.setattr(nvml, "holders", lambda gpu: [Holder(7, "python", used)])
    monkeypatch.setattr(environment, "is_cpu_build", lambda: False)
    monkeypatch.setattr(environment, "prepare", lambda engines, logs: [])
    monkeypatch.setattr(serverlog, "begin", lambda file: None)


def test_a_plan_is_shown_with_every_gpu_and_model(models: Path) -> None:
    result = llmserve("plan", models, "--gpus", "2xH100")
    assert (result.exit_code, result.stderr) == (0, "")
    for word in ("big", "odd", "H100", "GPU"):
        assert word in result.stdout


def test_a_plan_for_programs_is_json_and_nothing_else(models: Path) -> None:
    result = llmserve("plan", models, "--gpus", "2xH100", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    plan = json.loads(result.stdout)
    assert plan["problems"] == []
    assert [gpu["name"] for gpu in plan["gpus"]] == ["NVIDIA H100 80GB HBM3"] * 2
    assert [(one["name"], one["gpus"]) for one in plan["replicas"]] == [("big", [0]), ("odd", [1])]
    assert plan["replicas"][1]["total_bytes"] == 30 * GIB


def test_a_box_in_a_file_is_planned_for(models: Path, tmp_path: Path) -> None:
    box = tmp_path / "box.yaml"
    box.write_text("gpus:\n- {name: H100, count: 2}\n", encoding="utf-8")
    described = llmserve("plan", models, "--gpus", "2xH100", "--json").stdout
    assert llmserve("plan", models, "--box", box, "--json").stdout == described


def test_plan_without_options_uses_this_machine_s_gpus(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, described("2xA100-80G"))
    plan = json.loads(llmserve("plan", models, "--json").stdout)
    assert {gpu["name"] for gpu in plan["gpus"]} == {"NVIDIA A100-SXM4-80GB"}


def test_a_plan_is_drawn_as_well(models: Path, tmp_path: Path) -> None:
    result = llmserve("plan", models, "--gpus", "2xH100", "--json", "--svg", tmp_path / "p.svg")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["problems"] == []
    drawn = ET.fromstring((tmp_path / "p.svg").read_text(encoding="utf-8"))
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    assert "big" in "".join(drawn.itertext())


@pytest.mark.parametrize("as_json", [True, False])
def test_a_plan_with_problems_is_shown_and_ends_with_2(models: Path, as_json: bool) -> None:
    result = llmserve("plan", models, "--gpus", "H100", *(["--json"] if as_json else []))
    assert result.exit_code == 2
    assert "GPU 1 does not exist" in result.stdout
    if as_json:
        plan = json.loads(result.stdout)
        assert [problem["model"] for problem in plan["problems"]] == ["odd"]
        assert [one["name"] for one in plan["replicas"]] == ["big"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--gpus H100 --box b.yaml",
            "--gpus and --box both describe the GPUs; use only one of them",
        ),
        ("", "no NVIDIA GPU is visible on this machine; describe GPUs with --gpus 8xH100-80G"),
        ("--gpus 8xH1000", "nearest: H100"),
        ("--box nowhere.yaml", "nowhere.yaml"),
        ("--gpus 2xH100 --svg /none/p.svg", "/none/p.svg cannot be written: No such file"),
    ],
)
def test_plan_with_invalid_options_ends_with_2(
    models: Path, options: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, ())
    result = llmserve("plan", models, *options.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


# --- up, and the GPUs


def test_up_without_a_gpu_ends_with_3_and_names_causes(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, ())
    result = llmserve("up", models, "--port", 0)
    assert result.exit_code == 3
    assert result.stderr == (
        "no NVIDIA GPU is visible; check `nvidia-smi` and CUDA_VISIBLE_DEVICES, "
        "or install llmserve[cpu]\n"
    )


def test_up_of_models_that_do_not_fit_ends_with_2_and_their_lines(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, described("H100"))
    result = llmserve("up", models, "--port", 0)
    assert result.exit_code == 2
    assert result.stderr.startswith("models.yaml:4: models.odd.devices: GPU 1 does not exist; ")


def test_up_on_used_gpus_ends_with_3_and_names_the_processes(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, described("2xH100"), used=60 * GIB)
    result = llmserve("up", models, "--port", 0)
    assert result.exit_code == 3
    first, second = result.stderr.splitlines()
    assert first.startswith("GPU 0 (H100 80GB HBM3): the plan needs ")
    assert second.startswith("GPU 1 (H100 80GB HBM3): the plan needs 30.0 GiB, 19.6 GiB of ")
    assert "held by pid 7 python 60.0 GiB; " in second
