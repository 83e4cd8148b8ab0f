"""The table of engine arguments is that of the installed vLLM."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter

from llmserve.registry import engine_args
from tests.contract.engine_args import table


def test_table_is_that_of_the_installed_vllm() -> None:
    written = Path(engine_args.__file__).read_text(encoding="utf-8")
    assert written == table(), "run `make engine-args`"


def test_every_default_passes_its_own_type() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    default = AsyncEngineArgs(model="m")
    for name, annotation in engine_args.ENGINE_ARGS.items():
        value = getattr(default, name)
        # The class annotates these as never None and sets None itself.
        if value is not None and isinstance(value, str | int | float | bool | list | dict):
            TypeAdapter(annotation).validate_python(value)
