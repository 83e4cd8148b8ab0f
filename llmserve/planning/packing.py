"""Who is where on the GPUs of a box, and the search for better places. Pure.

Items are placed greedily, the largest first (longest processing time; Graham 1969). Local search
then evens that out: a few GPUs, the fullest or the emptiest among them, are emptied and packed
anew as long as it helps (large neighbourhood search; Shaw 1998). Each such packing is found by
branch and bound, depth first (Land and Doig 1960): the least sum of squares of uses, and of what
is wrong with places. Effort is a count of steps, so that every machine ends alike.
"""

from __future__ import annotations

import itertools
import math
from copy import copy
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

    from llmserve.gpus.device import Box, Gpu

BALANCE = 1.10  # largest to smallest use of a GPU that is even enough

# What a place costs beside unevenness, which costs about one for each full GPU.
_UNLINKED = 1e6  # a group over GPUs that are not linked
_TOGETHER = 1e3  # two replicas of one model on a GPU
_CROOKED = 1e-2  # a group such as 1-2, which spoils 0-1 and 2-3
_GAIN = 1e-7  # less is rounding

# Effort, in places that are weighed: some microseconds each.
_REPACK = 1_000  # for a few GPUs
_EXACT = 20_000  # for all of a small box
_EVEN = 60_000  # for all repacking
_SETUP = 15  # for packing anew at all
_SMALL = 8  # GPUs of a small box
_GROUPS = 32  # groups among some GPUs; were there more, only those of neighbours
_LEFT = 12  # items left, at most, for which room is made

Group = tuple[int, ...]  # positions in the box, ascending


@dataclass(frozen=True, eq=False)
class Item:
    """A replica as something to pack: on so many GPUs, with so many bytes on each."""

    name: str
    model: str  # whose replicas are kept apart
    devices: int
    takes: tuple[int, ...]  # bytes on each GPU of the box, if it is there

    @cached_property
    def size(self) -> int:
        """Bytes on one of its devices, at most."""
        return max(self.takes)

    @property
    def least(self) -> int:
        """Bytes on all its devices together, at least."""
        return self.devices * min(self.takes)

    def like(self, other: Item) -> bool:
        return (self.model, self.devices, self.takes) == (other.model, other.devices, other.takes)


def by_devices(item: Item) -> tuple[int, int, str]:
    return -item.devices, -item.size, item.name


def by_size(item: Item) -> tuple[int, int, str]:
    return -item.size, -item.devices, item.name


@dataclass
class Effort:
    """What is left of the steps that a search may take."""

    left: int


class Topology:
    """The GPUs of a box as places for groups. `linked`: of linked ones, where there are any."""

    def __init__(self, box: Box, *, linked: bool) -> None:
        self._box = box
        self._linked = linked
        self.everywhere = tuple(range(len(box)))
        self._kinds = self._parted(lambda gpu: gpu.kind)
        self._islands = self._parted(lambda gpu: (gpu.kind, gpu.island))
        self.all_linked = len(self._islands) == len(self._kinds)
        self.aligned = cache(self._aligned)
        self.among = cache(self._among)
        self.flaws = cache(self._flaws)

    def unlinked(self) -> Topology:
        return Topology(self._box, linked=False)

    def pools(self, devices: int) -> list[Group]:
        """GPUs of which any so many make a group."""
        found = [pool for pool in self._islands if len(pool) >= devices]
        if found and self._linked:
            return found
        return [pool for pool in self._kinds if len(pool) >= devices]

    def _parted(self, key: Callable[[Gpu], Hashable]) -> list[Group]:
        parts: dict[Hashable, list[int]] = {}
        for g, gpu in enumerate(self._box):
            parts.setdefault(key(gpu), []).append(g)
        return [tuple(part) for part in parts.values()]

    def _aligned(self, devices: int) -> list[Group]:
        """Groups that leave whole groups beside them."""
        return [
            pool[first : first + devices]
            for pool in dict.fromkeys((*self._islands, *self.pools(devices)))
            for first in range(0, len(pool) - devices + 1, devices)
        ]

    def _among(self, some: Group, devices: int) -> list[Group]:
        """Groups of these GPUs; of very many, the aligned ones and those of neighbours."""
        groups = [group for group in self.aligned(devices) if set(some).issuperset(group)]
        for pool in self.pools(devices):
            members = [g for g in pool if g in some]
            if math.comb(len(members), devices) <= _GROUPS:
                groups += itertools.combinations(members, devices)
            else:
                groups += zip(*(members[first:] for first in range(devices)), strict=False)
        return list(dict.fromkeys(groups))

    def _flaws(self, group: Group) -> float:
        """What a group costs in itself."""
        apart = not any(set(island).issuperset(group) for island in self._islands)
        crooked = group not in self.aligned(len(group))
        return _UNLINKED * apart + _CROOKED * crooked


class Packing:
    """Items in their places, beside what cannot be moved."""

    def __init__(self, box: Box, limits: Sequence[int]) -> None:
        self.topology = Topology(box, linked=True)
        self.limits = limits  # bytes on each GPU
        self.memory = [gpu.memory for gpu in box]
        self.loads = [0] * len(box)
        self.models: list[list[str]] = [[] for _ in box]
        self.where: dict[Item, Group] = {}
        self.left: list[Item] = []  # for which there was no room
        mean = sum(self.memory) / max(1, len(box))
        # Weighted so, the squares of loads have the least sum where all uses are the same.
        self._weights = [1 / (memory * mean) for memory in self.memory]

    def copy(self) -> Packing:
        other = copy(self)
        other.loads, other.where, other.left = list(self.loads), dict(self.where), list(self.left)
        other.models = [list(models) for models in self.models]
        return other

    def unlinked(self) -> Packing:
        """A copy in which no group has to be linked."""
        other = self.copy()
        other.topology = self.topology.unlinked()
        return other

    def room(self, g: int) -> int:
        return self.limits[g] - self.loads[g]

    def use(self, g: int) -> float:
        return self.loads[g] / self.memory[g]

    def mean_use(self) -> float:
        return sum(self.loads) / sum(self.memory)

    def is_even(self) -> bool:
        uses = [self.use(g) for g in self.topology.everywhere]
        return max(uses) <= BALANCE * min(uses)

    def crowded(self) -> list[int]:
        """The GPUs with two replicas of a model."""
        return [g for g, models in enumerate(self.models) if len(set(models)) < len(models)]

    def fix(self, item: Item, group: Group) -> None:
        """Puts it there for good."""
        for g in group:
            self.loads[g] += item.takes[g]
            self.models[g].append(item.model)

    def put(self, item: Item, group: Group) -> None:
        self.fix(item, group)
        self.where[item] = group

    def lift(self, item: Item) -> Group:
        group = self.where.pop(item)
        for g in group:
            self.loads[g] -= item.takes[g]
            self.models[g].remove(item.model)
        return group

    def cost(self, item: Item, group: Group, *, tight: bool = False) -> float:
        """Of the item there: what is wrong with the place, and unevenness (`tight`: evenness)."""
        loads, takes, weights = self.loads, item.takes, self._weights
        together = strain = 0.0
        for g in group:
            together += self.models[g].count(item.model)
            strain += (2 * loads[g] + takes[g]) * takes[g] * weights[g]
        return self.topology.flaws(group) + _TOGETHER * together + (-strain if tight else strain)

    def best(self, item: Item, *, tight: bool = False) -> Group | None:
        """The group with room that costs least; `tight`: where the least room is left."""
        groups = self._roomy(item, tight=tight)
        costs = [(self.cost(item, group, tight=tight), group) for group in groups]
        return min(costs)[1] if costs else None

    def _roomy(self, item: Item, *, tight: bool) -> list[Group]:
        each = zip(self.topology.everywhere, self.loads, item.takes, self.limits, strict=True)
        roomy = {g for g, load, take, limit in each if load + take <= limit}
        groups = self.topology.aligned(item.devices)
        if aligned := [group for group in groups if roomy.issuperset(group)]:
            return aligned
        sign = -1 if tight else 1
        pools = (
            sorted(roomy.intersection(pool), key=lambda g: (sign * self.use(g), g))
            for pool in self.topology.pools(item.devices)
        )
        return [tuple(sorted(pool[: item.devices])) for pool in pools if len(pool) >= item.devices]

    def within(self, some: Group) -> list[Item]:
        """What is on these GPUs and no others."""
        inside = set(some)
        return [item for item, group in self.where.items() if inside.issuperset(group)]


class _Search:
    """Branch and bound, depth first, over the places of some items among some GPUs.

    What is within the GPUs is lifted at once, and is put where it was if nothing better is found.
    """

    def __init__(
        self, packing: Packing, some: Group, effort: Effort, *more: Item, steps: int = _REPACK
    ) -> None:
        self.cost = 0.0  # of how it was
        self.below = math.inf  # what costs less is looked for
        self.first = False  # whether the first will do, or it has to be the best
        self.ceilings: Sequence[float] = packing.limits  # bytes on each GPU
        self.floors: Sequence[float] | None = None
        self._packing = packing
        self._some = some
        self._effort = effort
        self._end = max(0, effort.left - steps)
        self._places: dict[Item, Group] = {}
        for item in packing.within(some):
            self._places[item] = packing.lift(item)
            self.cost += packing.cost(item, self._places[item])
        self._items = sorted([*self._places, *more], key=by_devices)
        most = (item.devices * item.size for item in reversed(self._items))
        self._coming = [0, *itertools.accumulate(most)][::-1]  # bytes, at most
        self._found = False

    def run(self) -> bool:
        """Whether a way was found that costs less than `below`; it was taken then."""
        if self.below > 0:
            self._descend(0, 0.0)
        for item, group in self._places.items():
            self._packing.put(item, group)
        return self._found

    def _descend(self, depth: int, cost: float) -> None:
        if depth == len(self._items):
            self.below = cost - _GAIN
            self._places = {item: self._packing.where[item] for item in self._items}
            self._found = True
            return
        item = self._items[depth]
        for more, group in self._ways(depth):
            done = self._found and self.first
            if done or cost + more >= self.below or self._effort.left <= self._end:
                return
            self._packing.put(item, group)
            if self._can_be_even(depth + 1):
                self._descend(depth + 1, cost + more)
            self._packing.lift(item)

    def _ways(self, depth: int) -> list[tuple[float, Group]]:
        """The groups with room and their costs, the least first; of equal ones, one."""
        item = self._items[depth]
        packing, loads, ceilings = self._packing, self._packing.loads, self.ceilings
        groups = packing.topology.among(self._some, item.devices)
        self._effort.left -= len(groups)
        twin = self._items[depth - 1] if depth else None
        after = packing.where[twin] if twin is not None and twin.like(item) else ()
        ways: dict[Hashable, tuple[float, Group]] = {}
        for group in groups:
            if group < after or any(loads[g] + item.takes[g] > ceilings[g] for g in group):
                continue
            g = group[0]
            # Groups are placed first, so for the rest GPUs of the same state are the same.
            state = (packing.memory[g], loads[g], *packing.models[g])
            key = state if item.devices == 1 else group
            ways.setdefault(key, (packing.cost(item, group), group))
        return sorted(ways.values())

    def _can_be_even(self, depth: int) -> bool:
        if self.floors is None:
            return True
        loads = self._packing.loads
        return self._coming[depth] >= sum(max(0.0, self.floors[g] - loads[g]) for g in self._some)


# --- what fits


def pack(items: Sequence[Item], empty: Packing, effort: Effort) -> Packing:
    """The largest first, each in its best place; then room is made for what is left."""
    tried = []
    for order, tight in ((by_devices, False), (by_size, False), (by_devices, True)):
        packing = _greedy(sorted(items, key=order), empty, tight=tight)
        effort.left -= len(items) * (1 + len(packing.loads) // 3)
        if not packing.left:
            return packing
        tried.append(packing)
    best = fewest_left(tried)
    if len(best.left) <= _LEFT:
        best.left = [item for item in best.left if not _squeezed(best, item, effort)]
    return best


def fewest_left(packings: Iterable[Packing]) -> Packing:
    return min(packings, key=lambda packing: len(packing.left))


def _greedy(items: Iterable[Item], empty: Packing, *, tight: bool) -> Packing:
    packing = empty.copy()
    for item in items:
        if (group := packing.best(item, tight=tight)) is None:
            packing.left.append(item)
        else:
            packing.put(item, group)
    return packing


def _squeezed(packing: Packing, item: Item, effort: Effort) -> bool:
    """Whether one more was packed, with what is there on some GPUs packed anew."""
    for some in _roomiest(packing, item):
        if effort.left <= 0:
            return False
        if sum(map(packing.room, some)) < item.least:
            continue
        effort.left -= _SETUP
        search = _Search(packing, some, effort, item)
        search.first = True
        if search.run():
            return True
    return False


def _roomiest(packing: Packing, item: Item) -> Iterator[Group]:
    """Some GPUs among which there may be room for an item."""
    everywhere = packing.topology.everywhere
    by_room = sorted(everywhere, key=lambda g: (-packing.room(g), g))
    groups = packing.topology.aligned(item.devices)
    groups = sorted(groups, key=lambda group: (-sum(map(packing.room, group)), group))
    for more in (1, 2, 3, item.devices + 1, 2 * item.devices + 1):
        for group in groups[:4]:
            yield _union(group, [g for g in by_room if g not in group][:more])
    if len(everywhere) <= _SMALL:
        yield everywhere


# --- what is even


def even_out(packing: Packing) -> None:
    """Packs a few GPUs anew at a time until all are used evenly, or as evenly as was found."""
    if not packing.where:
        return
    effort = Effort(_EVEN)
    while not packing.is_even() or packing.crowded():
        if not any(_improved(packing, some, effort) for some in _suspects(packing)):
            break
    if len(packing.loads) <= _SMALL and not packing.is_even():
        _make_even(packing)


def _improved(packing: Packing, some: Group, effort: Effort) -> bool:
    """Whether what is within these GPUs was packed better."""
    if effort.left <= 0:
        return False
    effort.left -= _SETUP
    search = _Search(packing, some, effort)
    search.below = search.cost - _GAIN
    return search.run()


def _make_even(packing: Packing) -> None:
    """Packs everything such that all uses are even, if nothing else gets worse by that."""
    even = [packing.mean_use() * size for size in packing.memory]
    search = _Search(packing, packing.topology.everywhere, Effort(_EXACT), steps=_EXACT)
    search.below = search.cost + _TOGETHER / 2
    search.first = True
    search.floors = [load / BALANCE for load in even]
    search.ceilings = [
        min(limit, load * BALANCE) for limit, load in zip(packing.limits, even, strict=True)
    ]
    search.run()


def _suspects(packing: Packing) -> Iterator[Group]:
    """A few GPUs each time, one of which is why it is uneven."""
    by_use = sorted(packing.topology.everywhere, key=lambda g: (packing.use(g), g))
    cold, hot = by_use[0], by_use[-1]
    reasons = [*packing.crowded(), hot]
    for one in reasons:
        yield from (_union((one,), (g,)) for g in by_use if g != one)
    yield from (_union((cold,), (g,)) for g in reversed(by_use) if g != cold)
    for one in reasons:
        for group in dict.fromkeys(packing.where.values()):
            if one in group and len(group) > 1:
                others = packing.topology.aligned(len(group))
                others = sorted(others, key=lambda other: (sum(map(packing.use, other)), other))
                yield from (_union(group, other) for other in others)
    # Of three and four, those near each other in use first: a different mix each time.
    for size in (2, 3):
        for apart in range(1, len(by_use)):
            for some in zip(*(by_use[k * apart :] for k in range(size)), strict=False):
                yield from (_union((one,), some) for one in (hot, cold))


def _union(one: Iterable[int], other: Iterable[int]) -> Group:
    return tuple(sorted({*one, *other}))
