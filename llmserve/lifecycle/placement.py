"""Where a replica runs, and the memory that it takes there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmserve.lifecycle.eviction import Level

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmserve.lifecycle.eviction import Takes
    from llmserve.planning.plan import PlannedReplica


@dataclass(frozen=True)
class Placement:
    """The place of one replica, as a memory budget assigned it.

    A replica keeps its placement as long as its engine lives, whatever a later plan says.
    """

    number: int  # of the model's replicas, from 0
    holds: Mapping[Level, Takes]  # bytes at each level that it can be at besides STOPPED
    planned: PlannedReplica | None = None  # None: no GPU was planned

    @property
    def sleeps(self) -> bool:
        """Whether its engine needs sleep mode."""
        return any(level < Level.READY for level in self.holds)
