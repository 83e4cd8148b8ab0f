"""What needs an NVIDIA GPU; skipped elsewhere, with the reason."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def gpus() -> list[str]:
    """UUIDs."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()


MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpus(), reason="no NVIDIA GPU here (nvidia-smi lists none)"),
]
