"""The search for good places of replicas on the GPUs of a box. Pure.

`pack` places replicas greedily, the largest first (longest processing time; Graham 1969). Local
search improves the result: it empties a few GPUs and repacks their replicas (large
neighbourhood search; Shaw 1998). Branch and bound finds the cheapest such packing (Land and Doig
1960). Effort is a count of steps, so every machine finds the same places.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from llmserve.planning.packing import Demand, Group, Option, Packing

_GAIN = 1e-7  # smaller differences are rounding errors
# Effort, in groups that are weighed: some microseconds each.
_PACK = 20_000  # to place all
_EVEN = 40_000  # to even out
_REPACK = 1_000  # to repack a few GPUs
_SETUP = 15  # to begin with that
_STARTS = 16  # greedy packings
_SMALL = 8  # GPUs of a box that is also repacked as a whole
_LEFT = 12  # demands for which room is made


class _Repacking:
    """Branch and bound, depth first, over the places of some demands among some GPUs."""

    def __init__(self, packing: Packing, some: Group, *more: Demand, fixed: bool = False) -> None:
        self._packing = packing
        self._some = some
        self._end = packing.steps + _REPACK
        self._best: dict[Demand, tuple[Option, Group]] = {}
        self._levels: dict[Demand, list[int]] = {}
        inside = [d for d, (_, group) in packing.where.items() if set(some).issuperset(group)]
        cost = 0.0
        for demand in inside:
            self._best[demand] = option, group = packing.lift(demand)
            cost += next(packing.costs(demand, option, [group]))
            if fixed:
                self._levels[demand] = [demand.options.index(option)]
        self._below = math.inf if more else cost - _GAIN
        self._demands = sorted([*inside, *more], key=_by_size)
        self.found = False
        packing.steps += _SETUP
        if self._below > 0:
            self._descend(0, 0.0)
        for demand, (option, group) in self._best.items():
            packing.put(demand, option, group)

    def _descend(self, depth: int, cost: float) -> None:
        packing = self._packing
        if depth == len(self._demands):
            self._below = cost - _GAIN
            self._best = {demand: packing.where[demand] for demand in self._demands}
            self.found = True
            return
        demand = self._demands[depth]
        twin = self._demands[depth - 1] if depth else demand
        is_twin = depth and (twin.model, twin.options) == (demand.model, demand.options)
        after = packing.where[twin][1] if is_twin else ()
        levels = self._levels.get(demand, range(len(demand.options)))
        for more, level, group in packing.ways(demand, levels, self._some, self._below - cost):
            if cost + more >= self._below or packing.steps > self._end:
                return
            if group < after:
                continue
            packing.put(demand, demand.options[level], group)
            self._descend(depth + 1, cost + more)
            packing.lift(demand)


def _by_size(demand: Demand) -> tuple[int, int, str]:
    option = demand.options[0]
    return -option.devices, -option.needs, demand.name


def pack(demands: Sequence[Demand], packing: Packing) -> None:
    """Place demands, as many as are found to fit.

    Each attempt begins with more devices for the largest demands.
    """
    best: dict[Demand, tuple[Option, Group]] = {}
    fewest = len(demands) + 1
    end = packing.steps + _PACK
    room = sum(max(0, packing.room(g)) for g in packing.topology.everywhere)
    is_hopeless = sum(packing.topology.least(demand) for demand in demands) > room
    for start, tight in itertools.product(_starts(demands), (False, True)):
        packing.restore({})
        left = _greedy(start, packing, tight=tight)
        if len(left) <= _LEFT:
            left = [demand for demand in left if not _squeezed(packing, demand, end)]
        if len(left) < fewest:
            best, fewest = dict(packing.where), len(left)
        if not left or is_hopeless or packing.steps > end:
            break
    packing.restore(best)


def _starts(demands: Sequence[Demand]) -> Iterator[list[tuple[Demand, Option]]]:
    """Return the demands in the order of a greedy packing, with the option to begin with."""
    sizes = sorted({o.needs for demand in demands for o in demand.options}, reverse=True)
    seen = set()
    for limit in sizes[:: -(-len(sizes) // _STARTS) or 1]:
        start = [
            (demand, next((o for o in demand.options if o.needs <= limit), demand.options[-1]))
            for demand in demands
        ]
        if (options := tuple(option for _, option in start)) not in seen:
            seen.add(options)
            yield sorted(start, key=lambda each: (-each[1].devices, -each[1].needs, each[0].name))


def _greedy(
    start: Iterable[tuple[Demand, Option]], packing: Packing, *, tight: bool
) -> list[Demand]:
    """Place each in its best place; return those without room."""
    left = []
    packing.tight = tight
    for demand, option in start:
        place = packing.best(demand, option.devices)
        if place is None:
            left.append(demand)
        else:
            packing.put(demand, *place)
    packing.tight = False
    return left


def _squeezed(packing: Packing, demand: Demand, end: int) -> bool:
    """Place one more, with some GPUs repacked; return whether that was possible."""
    least = packing.topology.least(demand)
    return any(
        _Repacking(packing, some, demand).found
        for some in _roomiest(packing, demand.options[0])
        if packing.steps < end and sum(map(packing.room, some)) >= least
    )


def _roomiest(packing: Packing, option: Option) -> Iterator[Group]:
    """Some GPUs among which there may be room for an option."""
    everywhere = packing.topology.everywhere
    by_room = sorted(everywhere, key=lambda g: (-packing.room(g), g))
    groups = packing.topology.aligned(option.devices)
    groups = sorted(groups, key=lambda group: (-sum(map(packing.room, group)), group))
    for more in (1, 2, 3, option.devices + 1, 2 * option.devices + 1):
        for group in groups[:4]:
            yield _union(group, [g for g in by_room if g not in group][:more])
    if len(everywhere) <= _SMALL:
        yield everywhere


def even_out(packing: Packing) -> None:
    """Repack a few GPUs at a time until all are used evenly and no change helps."""
    end = packing.steps + _PACK
    while any(_Repacking(packing, some).found for some in _widest(packing) if packing.steps < end):
        pass
    end = packing.steps + _EVEN
    while any(
        _Repacking(packing, some, fixed=True).found
        for some in _suspects(packing)
        if packing.steps < end
    ):
        pass


def _widest(packing: Packing) -> Iterator[Group]:
    """Return the GPUs of each demand that has more than the fewest devices, and some others."""
    for demand, (option, group) in list(packing.where.items()):
        if option is not demand.options[0]:
            yield from (_union(group, some) for some in _roomiest(packing, demand.options[0]))


def _suspects(packing: Packing) -> Iterator[Group]:
    """Return a few GPUs each time, one of which is why the packing costs more than it could."""
    by_use = sorted(packing.topology.everywhere, key=lambda g: (packing.use(g), g))
    crowded = [g for g, models in enumerate(packing.models) if len(set(models)) < len(models)]
    if not packing.where or (packing.is_even() and not crowded):
        return
    cold, hot = by_use[0], by_use[-1]
    for one in (*crowded, hot):
        yield from (_union((one,), (g,)) for g in by_use if g != one)
        for group in dict.fromkeys(group for _, group in packing.where.values()):
            if one in group and len(group) > 1:
                others = packing.topology.aligned(len(group))
                others = sorted(others, key=lambda other: (sum(map(packing.use, other)), other))
                yield from (_union(group, other) for other in others)
    yield from (_union((cold,), (g,)) for g in reversed(by_use) if g != cold)
    # Of three, those near each other in use first: a different mix each time.
    for apart in range(1, len(by_use)):
        for some in zip(by_use, by_use[apart:], strict=False):
            yield from (_union((one,), some) for one in (hot, cold))


def _union(one: Iterable[int], other: Iterable[int]) -> Group:
    return tuple(sorted({*one, *other}))
