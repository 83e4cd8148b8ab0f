"""The memory of engines on a machine without GPUs: that of the host, within a stated budget."""

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

_BESIDE = 2 << 30  # of an engine besides weights and KV cache: two processes with their libraries
_KV_CACHE = 1 << 30  # of 16-bit values, where a registry says nothing; as `engine` does


class HostMemory:
    """No model sleeps here, since a sleeper would give nothing back.

    `weights` and `dtypes` are what is known of the models: their bytes, and what they are computed
    in.
    """

    def __init__(
        self,
        config: Config,
        weights: Mapping[str, int],
        dtypes: Mapping[str, str],
        dtype_for: Callable[[Shape], str] = cpu_features.dtype_for,
    ) -> None:
        budget = config.server.host_memory
        self.capacity: Takes = {} if budget is None else {HOST_MEMORY: int(budget)}
        self.dtypes = dtypes
        self._weights = weights
        self._dtype_for = dtype_for

    @classmethod
    def of(
        cls, config: Config, dtype_for: Callable[[Shape], str] = cpu_features.dtype_for
    ) -> HostMemory:
        """Checked: raises ConfigError for what cannot run, alone or with the others. Blocks."""
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
        space = cls(config, weights, dtypes, dtype_for)
        space._raise_if_wrong(config, known)
        return space

    def place(self, spec: ModelSpec, number: int) -> Placement:
        return Placement(number, {Level.READY: {HOST_MEMORY: self._size(spec)}})

    def _size(self, spec: ModelSpec) -> int:
        """Bytes of one replica; they are alike."""
        kv_cache = _kv_cache(spec, self.dtypes.get(spec.name))
        return int(spec.memory or self._weights.get(spec.name, 0) + kv_cache + _BESIDE)

    def _raise_if_wrong(self, config: Config, shapes: Mapping[str, Shape]) -> None:
        """A model whose files are broken fails alone, later."""
        found = [
            problem
            for spec in config.models
            if spec.name in shapes
            for problem in feasibility.on_cpu(
                spec, shapes[spec.name], _kv_cache(spec, self.dtypes[spec.name])
            )
        ]
        problems = [self._tried(problem, config).within(config) for problem in found]
        if self.capacity:
            problems += self._problems(config)
        if problems:
            raise ConfigError(problems)

    def _problems(self, config: Config) -> Iterator[str]:
        """Of those that run at once, who is too much; of the others, who finds no place."""
        pinned = sum(self._needs(spec) for spec in config.models if spec.pinned)
        free = self.capacity[HOST_MEMORY]
        for spec in config.models:
            if spec.start == "eager":
                left, free = free, free - self._needs(spec)
            else:
                left = (
                    self.capacity[HOST_MEMORY] - pinned + (self._needs(spec) if spec.pinned else 0)
                )
            if self._needs(spec) > left:
                yield config.problem(
                    ("models", spec.name),
                    f"needs {gib(self._needs(spec))}, and of server.host_memory "
                    f"{gib(self.capacity[HOST_MEMORY])} are left {gib(max(0, left))}; what would fit: "
                    + " or ".join(self._remedies(spec, left, pinned)),
                )

    def _remedies(self, spec: ModelSpec, left: int, pinned: int) -> Iterator[str]:
        needs, budget = self._needs(spec), self.capacity[HOST_MEMORY]
        if spec.start == "eager" and not spec.pinned and needs <= budget - pinned:
            yield "`start: lazy`"
        yield f"server.host_memory: {amount(budget + needs - left)[0]}"

    def _tried(self, problem: Problem, config: Config) -> Problem:
        """Without its remedy, a larger KV cache, where the budget has no room for that."""
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
        """The budget of another registry. Raises ConfigError."""
        del kept  # they hold what they hold
        other = HostMemory.of(config, self._dtype_for)
        return lambda: vars(self).update(vars(other))

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
    """As many tokens in either width, where the entry does not say."""
    return int(spec.kv_cache or (2 if dtype == "float32" else 1) * _KV_CACHE)


def _computed(
    spec: ModelSpec, shape: Shape | UnknownShape, dtype_for: Callable[[Shape], str]
) -> ModelSpec:
    """An entry with what it leaves to the CPU: its data type, and the KV cache in that."""
    if isinstance(shape, UnknownShape):
        return spec
    said = spec.engine.get("dtype", "auto") != "auto" or spec.engine.get("quantization")
    dtype = shape.dtype if said else dtype_for(shape)
    engine = spec.engine if dtype == shape.dtype else spec.engine | {"dtype": dtype}
    kv_cache = ByteSize(_kv_cache(spec, dtype))
    return spec.model_copy(update={"engine": engine, "kv_cache": kv_cache})
