"""Which GPUs a replica gets. Pure: demands and GPUs in, placement out.

Explicit devices come first. The rest is placed greedily, with the fewest devices each with which
the whole fits, and is then made even by packing a few GPUs anew at a time. What is left of the
GPUs is shared out at the end. Effort is a count of steps, so that every machine ends alike.
"""

from __future__ import annotations

import heapq
import itertools
import math
from copy import copy
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

    from llmserve.gpus import Box, Gpu

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
_FIT = 20_000  # for trying options, for a small box
_SMALL = 8  # GPUs of a small box
_FEW = 12  # demands of which options are tried in the order of their devices,
_TRIES = 200  # so many times
_RUNGS = 16  # tries with more demands
_SETUP = 15  # for packing anew at all
_GROUPS = 32  # groups among some GPUs; were there more, only those of neighbours

_Group = tuple[int, ...]  # positions in the box, ascending


@dataclass(frozen=True)
class Option:
    """One way to run a replica: on so many GPUs, with so much on each of them."""

    devices: int
    needs: int  # bytes on each device, at least
    share: float = 0.0  # of each device's memory, at least

    def on(self, gpu: Gpu) -> int:
        """The bytes that it takes there."""
        return max(self.needs, int(self.share * gpu.memory))


@dataclass(frozen=True)
class Demand:
    """A replica that wants GPUs."""

    name: str  # "chat", or "chat/1" for the second replica
    options: tuple[Option, ...]  # fewest devices first
    devices: tuple[int, ...] | None = None  # indices that the registry says; None: choose
    grows: int = 0  # weight in sharing out what is left of its GPUs, bytes; 0: takes none
    at_most: int | None = None  # bytes on each device that it can use besides `needs`

    @property
    def model(self) -> str:
        model, _, number = self.name.rpartition("/")
        return model if model and number.isdecimal() else self.name


@dataclass(frozen=True)
class Placed:
    devices: tuple[int, ...]
    option: Option
    extra: int = 0  # bytes on each device from what was left


@dataclass(frozen=True)
class Misfit:
    """A demand that found no place.

    `free` is in the order of the box: for explicit devices, what those before left of the whole
    memory; else what all that found a place left of the capacity.
    """

    demand: Demand
    free: tuple[int, ...]  # bytes on each GPU


@dataclass(frozen=True)
class Placement:
    placed: dict[str, Placed]  # by the demand's name, in the order of the demands
    left: tuple[Misfit, ...]


def capacity(gpu: Gpu, headroom: float) -> int:
    """What may be given away of a GPU where we choose, in bytes."""
    return int(gpu.memory * (1 - headroom))


def place(
    demands: Sequence[Demand], box: Box, headroom: float, *, finish: bool = True
) -> Placement:
    """Fewest GPUs for each replica, even use of all, what is left shared out.

    Explicit devices are bounded by the GPU's whole memory, in the order of the demands, chosen
    ones by its capacity. Without `finish` only who finds a place counts: it is neither even
    nor shared out. Names of demands are unique.
    """
    placed, misfits = _explicit(demands, box)
    chosen = [demand for demand in demands if demand.devices is None]
    packing = _packed(chosen, _Packing(box, headroom, demands, placed))
    if finish:
        _even_out(packing)
    for item, group in packing.where.items():
        placed[item.demand.name] = Placed(tuple(box[g].index for g in group), item.option)
    free = tuple(max(0, packing.room(g)) for g in packing.field.everywhere)
    misfits |= {one.name: Misfit(one, free) for one in chosen if one.name not in placed}
    ordered = {one.name: placed[one.name] for one in demands if one.name in placed}
    if finish:
        ordered = fill(ordered, demands, box, headroom)
    return Placement(ordered, tuple(misfits[one.name] for one in demands if one.name in misfits))


def _explicit(demands: Iterable[Demand], box: Box) -> tuple[dict[str, Placed], dict[str, Misfit]]:
    placed: dict[str, Placed] = {}
    misfits: dict[str, Misfit] = {}
    gpus = {gpu.index: gpu for gpu in box}
    free = {gpu.index: gpu.memory for gpu in box}
    for demand in demands:
        if demand.devices is None:
            continue
        option = next((way for way in demand.options if way.devices == len(demand.devices)), None)
        if option is None or any(
            index not in gpus or option.on(gpus[index]) > free[index] for index in demand.devices
        ):
            misfits[demand.name] = Misfit(demand, tuple(free.values()))
            continue
        placed[demand.name] = Placed(demand.devices, option)
        for index in demand.devices:
            free[index] -= option.on(gpus[index])
    return placed, misfits


# --- what is left


def fill(
    placed: Mapping[str, Placed], demands: Iterable[Demand], box: Box, headroom: float
) -> dict[str, Placed]:
    """Shares out what is left: all grow in proportion to `grows` until a GPU of theirs is full.

    A replica that is at a full GPU, or has `at_most`, stops; the others go on. What was `extra`
    before is given anew. Progressive filling (max-min fairness; Bertsekas and Gallager, Data
    Networks, 6.5.2).
    """
    gpus = {gpu.index: gpu for gpu in box}
    room = {gpu.index: capacity(gpu, headroom) for gpu in box}
    for there in placed.values():
        for index in there.devices:
            room[index] -= there.option.on(gpus[index])
    growing = [
        _Growing(demand, placed[demand.name], gpus)
        for demand in demands
        if demand.grows and demand.name in placed
    ]
    active = growing
    while active:
        levels = _levels(active, room)
        lowest = min(levels)
        for one, level in zip(active, levels, strict=True):
            if level == lowest:
                one.grow(int(lowest * one.weight), room)
        active = [one for one, level in zip(active, levels, strict=True) if level > lowest]
    for one in growing:  # the few bytes that rounding down has left
        one.grow(one.most(room), room)
    extra = {one.name: one.extra for one in growing}
    return {name: replace(there, extra=extra.get(name, 0)) for name, there in placed.items()}


class _Growing:
    def __init__(self, demand: Demand, placed: Placed, gpus: Mapping[int, Gpu]) -> None:
        self.name = demand.name
        self.weight = demand.grows
        self.devices = placed.devices
        self.extra = 0
        self.limit: int | None = None
        if demand.at_most is not None:  # a share may have given some of it
            takes = max(placed.option.on(gpus[index]) for index in placed.devices)
            self.limit = max(0, placed.option.needs + demand.at_most - takes)

    def grow(self, more: int, room: dict[int, int]) -> None:
        self.extra += more
        for index in self.devices:
            room[index] -= more

    def most(self, room: Mapping[int, int]) -> int:
        more = max(0, min(room[index] for index in self.devices))
        return more if self.limit is None else min(more, self.limit - self.extra)


def _levels(active: Sequence[_Growing], room: Mapping[int, int]) -> list[Fraction]:
    """How far each could grow, in bytes per weight, if all others on its GPUs did so as well."""
    weights: dict[int, int] = {}
    for one in active:
        for index in one.devices:
            weights[index] = weights.get(index, 0) + one.weight
    full = {index: Fraction(max(0, room[index]), total) for index, total in weights.items()}
    levels = []
    for one in active:
        level = min(full[index] for index in one.devices)
        if one.limit is not None:
            level = min(level, Fraction(one.limit, one.weight))
        levels.append(level)
    return levels


# --- what is where


@dataclass(frozen=True, eq=False)
class _Item:
    """A demand by one of its options."""

    demand: Demand
    option: Option
    takes: tuple[int, ...]  # bytes on each GPU of the box

    @cached_property
    def devices(self) -> int:
        return self.option.devices

    @cached_property
    def model(self) -> str:
        return self.demand.model

    @cached_property
    def size(self) -> int:
        return max(self.takes)

    @cached_property
    def least(self) -> int:
        """Bytes on all its devices together, at least."""
        return self.devices * min(self.takes)

    def like(self, other: _Item) -> bool:
        return (self.model, self.devices, self.takes) == (other.model, other.devices, other.takes)


class _Field:
    """The GPUs of a box as places for groups. `linked`: of linked ones, where there are any."""

    def __init__(self, box: Box, *, linked: bool) -> None:
        self.box = box
        self.linked = linked
        self.everywhere = tuple(range(len(box)))
        self.singles: list[_Group] = [(g,) for g in self.everywhere]
        self.memory = [gpu.memory for gpu in box]
        mean = sum(self.memory) / max(1, len(box))
        # Weighted so, the squares of loads have the least sum where all uses are the same.
        self.weights = [1 / (memory * mean) for memory in self.memory]
        self._kinds = self._parted(lambda gpu: gpu.kind)
        self._islands = self._parted(lambda gpu: (gpu.kind, gpu.island))
        self._island = {g: number for number, pool in enumerate(self._islands) for g in pool}
        self._aligned: dict[int, list[_Group]] = {}
        self._among: dict[tuple[int, _Group], list[_Group]] = {}
        self._flaws: dict[_Group, float] = {}

    def _parted(self, key: Callable[[Gpu], Hashable]) -> list[_Group]:
        parts: dict[Hashable, list[int]] = {}
        for g, gpu in enumerate(self.box):
            parts.setdefault(key(gpu), []).append(g)
        return [tuple(part) for part in parts.values()]

    @property
    def all_linked(self) -> bool:
        return len(self._islands) == len(self._kinds)

    def pools(self, devices: int) -> list[_Group]:
        """GPUs of which any so many make a group."""
        found = [pool for pool in self._islands if len(pool) >= devices]
        if found and (self.linked or devices == 1):
            return found
        return [pool for pool in self._kinds if len(pool) >= devices]

    def aligned(self, devices: int) -> list[_Group]:
        """Groups that leave whole groups beside them."""
        if devices not in self._aligned:
            self._aligned[devices] = [
                pool[first : first + devices]
                for pool in dict.fromkeys((*self._islands, *self.pools(devices)))
                for first in range(0, len(pool) - devices + 1, devices)
            ]
        return self._aligned[devices]

    def among(self, some: _Group, devices: int) -> list[_Group]:
        """Groups of these GPUs; of very many, the aligned ones and those of neighbours."""
        key = devices, some
        if key not in self._among:
            self._among[key] = list(dict.fromkeys(self._groups(set(some), devices)))
        return self._among[key]

    def _groups(self, some: set[int], devices: int) -> Iterator[_Group]:
        yield from (group for group in self.aligned(devices) if some.issuperset(group))
        for pool in self.pools(devices):
            members = [g for g in pool if g in some]
            if math.comb(len(members), devices) <= _GROUPS:
                yield from itertools.combinations(members, devices)
            else:
                yield from zip(*(members[first:] for first in range(devices)), strict=False)

    def flaws(self, group: _Group) -> float:
        """What a group costs in itself."""
        if len(group) == 1:
            return 0.0
        if group not in self._flaws:
            apart = len({self._island[g] for g in group}) > 1
            crooked = group not in self.aligned(len(group))
            self._flaws[group] = _UNLINKED * apart + _CROOKED * crooked
        return self._flaws[group]


class _Packing:
    """Items in their places, beside the explicit ones."""

    def __init__(
        self, box: Box, headroom: float, demands: Iterable[Demand], placed: Mapping[str, Placed]
    ) -> None:
        self.field = _Field(box, linked=True)
        self.limits = [capacity(gpu, headroom) for gpu in box]
        self.loads = [0] * len(box)
        self.models: list[list[str]] = [[] for _ in box]
        self.on: list[dict[_Item, None]] = [{} for _ in box]
        self.where: dict[_Item, _Group] = {}
        self.left: list[_Item] = []
        models = [demand.model for demand in demands]
        self._replicated = {model for model in models if models.count(model) > 1}
        position = {gpu.index: g for g, gpu in enumerate(box)}
        for demand in demands:
            if demand.name in placed:
                for g in (position[index] for index in placed[demand.name].devices):
                    self.loads[g] += placed[demand.name].option.on(box[g])
                    self.models[g].append(demand.model)

    def copy(self, *, linked: bool = True) -> _Packing:
        other = copy(self)
        if linked != self.field.linked:
            other.field = _Field(self.field.box, linked=linked)
        other.loads, other.where, other.left = list(self.loads), dict(self.where), list(self.left)
        other.models = [list(models) for models in self.models]
        other.on = [dict(on) for on in self.on]
        return other

    def room(self, g: int) -> int:
        return self.limits[g] - self.loads[g]

    def use(self, g: int) -> float:
        return self.loads[g] / self.field.memory[g]

    def crowded(self) -> list[int]:
        """The GPUs with two replicas of a model."""
        return [g for g, models in enumerate(self.models) if len(set(models)) < len(models)]

    def balance(self) -> float:
        uses = [self.use(g) for g in self.field.everywhere]
        if not uses or max(uses) == min(uses):
            return 1.0
        return max(uses) / min(uses) if min(uses) else math.inf

    def even_uses(self) -> tuple[float, float]:
        """Between what all uses are if they are even: around that of the whole box."""
        use = sum(self.loads) / sum(self.field.memory)
        return use / BALANCE, use * BALANCE

    def put(self, item: _Item, group: _Group) -> None:
        self.where[item] = group
        for g in group:
            self.loads[g] += item.takes[g]
            self.models[g].append(item.model)
            self.on[g][item] = None

    def lift(self, item: _Item) -> _Group:
        group = self.where.pop(item)
        for g in group:
            self.loads[g] -= item.takes[g]
            self.models[g].remove(item.model)
            del self.on[g][item]
        return group

    def blame(self, item: _Item, group: _Group) -> float:
        """What the item there costs beside unevenness."""
        flaws = self.field.flaws(group)
        if item.model not in self._replicated:
            return flaws
        return flaws + _TOGETHER * sum(self.models[g].count(item.model) for g in group)

    def strain(self, item: _Item, group: _Group) -> float:
        """What the item there costs in evenness."""
        weights, loads, takes = self.field.weights, self.loads, item.takes
        if len(group) == 1:
            g = group[0]
            return (2 * loads[g] + takes[g]) * takes[g] * weights[g]
        return sum((2 * loads[g] + takes[g]) * takes[g] * weights[g] for g in group)

    def best(self, item: _Item, *, tight: bool = False) -> _Group | None:
        """The group with room that costs least; `tight`: where the least room is left."""
        sign = -1 if tight else 1
        ways = [
            (self.blame(item, group) + sign * self.strain(item, group), group)
            for group in self._roomy(item, sign)
        ]
        return min(ways)[1] if ways else None

    def _roomy(self, item: _Item, sign: int) -> list[_Group]:
        each = zip(self.field.singles, self.loads, item.takes, self.limits, strict=True)
        some = [group for group, load, take, limit in each if load + take <= limit]
        if item.devices == 1:
            return some
        roomy = {g for (g,) in some}
        aligned = [group for group in self.field.aligned(item.devices) if roomy.issuperset(group)]
        if aligned:
            return aligned
        pools = (
            sorted((g for g in pool if g in roomy), key=lambda g: (sign * self.use(g), g))
            for pool in self.field.pools(item.devices)
        )
        return [tuple(sorted(pool[: item.devices])) for pool in pools if len(pool) >= item.devices]

    def within(self, some: _Group) -> list[_Item]:
        """What is on these GPUs and no others."""
        inside = set(some)
        items = dict.fromkeys(item for g in some for item in self.on[g])
        return [item for item in items if inside.issuperset(self.where[item])]


# --- packing some GPUs anew


@dataclass
class _Effort:
    left: int


class _Search:
    """Branch and bound, depth first, over the places of some items among some GPUs."""

    def __init__(self, packing: _Packing, items: Iterable[_Item], some: _Group) -> None:
        self.packing = packing  # changed, and left as it was
        self.items = sorted(items, key=_by_devices)
        self.some = some
        self.below = math.inf  # what costs less is looked for
        self.first = False  # whether the first will do
        self.ceilings: Sequence[float] = packing.limits  # bytes on each GPU
        self.floors: Sequence[float] | None = None
        self.found: dict[_Item, _Group] | None = None
        most = (item.devices * item.size for item in reversed(self.items))
        self._coming = [0, *itertools.accumulate(most)][::-1]  # bytes, at most
        self._effort = _Effort(0)

    def run(self, effort: _Effort, steps: int) -> None:
        self._effort = _Effort(min(steps, effort.left))
        effort.left -= self._effort.left
        self._descend(0, 0.0)
        effort.left += self._effort.left

    def _descend(self, depth: int, cost: float) -> None:
        if depth == len(self.items):
            self.below = cost - _GAIN
            self.found = {item: self.packing.where[item] for item in self.items}
            return
        item = self.items[depth]
        for more, group in self._ways(item, depth):
            done = self.first and self.found is not None
            if done or cost + more >= self.below or self._effort.left <= 0:
                return
            self.packing.put(item, group)
            if self._can_be_even(depth + 1):
                self._descend(depth + 1, cost + more)
            self.packing.lift(item)

    def _ways(self, item: _Item, depth: int) -> list[tuple[float, _Group]]:
        """The groups with room and their costs, the least first; of equal ones, one."""
        packing, loads = self.packing, self.packing.loads
        groups = packing.field.among(self.some, item.devices)
        self._effort.left -= len(groups)
        twin = self.items[depth - 1] if depth else None
        after = packing.where[twin] if twin is not None and twin.like(item) else ()
        ways: dict[Hashable, tuple[float, _Group]] = {}
        for group in groups:
            if group < after or any(loads[g] + item.takes[g] > self.ceilings[g] for g in group):
                continue
            cost = packing.blame(item, group) + packing.strain(item, group)
            g = group[0]
            # Groups are placed first, so for the rest GPUs of the same state are the same.
            state = (packing.field.memory[g], loads[g], *packing.models[g])
            ways.setdefault(state if item.devices == 1 else group, (cost, group))
        return sorted(ways.values())

    def _can_be_even(self, depth: int) -> bool:
        if self.floors is None:
            return True
        loads = self.packing.loads
        return self._coming[depth] >= sum(max(0.0, self.floors[g] - loads[g]) for g in self.some)


def _improved(packing: _Packing, some: _Group, effort: _Effort) -> bool:
    """Whether what is within these GPUs was packed better."""
    if effort.left <= 0:
        return False
    effort.left -= _SETUP
    if not (items := packing.within(some)):
        return False
    before, blame, strain = _lifted(packing, items)
    search = _Search(packing, items, some)
    search.below = blame + strain - _GAIN
    search.run(effort, _REPACK)
    return _settled(packing, search, before)


def _inserted(packing: _Packing, item: _Item, some: _Group, effort: _Effort) -> bool:
    """Whether one more was packed among these GPUs."""
    if effort.left <= 0 or sum(map(packing.room, some)) < item.least:
        return False
    effort.left -= _SETUP
    before, *_ = _lifted(packing, packing.within(some))
    search = _Search(packing, [*before, item], some)
    search.first = True
    search.run(effort, _REPACK)
    return _settled(packing, search, before)


def _made_even(packing: _Packing) -> bool:
    """Whether everything was packed such that all uses are even, and nothing else is worse."""
    low, high = packing.even_uses()
    before, blame, _ = _lifted(packing, list(packing.where))
    search = _Search(packing, before, packing.field.everywhere)
    search.first = True
    search.below = blame + _TOGETHER / 2
    memory = packing.field.memory
    search.floors = [low * size for size in memory]
    search.ceilings = [
        min(limit, high * size) for limit, size in zip(packing.limits, memory, strict=True)
    ]
    search.run(_Effort(_EXACT), _EXACT)
    return _settled(packing, search, before)


def _lifted(packing: _Packing, items: Iterable[_Item]) -> tuple[dict[_Item, _Group], float, float]:
    """Where they were, and what they cost there."""
    before: dict[_Item, _Group] = {}
    blame = strain = 0.0
    for item in items:
        before[item] = packing.lift(item)
        blame += packing.blame(item, before[item])
        strain += packing.strain(item, before[item])
    return before, blame, strain


def _settled(packing: _Packing, search: _Search, before: Mapping[_Item, _Group]) -> bool:
    for item, group in (before if search.found is None else search.found).items():
        packing.put(item, group)
    return search.found is not None


# --- what fits


def _packed(demands: Iterable[Demand], empty: _Packing) -> _Packing:
    """As many as were found to fit, on linked groups if those are no fewer."""
    anywhere = empty.copy(linked=False)
    named = sorted(demands, key=lambda demand: demand.name)
    choices = [ways for demand in named if (ways := _ways_alone(demand, anywhere))]
    if not choices:
        return empty
    linked = _chosen(choices, empty)
    if not linked.left or empty.field.all_linked:
        return linked
    return min(linked, _chosen(choices, anywhere), key=_count_left)


def _ways_alone(demand: Demand, empty: _Packing) -> list[_Item]:
    """The options that fit if nothing else has to."""
    items = (
        _Item(demand, option, tuple(option.on(gpu) for gpu in empty.field.box))
        for option in demand.options
    )
    return [item for item in items if empty.best(item)]


def _count_left(packing: _Packing) -> int:
    return len(packing.left)


def _chosen(choices: Sequence[Sequence[_Item]], empty: _Packing) -> _Packing:
    """With the fewest devices with which the whole was found to fit."""
    found = []
    if len(choices) <= _FEW:
        found.append(_first_fit(itertools.islice(_by_devices_in_all(choices), _TRIES), empty))
        if not found[0].left:
            return found[0]
    ladder = list(_ladder(choices))
    rungs = [*ladder[:: -(-len(ladder) // _RUNGS)], ladder[-1]]
    found.append(_first_fit(rungs, empty, {ways[0].demand: ways for ways in choices}))
    best = min(found, key=_count_left)
    return best if best.left else _slimmed(best, choices, empty)


def _first_fit(
    tries: Iterable[Sequence[_Item]],
    empty: _Packing,
    wider: Mapping[Demand, Sequence[_Item]] | None = None,
) -> _Packing:
    """The first that fits, or else that with the fewest left; these may be made `wider`."""
    effort = _Effort(_FIT * max(1, len(empty.loads) // (2 * _SMALL)))
    room = sum(max(0, empty.room(g)) for g in empty.field.everywhere)
    best: _Packing | None = None
    for items in tries:
        if best is not None and sum(item.least for item in items) > room:
            continue
        packing = _greedy(items, empty, effort)
        if wider is not None:
            left = packing.left
            packing.left = [item for item in left if not _widened(packing, wider[item.demand])]
        best = packing if best is None else min(best, packing, key=_count_left)
        if not best.left or effort.left <= 0:
            break
    return best or empty


def _widened(packing: _Packing, ways: Iterable[_Item]) -> bool:
    """Whether one more was placed by whatever option has room."""
    for item in ways:
        if (group := packing.best(item)) is not None:
            packing.put(item, group)
            return True
    return False


def _by_devices_in_all(choices: Sequence[Sequence[_Item]]) -> Iterator[list[_Item]]:
    """An option each: the fewest devices in all first; of as many, the smallest on one."""

    def entry(levels: tuple[int, ...]) -> tuple[int, list[int], tuple[int, ...]]:
        items = _at(levels, choices)
        sizes = sorted((item.size for item in items), reverse=True)
        return sum(item.devices for item in items), sizes, levels

    heap = [entry((0,) * len(choices))]
    while heap:
        *_, levels = heapq.heappop(heap)
        yield _at(levels, choices)
        # Raised from left to right only, each comes up once.
        last = max((k for k, level in enumerate(levels) if level), default=0)
        for k in range(last, len(choices)):
            if levels[k] + 1 < len(choices[k]):
                heapq.heappush(heap, entry((*levels[:k], levels[k] + 1, *levels[k + 1 :])))


def _ladder(choices: Sequence[Sequence[_Item]]) -> Iterator[list[_Item]]:
    """An option each: step by step more devices for what takes the most on one."""
    levels = [0] * len(choices)
    while True:
        yield _at(levels, choices)
        more = [k for k, ways in enumerate(choices) if levels[k] + 1 < len(ways)]
        if not more:
            return
        levels[max(more, key=lambda k: choices[k][levels[k]].size)] += 1


def _at(levels: Sequence[int], choices: Sequence[Sequence[_Item]]) -> list[_Item]:
    return [ways[level] for ways, level in zip(choices, levels, strict=True)]


def _slimmed(packing: _Packing, choices: Sequence[Sequence[_Item]], empty: _Packing) -> _Packing:
    """Takes back the devices without which it fits as well."""
    effort = _Effort(_FIT)
    for ways in choices:
        for slim in ways:
            if slim in packing.where or effort.left <= 0:
                break
            items = [slim if item.demand is slim.demand else item for item in packing.where]
            other = _greedy(items, empty, effort)
            if not other.left:
                packing = other
                break
    return packing


def _by_devices(item: _Item) -> tuple[int, int, str]:
    return -item.devices, -item.size, item.demand.name


def _by_size(item: _Item) -> tuple[int, int, str]:
    return -item.size, -item.devices, item.demand.name


def _greedy(items: Sequence[_Item], empty: _Packing, effort: _Effort) -> _Packing:
    """The largest first, each in its best place; then room is made for what is left."""
    tried = []
    for order, tight in ((_by_devices, False), (_by_size, False), (_by_devices, True)):
        packing = empty.copy(linked=empty.field.linked)
        for item in sorted(items, key=order):
            effort.left -= 1 + len(packing.loads) // 3
            if (group := packing.best(item, tight=tight)) is None:
                packing.left.append(item)
            else:
                packing.put(item, group)
        if not packing.left:
            return packing
        tried.append(packing)
    best = min(tried, key=_count_left)
    if len(best.left) > _FEW:
        return best
    best.left = [
        item
        for item in best.left
        if not any(_inserted(best, item, some, effort) for some in _roomiest(best, item))
    ]
    return best


def _roomiest(packing: _Packing, item: _Item) -> Iterator[_Group]:
    """Some GPUs among which there may be room for an item."""
    by_room = sorted(packing.field.everywhere, key=lambda g: (-packing.room(g), g))
    groups = packing.field.aligned(item.devices)
    groups = sorted(groups, key=lambda group: (-sum(map(packing.room, group)), group))
    for more in (1, 2, 3, item.devices + 1, 2 * item.devices + 1):
        for group in groups[:4]:
            yield tuple(sorted(group + tuple([g for g in by_room if g not in group][:more])))
    if len(by_room) <= _SMALL:
        yield packing.field.everywhere


# --- what is even


def _even_out(packing: _Packing) -> None:
    effort = _Effort(_EVEN if _may_be_even(packing) else _EVEN // 6)
    while packing.where and (packing.balance() > BALANCE or packing.crowded()):
        if not any(_improved(packing, some, effort) for some in _suspects(packing)):
            break
    small = len(packing.loads) <= _SMALL
    if small and packing.balance() > BALANCE and _may_be_even(packing):
        _made_even(packing)


def _may_be_even(packing: _Packing) -> bool:
    """Whether no item is by itself more than its GPU's part of the whole."""
    if not packing.where:
        return False
    _, high = packing.even_uses()
    return all(
        any(
            take <= high * memory
            for take, memory in zip(item.takes, packing.field.memory, strict=True)
        )
        for item in packing.where
    )


def _suspects(packing: _Packing) -> Iterator[_Group]:
    """A few GPUs each time, one of which is why it is uneven."""
    by_use = sorted(packing.field.everywhere, key=lambda g: (packing.use(g), g))
    cold, hot = by_use[0], by_use[-1]
    reasons = [*packing.crowded(), hot]
    for one in reasons:
        yield from (_union((one,), (g,)) for g in by_use if g != one)
    yield from (_union((cold,), (g,)) for g in reversed(by_use) if g != cold)
    for one in reasons:
        for item in list(packing.on[one]):
            if item.devices > 1:
                others = packing.field.aligned(item.devices)
                others = sorted(others, key=lambda group: (sum(map(packing.use, group)), group))
                yield from (_union(packing.where[item], other) for other in others)
    # Of three and four, those near each other in use first: a different mix each time.
    for size in (2, 3):
        for apart in range(1, len(by_use)):
            for some in zip(*(by_use[k * apart :] for k in range(size)), strict=False):
                yield from (_union((one,), some) for one in (hot, cold))


def _union(one: _Group, other: _Group) -> _Group:
    return tuple(sorted({*one, *other}))
