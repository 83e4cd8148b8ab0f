"""The plan of a registry on a detected or described box, with measured overheads."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from llmserve.checkpoint import shape
from llmserve.checkpoint.shape import UnknownShape
from llmserve.errors import LLMServeError
from llmserve.planning import feasibility
from llmserve.planning.measurements import Measured
from llmserve.planning.plan import Problem
from llmserve.planning.planner import Planner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmserve.checkpoint.shape import Shape
    from llmserve.gpus.device import Box
    from llmserve.planning.plan import Plan
    from llmserve.registry.spec import Config, ModelSpec

_COUNTS = frozenset(field.name for field in dataclasses.fields(shape.Shape) if field.type == "int")
_READERS = 16  # of headers at a time; most of it is waiting for a disk or the hub


def plan(config: Config, box: Box, kept: Measured | None = None) -> Plan:
    """Return the plan from every model's config and headers. Blocks; may ask the hub."""
    overhead_of = (kept or Measured()).overhead
    planner = Planner(box, config.server.gpu_headroom, shapes(config.models), overhead_of)
    return planner.plan(config.models)


def mistakes(config: Config) -> list[str]:
    """Return the mistakes that local files show, with lines. Blocks; does not ask the hub."""
    read = shapes(config.models, hub=False)
    found = [
        feasibility.anywhere(spec, read[spec.name]) or _of_template(spec, read[spec.name])
        for spec in config.models
    ]
    return [problem.within(config) for problems in found for problem in problems]


def _of_template(spec: ModelSpec, read: Shape | UnknownShape) -> list[Problem]:
    """Return the problem of the model's own chat template, which an encoder does not use."""
    from llmserve.checkpoint import chat_templates  # noqa: PLC0415  # Jinja takes 50 ms

    encodes = not isinstance(read, UnknownShape) and not read.attention_layers
    flaw = None if encodes else chat_templates.flaw(spec)
    return (
        [Problem(spec.name, f"{flaw}; repair it or set `chat_template`", key="model")]
        if flaw
        else []
    )


def shapes(specs: Sequence[ModelSpec], *, hub: bool = True) -> dict[str, Shape | UnknownShape]:
    """Return the shape of every model by name. Blocks; without `hub` only local files count."""
    with ThreadPoolExecutor(_READERS) as readers:
        read = readers.map(partial(shape_of, hub=hub), specs)
        return {spec.name: each for spec, each in zip(specs, read, strict=True)}


def _require_scalars(read: Shape) -> Shape:
    """Raise TypeError for a list or text in place of a number, as some configs have."""
    for name, value in vars(read).items():
        if not isinstance(value, str | int | None):
            raise TypeError(f"{name} is {value!r}")
        if name in _COUNTS and not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}")
    return read


def shape_of(spec: ModelSpec, *, hub: bool = True) -> Shape | UnknownShape:
    """Return the shape of a model, or why it is unknown."""
    try:
        return _require_scalars(shape.read(spec, hub=hub))
    except LLMServeError as error:
        return UnknownShape.of(error)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        return UnknownShape(f"invalid config.json: {error}")
