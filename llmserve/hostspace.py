"""The memory of engines on a machine without GPUs: that of the host, within a stated budget."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from llmserve import survey
from llmserve.errors import ConfigError
from llmserve.gpus import gib
from llmserve.residency import HOST, Level

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from llmserve.config import Config, ModelSpec
    from llmserve.residency import Takes
    from llmserve.space import Keep

_BESIDE = 2 << 30  # of an engine besides weights and KV cache: two processes with their libraries
_KV_CACHE = 1 << 30  # where a registry says nothing, as `engine` does


class HostSpace:
    """`weights` are bytes by model; nobody sleeps here, since a sleeper would give nothing back."""

    def __init__(self, config: Config, weights: Mapping[str, int]) -> None:
        budget = config.server.host_memory
        self.capacity: Takes = {} if budget is None else {HOST: int(budget)}
        self._weights = weights

    @classmethod
    def of(cls, config: Config) -> HostSpace:
        """Checked: raises ConfigError if what is to run at once does not fit. Blocks."""
        weights = {} if config.server.host_memory is None else survey.weights(config)
        space = cls(config, weights)
        space._unless_too_much(config)
        return space

    def holds(self, spec: ModelSpec, number: int) -> Mapping[Level, Takes]:
        del number  # replicas are alike
        kv_cache = int(spec.kv_cache or _KV_CACHE)
        size = int(spec.memory or self._weights.get(spec.name, 0) + kv_cache + _BESIDE)
        return {Level.READY: {HOST: size}}

    def _unless_too_much(self, config: Config) -> None:
        if self.capacity and (problems := list(self._problems(config))):
            raise ConfigError(problems)

    def _problems(self, config: Config) -> Iterator[str]:
        """Of those that run at once, who is too much; of the others, who finds no place."""
        pinned = sum(self._needs(spec) for spec in config.models if spec.pinned)
        free = self.capacity[HOST]
        for spec in config.models:
            if spec.start == "eager":
                left, free = free, free - self._needs(spec)
            else:
                left = self.capacity[HOST] - pinned + (self._needs(spec) if spec.pinned else 0)
            if self._needs(spec) > left:
                yield config.told(
                    ("models", spec.name),
                    f"needs {gib(self._needs(spec))}, and of server.host_memory "
                    f"{gib(self.capacity[HOST])} are left {gib(max(0, left))}; what would fit: "
                    "`start: lazy`, a smaller kv_cache, or more host_memory",
                )

    def _needs(self, spec: ModelSpec) -> int:
        return self.holds(spec, 0)[Level.READY][HOST] * spec.replicas

    def planned(self, config: Config, kept: Mapping[str, str]) -> Callable[[], None]:
        """The budget of another registry. Raises ConfigError."""
        del kept  # they hold what they hold
        other = HostSpace.of(config)
        return lambda: vars(self).update(vars(other))

    def sleeps(self, spec: ModelSpec, number: int) -> bool:
        del spec, number
        return False

    @contextlib.asynccontextmanager
    async def start(self, spec: ModelSpec, number: int) -> AsyncIterator[tuple[ModelSpec, Keep]]:
        del number
        yield spec, lambda _: None

    def expecting(self, spec: ModelSpec, number: int) -> AbstractContextManager[None]:
        del spec, number  # nobody sleeps here
        return contextlib.nullcontext()

    @contextlib.asynccontextmanager
    async def moves(
        self, spec: ModelSpec, number: int, wakes_from: Level | None
    ) -> AsyncIterator[None]:
        del spec, number, wakes_from
        yield
