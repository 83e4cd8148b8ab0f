"""The memory budget of engines on a machine without GPUs: the host's memory."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import ByteSize, TypeAdapter

from llmserve.checkpoint.shape import UnknownShape
from llmserve.errors import ConfigError
from llmserve.gpus.device import amount, gib
from llmserve.lifecycle.placement import HOST_MEMORY, Level, Placement
from llmserve.planning import cpu_features, feasibility, survey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from llmserve.checkpoint.shape import Shape
    from llmserve.lifecycle.gpu_memory import Keep
    from llmserve.lifecycle.placement import Takes
    from llmserve.planning.plan import Problem
    from llmserve.registry.spec import Config, ModelSpec

log = logging.getLogger(__name__)

_OVERHEAD = 2 << 30  # of an engine besides weights and KV cache: two processes with libraries
_KV_CACHE = 1 << 30  # of 16-bit values, where the registry has none; as in `engine`


class HostMemory:
    """The budget of engines on a CPU. No model sleeps: that would free nothing.

    `weights` and `dtypes` are the bytes and data types of the models, by name, where known.
    """

    def __init__(
        self,
        config: Config,
        weights: Mapping[str, int],
        dtypes: Mapping[str, str],
        dtype_for: Callable[[Shape], str] = cpu_features.dtype_for,
    ) -> None:
        self._dtype_for = dtype_for
        self._apply(config, weights, dtypes)

    def _apply(self, config: Config, weights: Mapping[str, int], dtypes: Mapping[str, str]) -> None:
        budget = config.server.host_memory
        self.capacity: Takes = {} if budget is None else {HOST_MEMORY: int(budget)}
        self.dtypes, self.weights = dtypes, weights

    @classmethod
    def from_config(
        cls, config: Config, dtype_for: Callable[[Shape], str] = cpu_features.dtype_for
    ) -> HostMemory:
        """Read the models' files. Raises ConfigError for models that cannot run. Blocks."""
        hub = config.server.host_memory is not None
        stored = survey.shapes(config.models, hub=hub)
        specs = [_computed(spec, stored[spec.name], dtype_for) for spec in config.models]
        cast = [
            new for new, old in zip(specs, config.models, strict=True) if new.engine != old.engine
        ]
        shapes = stored | survey.shapes(cast, hub=hub)
        known = {name: each for name, each in shapes.items() if not isinstance(each, UnknownShape)}
        weights = {name: each.weights for name, each in known.items()}
        dtypes = {name: each.dtype for name, each in known.items()}
        memory = cls(config, weights, dtypes, dtype_for)
        memory._raise_if_infeasible(config, known)
        return memory

    def place(self, spec: ModelSpec, number: int) -> Placement:
        return Placement(number, {Level.READY: {HOST_MEMORY: self._size(spec)}})

    def _size(self, spec: ModelSpec) -> int:
        """Bytes of one replica."""
        kv_cache = _kv_cache(spec, self.dtypes.get(spec.name))
        return int(spec.memory or self.weights.get(spec.name, 0) + kv_cache + _OVERHEAD)

    def _raise_if_infeasible(self, config: Config, shapes: Mapping[str, Shape]) -> None:
        """A model with broken files is not checked: it fails alone, when it starts."""
        found = [
            problem
            for spec in config.models
            if spec.name in shapes
            for problem in feasibility.on_cpu(
                spec, shapes[spec.name], _kv_cache(spec, self.dtypes[spec.name])
            )
        ]
        problems = [self._with_tried_remedy(problem, config).within(config) for problem in found]
        if self.capacity:
            problems += self._problems(config)
        if problems:
            raise ConfigError(problems)

    def _problems(self, config: Config) -> Iterator[str]:
        """Eager models must fit together, each other model beside the pinned ones."""
        budget = free = self.capacity[HOST_MEMORY]
        pinned = sum(self._needs(spec) for spec in config.models if spec.pinned)
        for spec in config.models:
            needs = self._needs(spec)
            if spec.start == "eager":
                left, free = free, free - needs
            else:
                left = budget - pinned + (needs if spec.pinned else 0)
            if needs > left:
                yield config.problem(
                    ("models", spec.name),
                    f"needs {gib(needs)}, but only {gib(max(0, left))} of {gib(budget)} of "
                    "server.host_memory are free; what would fit: "
                    + " or ".join(self._remedies(spec, left, pinned)),
                )

    def _remedies(self, spec: ModelSpec, left: int, pinned: int) -> Iterator[str]:
        needs, budget = self._needs(spec), self.capacity[HOST_MEMORY]
        if spec.start == "eager" and not spec.pinned and needs <= budget - pinned:
            yield "`start: lazy`"
        yield f"server.host_memory: {amount(budget + needs - left)[0]}"

    def _with_tried_remedy(self, problem: Problem, config: Config) -> Problem:
        """The problem without its remedy, a larger KV cache, if the budget is too small for that."""
        if problem.remedy is None or not self.capacity:
            return problem
        larger = TypeAdapter(ByteSize).validate_python(problem.remedy.removeprefix("kv_cache: "))
        models = tuple(
            spec.model_copy(update={"kv_cache": larger}) if spec.name == problem.model else spec
            for spec in config.models
        )
        fits = not any(self._problems(config.model_copy(update={"models": models})))
        return problem if fits else replace(problem, remedy=None)

    def _needs(self, spec: ModelSpec) -> int:
        return self._size(spec) * spec.replicas

    def planned(
        self, config: Config, kept: Mapping[str, Sequence[Placement]]
    ) -> Callable[[], None]:
        """Check another registry; the result applies it. Raises ConfigError."""
        del kept  # their placements do not change
        other = HostMemory.from_config(config, self._dtype_for)
        return lambda: self._apply(config, other.weights, other.dtypes)

    @contextlib.asynccontextmanager
    async def start(
        self, spec: ModelSpec, placement: Placement
    ) -> AsyncIterator[tuple[ModelSpec, Keep]]:
        del placement
        shape = await asyncio.to_thread(survey.shape_of, spec, hub=False)
        placed = _computed(spec, shape, self._dtype_for)
        log.info("model=%s dtype=%s", spec.name, placed.engine.get("dtype", "auto"))
        yield placed, lambda _: None

    def expecting(self, placement: Placement) -> AbstractContextManager[None]:
        del placement  # no model sleeps here
        return contextlib.nullcontext()

    @contextlib.asynccontextmanager
    async def moves(
        self, placement: Placement, wakes_from: Level | None = None
    ) -> AsyncIterator[None]:
        del placement, wakes_from
        yield


def _kv_cache(spec: ModelSpec, dtype: str | None) -> int:
    """Bytes for as many tokens in either width, unless the spec has a size."""
    return int(spec.kv_cache or (2 if dtype == "float32" else 1) * _KV_CACHE)


def _computed(
    spec: ModelSpec, shape: Shape | UnknownShape, dtype_for: Callable[[Shape], str]
) -> ModelSpec:
    """The spec with the data type that the CPU computes in, and the KV cache in that type."""
    if isinstance(shape, UnknownShape):
        return spec
    explicit = spec.engine.get("dtype", "auto") != "auto" or spec.engine.get("quantization")
    dtype = shape.dtype if explicit else dtype_for(shape)
    engine = spec.engine if dtype == shape.dtype else spec.engine | {"dtype": dtype}
    kv_cache = ByteSize(_kv_cache(spec, dtype))
    return spec.model_copy(update={"engine": engine, "kv_cache": kv_cache})
