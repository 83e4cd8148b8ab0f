from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Literal, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from llmserve.registry.engine_args import EngineFields, engine_fields, human_int, parser_names

if TYPE_CHECKING:
    from pathlib import Path

ARG_UTILS = '''
from dataclasses import dataclass
from typing import Any, Literal
from vllm.config.model import Dtype, ModelConfig, Wide
from vllm.elsewhere import Strange

Here = Literal["x", "y"]


@dataclass
class EngineArgs:
    """Not all of these are arguments."""

    model: str = ""
    length: int = 0
    share: float = 0.9
    eager: bool = False
    dtype: Dtype = "auto"
    wide: Wide = "auto"
    here: Here | None = None
    names: str | list[str] | None = None
    sizes: "list[int] | None" = None
    limits: dict[str, int] = None
    options: dict[str, Any] | None = None
    skipped: set[str] = None
    config: ModelConfig = None
    strange: Strange = None
    _private: int = 0
    no_annotation = 3

    def method(self) -> None:
        local: int = 0


@dataclass
class AsyncEngineArgs(EngineArgs):
    log_requests: bool = False


class Unrelated:
    other: int = 0
'''
MODEL = """
from typing import Literal

Dtype = Literal["auto", "half"]
Wide = Literal[Dtype, "float"] | None


class ModelConfig:
    pass
"""


@pytest.fixture
def fields(tmp_path: Path) -> EngineFields:
    root = tmp_path / "vllm"
    for name, text in {"engine/arg_utils.py": ARG_UTILS, "config/model.py": MODEL}.items():
        file = root / name
        file.parent.mkdir(parents=True)
        file.write_text(text, encoding="utf-8")
    return EngineFields(root)


def test_the_arguments_are_the_annotated_fields_of_both_classes(fields: EngineFields) -> None:
    assert fields.names == {
        "model", "length", "share", "eager", "dtype", "wide", "here", "names", "sizes", "limits",
        "options", "skipped", "config", "strange", "log_requests",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "given", "taken"),
    [
        ("model", "m", "m"),
        ("length", 7, 7),
        ("length", "32k", 32_000),
        ("length", "32K", 32_768),
        ("length", "auto", -1),
        ("share", 0.5, 0.5),
        ("eager", True, True),
        ("dtype", "half", "half"),
        ("wide", "float", "float"),
        ("wide", "half", "half"),
        ("wide", None, None),
        ("here", "x", "x"),
        ("here", None, None),
        ("names", "a", "a"),
        ("names", ["a", "b"], ["a", "b"]),
        ("sizes", [1, "2k"], [1, 2000]),
        ("sizes", None, None),
        ("limits", {"image": 2}, {"image": 2}),
        ("options", {"a": [1]}, {"a": [1]}),
        ("config", {"any": "thing"}, {"any": "thing"}),
        ("strange", object, object),
    ],
)
def test_what_fits_is_taken(fields: EngineFields, name: str, given: object, taken: object) -> None:
    assert fields.validate(name, given) == taken


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("model", 3),
        ("length", "long"),
        ("length", 1.5),
        ("length", None),
        ("share", "half"),
        ("eager", "perhaps"),
        ("dtype", "quarter"),
        ("wide", "quarter"),
        ("here", "z"),
        ("names", 3),
        ("sizes", ["x"]),
        ("limits", {"image": "many"}),
        ("options", []),
    ],
)
def test_what_does_not_fit_is_refused(fields: EngineFields, name: str, given: object) -> None:
    with pytest.raises(ValidationError):
        fields.validate(name, given)


def test_a_class_of_vllm_s_own_is_left_to_vllm(fields: EngineFields) -> None:
    assert fields.type("config") is Any
    assert fields.type("strange") is Any


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("32k", 32_000), ("32K", 32_768), ("1.5k", 1500), ("2m", 2_000_000), ("2M", 2 * 2**20),
        ("1g", 10**9), ("1G", 2**30), ("1t", 10**12), ("1T", 2**40), ("auto", -1),
        ("32", "32"), ("k", "k"), ("", ""), ("1.2.3k", "1.2.3k"), ("-1k", "-1k"), (".k", ".k"),
        (7, 7), (None, None),
    ],
)  # fmt: skip
def test_human_integers(given: object, meant: object) -> None:
    assert human_int(given) == meant


# --- the installed vLLM

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is missing")


@needs_vllm
def test_known_arguments_of_the_installed_vllm() -> None:
    fields = engine_fields()
    assert fields is not None
    assert len(fields.names) > 150
    assert fields.type("model") is str
    assert fields.type("enforce_eager") is bool
    assert "bfloat16" in get_args(fields.type("dtype"))
    assert fields.validate("max_model_len", "32k") == 32_000
    assert fields.validate("served_model_name", ["a"]) == ["a"]
    assert fields.validate("enable_log_requests", value=True) is True
    assert fields.validate("max_lora_rank", 16) == 16
    for name, wrong in {"dtype": "float17", "max_num_seqs": "many", "enforce_eager": 3}.items():
        with pytest.raises(ValidationError):
            fields.validate(name, wrong)


@needs_vllm
def test_every_argument_of_the_installed_vllm_has_a_type_to_check_with() -> None:
    fields = engine_fields()
    assert fields is not None
    for name in fields.names:
        TypeAdapter(fields.type(name))


@needs_vllm
@pytest.mark.parametrize(
    ("kind", "known"), [("tool_parsers", "hermes"), ("reasoning", "deepseek_r1")]
)
def test_parsers_of_the_installed_vllm(
    kind: Literal["tool_parsers", "reasoning"], known: str
) -> None:
    names = parser_names(kind)
    assert names is not None
    assert known in names
    assert "no-such-parser" not in names
