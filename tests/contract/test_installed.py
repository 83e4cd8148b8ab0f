"""What is read from vLLM's source as text is what vLLM has."""

from __future__ import annotations

import dataclasses
import typing

from llmserve.registry.engine_args import engine_fields, parser_names


def test_fields_are_those_of_the_class() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    fields = engine_fields()
    assert fields is not None
    real = {f.name for f in dataclasses.fields(AsyncEngineArgs) if not f.name.startswith("_")}
    assert fields.names == real


def test_choices_are_those_of_the_class() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    fields = engine_fields()
    assert fields is not None
    compared = 0
    for field in dataclasses.fields(AsyncEngineArgs):
        if typing.get_origin(field.type) is typing.Literal and field.name in fields.names:
            read = fields.type(field.name)
            assert read is typing.Any or set(typing.get_args(read)) == set(
                typing.get_args(field.type)
            ), field.name
            compared += read is not typing.Any
    assert compared > 20


def test_every_default_passes_its_own_type() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    fields = engine_fields()
    assert fields is not None
    default = AsyncEngineArgs(model="m")
    for name in sorted(fields.names):
        value = getattr(default, name)
        # The class annotates these as never None and sets None itself.
        if value is not None and isinstance(value, str | int | float | bool | list | dict):
            fields.validate(name, value)


def test_parsers_are_those_registered() -> None:
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    assert parser_names("tool_parsers") == frozenset(ToolParserManager.list_registered())
    assert parser_names("reasoning") == frozenset(ReasoningParserManager.list_registered())
