"""The GPUs of a replica, and its memory there at each level. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from llmserve.planning.plan import PlannedReplica


class Level(IntEnum):
    """The higher the level, the sooner a replica is ready and the more memory it holds."""

    STOPPED = 0  # no engine
    DISK = 1  # an engine without weights; a wake reads them again (vLLM's sleep level 2)
    HOST = 2  # weights in host memory (level 1)
    KV_RELEASED = 3  # all but the KV cache is on the GPU
    READY = 4


class Place(NamedTuple):
    """One memory: that of a GPU, or that of the host."""

    gpu: int | None  # its index; None: the host

    def __str__(self) -> str:
        return "server.host_memory" if self.gpu is None else f"GPU {self.gpu}"


HOST_MEMORY = Place(gpu=None)
Takes: TypeAlias = Mapping[Place, int]  # bytes


@dataclass(frozen=True)
class Placement:
    """The placement of one replica, as a memory budget assigned it.

    A replica keeps it as long as its engine lives, independently of later plans.
    """

    number: int  # of the model's replicas, from 0
    holds: Mapping[Level, Takes]  # at each of its levels besides STOPPED
    planned: PlannedReplica | None = None  # None: no GPU was planned

    @property
    def sleeps(self) -> bool:
        """Whether its engine needs sleep mode."""
        return any(level < Level.READY for level in self.holds)
