"""The data types that the CPU of this machine computes in hardware."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmserve.checkpoint.shape import Shape

_CPUINFO = Path("/proc/cpuinfo")
# Linux names of the instructions, on x86 and on Arm.
_NEEDS: Mapping[str, frozenset[str]] = {
    "bfloat16": frozenset({"avx512_bf16", "amx_bf16", "bf16"}),
    "float16": frozenset({"avx512_fp16", "amx_fp16", "asimdhp"}),
}


def dtype_for(shape: Shape, cpuinfo: Path = _CPUINFO) -> str:
    """Return the default data type of a model on this CPU.

    It is the model's own, or float32 if the CPU computes that type in software only: that is
    slower and rounds more. Quantized weights have kernels for their own type only.
    """
    known = features(cpuinfo)
    native = not known or not _NEEDS.get(shape.dtype, known).isdisjoint(known)
    return shape.dtype if native or shape.quantization else "float32"


def features(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """Return the names of the CPU's instructions; empty if Linux does not list them."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, listed = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(listed.split())
    return frozenset()
