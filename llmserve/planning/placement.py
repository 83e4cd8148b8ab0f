"""Which GPUs a replica gets. Pure: demands and GPUs in, placement out.

Explicit devices come first. For the rest an option each is chosen, with the fewest devices with
which the whole is found to fit, and `packing` finds the places. Who is on demand comes after
them, one by one, and may take the place of others. What is left of the GPUs is shared out at
the end.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, replace
from fractions import Fraction
from operator import attrgetter
from typing import TYPE_CHECKING

from llmserve.planning.packing import Effort, Item, Packing, even_out, fewest_left, pack

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from llmserve.gpus.device import Box, Gpu

_FIT = 20_000  # effort for trying options, for a small box
_FEW = 12  # demands of which options are tried in the order of their devices,
_TRIES = 200  # so many times
_RUNGS = 16  # tries with more demands
_START = ""  # the scene of the start, before anybody displaces others
_LESSER = 1024  # bytes that are there at once weigh as much as one that is promised on demand

Scene = tuple[int, str]  # a GPU, and who displaces others there


@dataclass(frozen=True)
class Option:
    """One way to run a replica: on so many GPUs, with so much on each of them."""

    devices: int
    needs: int  # bytes on each device, at least
    share: float = 0.0  # of each device's memory, at least
    asleep: int = 0  # of `needs`, bytes on each device that it holds while it sleeps

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
    pinned: bool = False  # it never sleeps
    on_demand: bool = False  # not pinned; it may take the place of others that are not

    @property
    def model(self) -> str:
        model, _, number = self.name.rpartition("/")
        return model if model and number.isdecimal() else self.name


@dataclass(frozen=True)
class Placed:
    devices: tuple[int, ...]
    option: Option
    extra: int = 0  # bytes on each device from what was left
    displaces: bool = False  # while it is awake, those there that are not pinned sleep


@dataclass(frozen=True)
class Misfit:
    """A demand that found no place.

    `free` is in the order of the box: for explicit devices, what those before left of the whole
    memory; else what all that found a place left of the capacity. On demand, it is what they
    leave once they sleep.
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
    eager = [demand for demand in demands if not demand.on_demand]
    on_demand = [demand for demand in demands if demand.on_demand]
    # Who is on demand finds a place or none by where the others are in the end.
    placed, misfits = _together(eager, box, headroom, even=finish or bool(on_demand))
    turns = _Turns(box, headroom)
    for demand in eager:
        if demand.name in placed:
            turns.take(demand, placed[demand.name])
    for demand in sorted(on_demand, key=lambda demand: demand.devices is None):
        found = turns.place(demand)
        if found is None:
            misfits[demand.name] = Misfit(demand, turns.free(demand))
        else:
            placed[demand.name] = found
            turns.take(demand, found)
    for demand in on_demand:
        if demand.name in placed:
            placed[demand.name] = turns.settle(demand, placed[demand.name])
    ordered = {one.name: placed[one.name] for one in demands if one.name in placed}
    if finish:
        ordered = fill(ordered, demands, box, headroom)
    left = (misfits[one.name] for one in demands if one.name in misfits)
    return Placement(ordered, tuple(left))


def _together(
    demands: Sequence[Demand], box: Box, headroom: float, *, even: bool
) -> tuple[dict[str, Placed], dict[str, Misfit]]:
    """Those that are all there at once."""
    empty = Packing(box, [capacity(gpu, headroom) for gpu in box])
    placed, misfits = _explicit(demands, box, empty)
    options = {
        _item(demand, option, box): option
        for demand in demands
        if demand.devices is None
        for option in demand.options
    }
    packing = _packed(options, empty)
    if even:
        even_out(packing)
    for item, group in packing.where.items():
        placed[item.name] = Placed(tuple(box[g].index for g in group), options[item])
    free = tuple(max(0, packing.room(g)) for g in range(len(box)))
    left = {one.name: Misfit(one, free) for one in demands if one.name not in placed}
    return placed, left | misfits


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


# --- on demand


class _Turns:
    """GPUs on which replicas take turns.

    Two things must hold on each: those that are not on demand fit together, with the others
    asleep; and each of the others fits beside the pinned ones, with all the rest asleep.
    """

    def __init__(self, box: Box, headroom: float) -> None:
        self._box = box
        self._position = {gpu.index: g for g, gpu in enumerate(box)}
        linked = Packing(box, [capacity(gpu, headroom) for gpu in box])
        self._packings = (linked, linked.unlinked())
        # Bytes on each GPU:
        self._start = [0] * len(box)  # while those on demand sleep
        self._asleep = [0] * len(box)  # while all sleep that are not pinned
        self._woken = [0] * len(box)  # that the largest on demand takes besides, awake
        self._together = [0] * len(box)  # while only those sleep that found no place beside others
        self._promised = [0] * len(box)  # of all that are on demand, awake
        self._models: list[list[str]] = [[] for _ in box]  # on demand

    def take(self, demand: Demand, placed: Placed) -> None:
        asleep = placed.option.asleep
        for g, whole in self._takes(placed):
            self._start[g] += asleep if demand.on_demand else whole
            self._asleep[g] += whole if demand.pinned else asleep
            self._together[g] += asleep if placed.displaces else whole
            if demand.on_demand:
                self._woken[g] = max(self._woken[g], whole - asleep)
                self._promised[g] += whole
                self._models[g].append(demand.model)

    def place(self, demand: Demand) -> Placed | None:
        """Beside all others if there is such a place, or else where it displaces the least."""
        for displaces in (False, True):
            for packing in self._packings:
                for option in demand.options:
                    devices = self._devices(demand, option, packing, displaces=displaces)
                    if devices is not None:
                        return Placed(devices, option, displaces=displaces)
        return None

    def settle(self, demand: Demand, placed: Placed) -> Placed:
        """With all there: it displaces others unless it fits beside those, and is counted then."""
        limits = self._limits(demand)
        more = [(g, whole - placed.option.asleep) for g, whole in self._takes(placed)]
        displaces = any(self._start[g] + size > limits[g] for g, size in more)
        for g, size in more:
            self._start[g] += 0 if displaces else size
        return replace(placed, displaces=displaces)

    def free(self, demand: Demand) -> tuple[int, ...]:
        """Bytes on each GPU that it could have while others sleep."""
        return tuple(max(0, room) for room in self._room(demand, demand.options[0]))

    def _takes(self, placed: Placed) -> list[tuple[int, int]]:
        """Its GPUs, and the bytes that it takes there awake."""
        positions = [self._position[index] for index in placed.devices]
        return [(g, placed.option.on(self._box[g])) for g in positions]

    def _devices(
        self, demand: Demand, option: Option, packing: Packing, *, displaces: bool
    ) -> tuple[int, ...] | None:
        room = self._room(demand, option)
        if not displaces:
            limits = zip(self._limits(demand), self._together, room, strict=True)
            room = [min(limit - load, left) for limit, load, left in limits]
        item = _item(demand, option, self._box)
        if demand.devices is not None:
            group = [self._position[index] for index in demand.devices if index in self._position]
            fits = all(item.takes[g] <= room[g] for g in group)
            return demand.devices if fits and len(group) == option.devices else None
        there = packing.copy()
        there.models = self._models
        there.loads = self._contended() if displaces else self._together
        there.limits = [load + left for load, left in zip(there.loads, room, strict=True)]
        best = there.best(item)
        return None if best is None else tuple(self._box[g].index for g in best)

    def _contended(self) -> list[int]:
        """What is promised on demand; of equal GPUs, that on which less would be displaced."""
        pairs = zip(self._promised, self._together, strict=True)
        return [promised + load // _LESSER for promised, load in pairs]

    def _limits(self, demand: Demand) -> Sequence[int]:
        explicit = demand.devices is not None
        return [gpu.memory for gpu in self._box] if explicit else self._packings[0].limits

    def _room(self, demand: Demand, option: Option) -> list[int]:
        """Bytes on each GPU that are left for it awake; for it asleep, where not even that fits."""
        rooms = []
        for g, limit in enumerate(self._limits(demand)):
            awake = limit - self._asleep[g]
            asleep = min(limit - self._start[g], awake - self._woken[g])
            rooms.append(asleep if asleep < option.asleep else awake)
        return rooms


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

    A GPU is full when one of its scenes is: the start, or that of one who displaces others. A
    replica grows in those in which it is awake. One that is at a full GPU, or has `at_most`,
    stops; the others go on. What was `extra` before is given anew. Progressive filling (max-min
    fairness; Bertsekas and Gallager, Data Networks, 6.5.2).
    """
    gpus = {gpu.index: gpu for gpu in box}
    there = [(demand, placed[demand.name]) for demand in demands if demand.name in placed]
    room, scenes = _scenes(there, gpus, headroom)
    growing = [
        _Growing(demand, one, scenes[demand.name], gpus) for demand, one in there if demand.grows
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


def _scenes(
    there: Sequence[tuple[Demand, Placed]], gpus: Mapping[int, Gpu], headroom: float
) -> tuple[dict[Scene, int], dict[str, list[Scene]]]:
    """The bytes that are left in each scene, and the scenes in which each replica is awake."""
    on: dict[int, list[tuple[Demand, Placed]]] = {}
    for demand, one in there:
        for index in one.devices:
            on.setdefault(index, []).append((demand, one))
    room: dict[Scene, int] = {}
    scenes: dict[str, list[Scene]] = {demand.name: [] for demand, _ in there}
    for index, those in on.items():
        for turn in (_START, *(demand.name for demand, one in those if one.displaces)):
            room[index, turn] = capacity(gpus[index], headroom)
            for demand, one in those:
                awake = demand.pinned or turn == (demand.name if one.displaces else _START)
                room[index, turn] -= one.option.on(gpus[index]) if awake else one.option.asleep
                if awake:
                    scenes[demand.name].append((index, turn))
    return room, scenes


class _Growing:
    """A replica that takes of what is left, the same on each of its devices."""

    def __init__(
        self, demand: Demand, placed: Placed, scenes: Sequence[Scene], gpus: Mapping[int, Gpu]
    ) -> None:
        self.name = demand.name
        self.weight = demand.grows
        self.scenes = scenes
        self.extra = 0
        self.limit: int | None = None
        if demand.at_most is not None:  # a share may have given some of it
            takes = max(placed.option.on(gpus[index]) for index in placed.devices)
            self.limit = max(0, placed.option.needs + demand.at_most - takes)

    def grow(self, more: int, room: dict[Scene, int]) -> None:
        self.extra += more
        for scene in self.scenes:
            room[scene] -= more

    def most(self, room: Mapping[Scene, int]) -> int:
        more = max(0, min(room[scene] for scene in self.scenes))
        return more if self.limit is None else min(more, self.limit - self.extra)


def _levels(active: Sequence[_Growing], room: Mapping[Scene, int]) -> list[Fraction]:
    """How far each could grow, in bytes per weight, if all others on its GPUs did so as well."""
    weights: dict[Scene, int] = {}
    for one in active:
        for scene in one.scenes:
            weights[scene] = weights.get(scene, 0) + one.weight
    full = {scene: Fraction(max(0, room[scene]), total) for scene, total in weights.items()}
    levels = []
    for one in active:
        level = min(full[scene] for scene in one.scenes)
        if one.limit is not None:
            level = min(level, Fraction(one.limit, one.weight))
        levels.append(level)
    return levels
