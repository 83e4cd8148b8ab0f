"""Which GPUs a replica gets. Pure: demands and GPUs in, placement out.

Explicit devices come first. For the rest an option each is chosen, with the fewest devices with
which the whole is found to fit, and `packing` finds the places. What is left of the GPUs is
shared out at the end.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, replace
from fractions import Fraction
from operator import attrgetter
from typing import TYPE_CHECKING

from llmserve.packing import Effort, Item, Packing, even_out, fewest_left, pack

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from llmserve.gpus import Box, Gpu

_FIT = 20_000  # effort for trying options, for a small box
_FEW = 12  # demands of which options are tried in the order of their devices,
_TRIES = 200  # so many times
_RUNGS = 16  # tries with more demands


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
    empty = Packing(box, [capacity(gpu, headroom) for gpu in box])
    placed, misfits = _explicit(demands, box, empty)
    options = {
        _item(demand, option, box): option
        for demand in demands
        if demand.devices is None
        for option in demand.options
    }
    packing = _packed(options, empty)
    if finish:
        even_out(packing)
    for item, group in packing.where.items():
        placed[item.name] = Placed(tuple(box[g].index for g in group), options[item])
    free = tuple(max(0, packing.room(g)) for g in range(len(box)))
    ordered = {one.name: placed[one.name] for one in demands if one.name in placed}
    left = (misfits.get(one.name) or Misfit(one, free) for one in demands if one.name not in placed)
    if finish:
        ordered = fill(ordered, demands, box, headroom)
    return Placement(ordered, tuple(left))


def _explicit(
    demands: Iterable[Demand], box: Box, packing: Packing
) -> tuple[dict[str, Placed], dict[str, Misfit]]:
    """Who has devices of its own goes there for good, if it fits."""
    placed: dict[str, Placed] = {}
    misfits: dict[str, Misfit] = {}
    position = {gpu.index: g for g, gpu in enumerate(box)}
    for demand in demands:
        if demand.devices is None:
            continue
        free = tuple(gpu.memory - load for gpu, load in zip(box, packing.loads, strict=True))
        option = next((way for way in demand.options if way.devices == len(demand.devices)), None)
        group = tuple(position[index] for index in demand.devices if index in position)
        if (
            option is None
            or len(group) < option.devices
            or any(option.on(box[g]) > free[g] for g in group)
        ):
            misfits[demand.name] = Misfit(demand, free)
        else:
            placed[demand.name] = Placed(demand.devices, option)
            packing.fix(_item(demand, option, box), group)
    return placed, misfits


def _item(demand: Demand, option: Option, box: Box) -> Item:
    takes = tuple(option.on(gpu) for gpu in box)
    return Item(demand.name, demand.model, option.devices, takes)


# --- which option


def _packed(items: Iterable[Item], empty: Packing) -> Packing:
    """As many as were found to fit, on linked groups if those are no fewer."""
    anywhere = empty.unlinked()
    name = attrgetter("name")
    alone = sorted((item for item in items if anywhere.best(item)), key=name)
    choices = [list(ways) for _, ways in itertools.groupby(alone, key=name)]
    linked = _chosen(choices, empty)
    if not linked.left or empty.topology.all_linked:
        return linked
    return fewest_left([linked, _chosen(choices, anywhere)])


def _chosen(choices: Sequence[Sequence[Item]], empty: Packing) -> Packing:
    """With the fewest devices with which the whole was found to fit."""
    found = []
    if len(choices) <= _FEW:
        tries = itertools.islice(_by_devices_in_all(choices), _TRIES)
        found.append(_first_fit(tries, empty, {}))
        if not found[0].left:
            return found[0]
    ladder = list(_ladder(choices))
    rungs = [*ladder[:: -(-len(ladder) // _RUNGS)], ladder[-1]]
    found.append(_first_fit(rungs, empty, {ways[0].name: ways for ways in choices}))
    best = fewest_left(found)
    return best if best.left else _slimmed(best, choices, empty)


def _first_fit(
    tries: Iterable[Sequence[Item]], empty: Packing, wider: Mapping[str, Sequence[Item]]
) -> Packing:
    """The first that fits, or else that with the fewest left; these may be made `wider`."""
    effort = Effort(_FIT * max(1, len(empty.loads) // 16))
    room = sum(max(0, empty.room(g)) for g in range(len(empty.loads)))
    found: list[Packing] = []
    for items in tries:
        if found and sum(item.least for item in items) > room:
            continue
        packing = pack(items, empty, effort)
        left = packing.left
        packing.left = [one for one in left if not _widened(packing, wider.get(one.name, ()))]
        found.append(packing)
        if not packing.left or effort.left <= 0:
            break
    return fewest_left(found)


def _widened(packing: Packing, ways: Iterable[Item]) -> bool:
    """Whether one more was placed by whatever option has room."""
    for item in ways:
        if (group := packing.best(item)) is not None:
            packing.put(item, group)
            return True
    return False


def _by_devices_in_all(choices: Sequence[Sequence[Item]]) -> Iterator[list[Item]]:
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


def _ladder(choices: Sequence[Sequence[Item]]) -> Iterator[list[Item]]:
    """An option each: step by step more devices for what takes the most on one."""
    levels = [0] * len(choices)
    while True:
        yield _at(levels, choices)
        more = [k for k, ways in enumerate(choices) if levels[k] + 1 < len(ways)]
        if not more:
            return
        levels[max(more, key=lambda k: choices[k][levels[k]].size)] += 1


def _at(levels: Sequence[int], choices: Sequence[Sequence[Item]]) -> list[Item]:
    return [ways[level] for ways, level in zip(choices, levels, strict=True)]


def _slimmed(packing: Packing, choices: Sequence[Sequence[Item]], empty: Packing) -> Packing:
    """Takes back the devices without which it fits as well."""
    effort = Effort(_FIT)
    for ways in choices:
        for slim in ways:
            if slim in packing.where or effort.left <= 0:
                break
            items = [slim if item.name == slim.name else item for item in packing.where]
            other = pack(items, empty, effort)
            if not other.left:
                packing = other
                break
    return packing


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
    """A replica that takes of what is left, the same on each of its devices."""

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
