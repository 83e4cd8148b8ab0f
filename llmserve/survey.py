"""The plan of a registry on this machine or on one that is described, with what was measured."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from llmserve import shape
from llmserve.errors import LLMServeError
from llmserve.measured import Measured
from llmserve.planner import Planner

if TYPE_CHECKING:
    from llmserve.config import Config, ModelSpec
    from llmserve.gpus import Box
    from llmserve.plan import Plan
    from llmserve.shape import Shape

_COUNTS = frozenset(field.name for field in dataclasses.fields(shape.Shape) if field.type == "int")
_READERS = 16  # of headers at a time; most of it is waiting for a disk or the hub


def plan(config: Config, box: Box, kept: Measured | None = None) -> Plan:
    """Reads every model's config and headers, or asks the hub for them. Blocks."""
    with ThreadPoolExecutor(_READERS) as readers:
        shapes = dict(zip(_names(config), readers.map(_shape, config.models), strict=True))
    overhead_of = (kept or Measured()).overhead
    return Planner(box, config.server.gpu_headroom, shapes, overhead_of).plan(config.models)


def weights(config: Config) -> dict[str, int]:
    """Bytes of every model whose size is known, by name. Blocks."""
    with ThreadPoolExecutor(_READERS) as readers:
        shapes = readers.map(_shape, config.models)
    sizes = zip(config.models, shapes, strict=True)
    return {spec.name: read.weights for spec, read in sizes if not isinstance(read, str)}


def _whole(read: Shape) -> Shape:
    """Raises TypeError for a list or a text where a number should be, as some configs have."""
    for name, value in vars(read).items():
        if not isinstance(value, str | int | None):
            raise TypeError(f"{name} is {value!r}")
        if name in _COUNTS and not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}")
    return read


def _names(config: Config) -> list[str]:
    return [spec.name for spec in config.models]


def _shape(spec: ModelSpec) -> Shape | str:
    try:
        return _whole(shape.read(spec))
    except LLMServeError as error:
        return error.message
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        return f"its config.json is not understood: {error}"
