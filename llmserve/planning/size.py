"""The bytes of a replica on each GPU, by its degree of tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmserve.gpus.device import gib

if TYPE_CHECKING:
    from llmserve.planning.memory_model import Settings


@dataclass(frozen=True)
class ReplicaFootprint:
    """A replica at one degree of tensor parallelism. Bytes are those on each device."""

    settings: Settings
    weights: int
    overhead: int
    least: int  # KV cache that it must have; 0: an encoder
    most: int  # KV cache that it can use
    fingerprint: str
    measured: bool

    @property
    def besides(self) -> int:
        return self.weights + self.overhead

    @property
    def needs(self) -> int:
        return self.besides + self.least

    def describe(self, concurrency: int) -> str:
        times = f"{concurrency} x " if concurrency > 1 else ""
        kv = f", KV cache of {times}{self.settings.context:,} tokens {gib(self.least)}"
        return (
            f"{gib(self.needs)} (weights {gib(self.weights)}, activations and graphs "
            f"{gib(self.overhead)}{kv if self.least else ''})"
        )
