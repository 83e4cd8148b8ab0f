"""Which models are evicted, and how far down, so that another fits. Pure."""

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
    """Somebody who holds memory."""

    key: K
    level: Level
    holds: Mapping[Level, Takes]  # at each level that it can be at; none at STOPPED
    gives_way: bool
    worth: tuple[float, ...] = ()  # of staying: the lowest gives way first

    def at(self, level: Level) -> Takes:
        return self.holds.get(level, {})


Steps = list[tuple[K, Level]]


def room(wanted: Takes, capacity: Takes, residents: Sequence[Resident[K]]) -> Steps[K] | None:
    """Who goes down to which level so that `wanted` fits; None if nobody who may makes it fit.

    Those worth least go first, none further than it must, and none that need not. Places
    without a capacity are not bounded.
    """
    box = _Box(wanted, capacity, residents)
    order = [i for i, one in enumerate(residents) if one.gives_way]
    order.sort(key=lambda i: residents[i].worth)
    for i in order:
        if not box.excess():
            break
        box.lower(i)
    if box.excess():
        return None
    before: list[Level] = []
    while before != box.levels:  # what one gives back may be what another lacked
        before = box.levels.copy()
        for i in reversed(order):
            box.lift(i)
    changed = zip(residents, box.levels, strict=True)
    return [(one.key, level) for one, level in changed if level is not one.level]


class _Box(Generic[K]):
    """Levels under trial."""

    def __init__(self, wanted: Takes, capacity: Takes, residents: Sequence[Resident[K]]) -> None:
        self._wanted = wanted
        self._capacity = capacity
        self._residents = residents
        self.levels = [one.level for one in residents]

    def excess(self) -> int:
        """Bytes beyond the capacities, over all places."""
        return sum(self._excess_at(place) for place in self._capacity)

    def _excess_at(self, place: Place) -> int:
        pairs = zip(self._residents, self.levels, strict=True)
        taken = sum(one.at(level).get(place, 0) for one, level in pairs)
        return max(0, taken + self._wanted.get(place, 0) - self._capacity[place])

    def _with(self, i: int, level: Level) -> int:
        before, self.levels[i] = self.levels[i], level
        excess = self.excess()
        self.levels[i] = before
        return excess

    def _levels_of(self, i: int) -> list[Level]:
        """Those it may go to, highest first."""
        one = self._residents[i]
        return sorted({level for level in (Level.STOPPED, *one.holds) if level <= one.level})[::-1]

    def lower(self, i: int) -> None:
        """To the highest level with which all fits, or that with which the least is too much."""
        self.levels[i] = min(self._levels_of(i), key=lambda level: self._with(i, level))

    def lift(self, i: int) -> None:
        """As high as all still fits."""
        self.levels[i] = next(level for level in self._levels_of(i) if not self._with(i, level))
