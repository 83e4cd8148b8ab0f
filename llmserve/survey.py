"""The plan of a registry on this machine or on one that is described, with what was measured."""

from __future__ import annotations

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

_READERS = 16  # of headers at a time; most of it is waiting for a disk or the hub


def plan(config: Config, box: Box, kept: Measured | None = None) -> Plan:
    """Reads every model's config and headers, or asks the hub for them. Blocks."""
    with ThreadPoolExecutor(_READERS) as readers:
        shapes = dict(zip(_names(config), readers.map(_shape, config.models), strict=True))
    overhead_of = (kept or Measured()).overhead
    return Planner(box, config.server.gpu_headroom, shapes, overhead_of).plan(config.models)


def _names(config: Config) -> list[str]:
    return [spec.name for spec in config.models]


def _shape(spec: ModelSpec) -> Shape | str:
    try:
        return shape.read(spec)
    except LLMServeError as error:
        return error.message
