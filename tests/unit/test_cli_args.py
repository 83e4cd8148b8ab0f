"""Names that vLLM moves between versions are found in both places."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SHIM = Path(__file__).parents[2] / "llmserve" / "engine" / "cli_args.py"


@pytest.mark.parametrize("home", ["common", "launchers"])
def test_cli_args_are_found_where_vllm_has_them(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = ("vllm", "vllm.entrypoints", f"vllm.entrypoints.{home}")
    for name in packages:
        package: Any = ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    module: Any = ModuleType(f"vllm.entrypoints.{home}.cli_args")
    module.FrontendArgs, module.make_arg_parser = object(), object()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    other = "launchers" if home == "common" else "common"
    for name in (f"vllm.entrypoints.{other}", f"vllm.entrypoints.{other}.cli_args"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = runpy.run_path(str(SHIM))
    assert found["FrontendArgs"] is module.FrontendArgs
    assert found["make_arg_parser"] is module.make_arg_parser
