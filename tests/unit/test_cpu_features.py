"""Which data type a CPU computes in, by what Linux lists of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from llmserve.planning import cpu_features
from tests.unit.shapes import LLAMA_8B

if TYPE_CHECKING:
    from pathlib import Path

PLAIN = "flags\t\t: fpu avx2 avx512f"
AVX512 = f"{PLAIN} avx512_bf16"
AMX = f"{PLAIN} avx512_bf16 amx_bf16 avx512_fp16 amx_tile"
ARM = "Features\t: fp asimd fphp asimdhp"


@pytest.mark.parametrize(
    ("lists", "stored", "dtype"),
    [
        (PLAIN, "bfloat16", "float32"),
        (PLAIN, "float16", "float32"),
        (PLAIN, "float32", "float32"),
        (AVX512, "bfloat16", "bfloat16"),
        (AVX512, "float16", "float32"),
        (AMX, "bfloat16", "bfloat16"),
        (AMX, "float16", "float16"),
        (AMX, "float32", "float32"),
        (ARM, "bfloat16", "float32"),
        (ARM, "float16", "float16"),
        (f"{ARM} bf16", "bfloat16", "bfloat16"),
        ("cpu\t\t: POWER10", "bfloat16", "bfloat16"),  # nothing is known of it
    ],
)
def test_dtype_for_keeps_types_with_cpu_instructions(
    tmp_path: Path, lists: str, stored: str, dtype: str
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\n{lists}\n\nprocessor\t: 1\n{lists}\n", encoding="utf-8")
    assert cpu_features.dtype_for(replace(LLAMA_8B, dtype=stored), file) == dtype


def test_quantized_weights_keep_theirs(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(PLAIN, encoding="utf-8")
    awq = replace(LLAMA_8B, dtype="float16", quantization="awq")
    assert cpu_features.dtype_for(awq, tmp_path / "cpuinfo") == "float16"


def test_without_a_list_nothing_is_claimed(tmp_path: Path) -> None:
    assert cpu_features.features(tmp_path / "none") == frozenset()
    assert cpu_features.dtype_for(LLAMA_8B, tmp_path / "none") == LLAMA_8B.dtype
