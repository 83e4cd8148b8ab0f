"""Which replicas are evicted, and to which level, so that another fits. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from llmserve.lifecycle.placement import Level

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llmserve.lifecycle.placement import Place, Takes

K = TypeVar("K")


@dataclass(frozen=True)
class Resident(Generic[K]):
    """A holder of memory."""

    key: K
    level: Level
    holds: Mapping[Level, Takes]  # at each level besides STOPPED
    evictable: bool
    value: tuple[float, ...] = ()  # of its memory: the lowest is evicted first

    def at(self, level: Level) -> Takes:
        return self.holds.get(level, {})


Steps = list[tuple[K, Level]]


def plan_eviction(
    needed: Takes, capacity: Takes, residents: Sequence[Resident[K]]
) -> Steps[K] | None:
    """The residents to lower, with their levels, so that `needed` fits; None if it cannot fit.

    The least valuable residents are lowered first. None is lowered further than necessary.
    Places without a capacity are not bounded.
    """
    trial = _Trial(needed, capacity, residents)
    order = [i for i, one in enumerate(residents) if one.evictable]
    order.sort(key=lambda i: residents[i].value)
    for i in order:
        if not trial.excess():
            break
        trial.lower(i)
    if trial.excess():
        return None
    before: list[Level] = []
    while before != trial.levels:  # memory that one resident frees may be enough for another
        before = trial.levels.copy()
        for i in reversed(order):
            trial.lift(i)
    changed = zip(residents, trial.levels, strict=True)
    return [(one.key, level) for one, level in changed if level is not one.level]


class _Trial(Generic[K]):
    """Levels of the residents under trial."""

    def __init__(self, needed: Takes, capacity: Takes, residents: Sequence[Resident[K]]) -> None:
        self._needed = needed
        self._capacity = capacity
        self._residents = residents
        self.levels = [one.level for one in residents]

    def excess(self) -> int:
        """Bytes beyond the capacities, over all places."""
        return sum(self._excess_at(place) for place in self._capacity)

    def _excess_at(self, place: Place) -> int:
        pairs = zip(self._residents, self.levels, strict=True)
        held = sum(one.at(level).get(place, 0) for one, level in pairs)
        return max(0, held + self._needed.get(place, 0) - self._capacity[place])

    def _excess_with(self, i: int, level: Level) -> int:
        before, self.levels[i] = self.levels[i], level
        excess = self.excess()
        self.levels[i] = before
        return excess

    def _levels_of(self, i: int) -> list[Level]:
        """Its present level and those below, highest first."""
        one = self._residents[i]
        return sorted({level for level in (Level.STOPPED, *one.holds) if level <= one.level})[::-1]

    def lower(self, i: int) -> None:
        """Lower it to the highest level at which all fits, or else at which the excess is least."""
        self.levels[i] = min(self._levels_of(i), key=lambda level: self._excess_with(i, level))

    def lift(self, i: int) -> None:
        """Raise it as far as all still fits."""
        levels = self._levels_of(i)
        self.levels[i] = next(level for level in levels if not self._excess_with(i, level))
