"""The GPUs and the bytes of every replica. Pure: demands and GPUs in, placement out.

Replicas with explicit devices are placed first. `packing_search` places the other replicas that
are in memory together. Replicas on demand follow one by one; they may share GPUs in time with
others.
What remains of each GPU is shared out at the end.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from llmserve.planning.packing import Demand, Option, Packing, Topology
from llmserve.planning.packing_search import even_out, pack

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llmserve.gpus.device import Box, Gpu

_START = ""  # the scene of the start, before a replica displaces others
_LESSER = 1024  # bytes of replicas at the start weigh as much as one of a replica on demand

# A GPU and the replica that displaces the others there; None and a replica for its own limit.
Scene = tuple[int | None, str]


@dataclass(frozen=True)
class Placed:
    """The place of a replica."""

    devices: tuple[int, ...]
    option: Option
    extra: int = 0  # bytes on each device besides those of the option
    displaces: bool = False  # while it is awake, the others there that are not pinned sleep


@dataclass(frozen=True)
class Misfit:
    """A demand without a place.

    `free` is in the order of the box. For explicit devices it is what earlier demands leave of the
    whole memory, else what all placed demands leave of the capacity. For a demand on demand it is
    what the others leave while they sleep.
    """

    demand: Demand
    free: tuple[int, ...]  # bytes on each GPU


@dataclass(frozen=True)
class Placement:
    placed: dict[str, Placed]  # by the demand's name, in the order of the demands
    left: tuple[Misfit, ...]


def capacity(gpu: Gpu, headroom: float) -> int:
    """Return the bytes of a GPU that the plan may use."""
    return int(gpu.memory * (1 - headroom))


def place(
    demands: Sequence[Demand], box: Box, headroom: float, *, finish: bool = True
) -> Placement:
    """Place demands on few GPUs each, use all GPUs evenly, share out what remains.

    Explicit devices are bounded by the GPU's whole memory, in the order of the demands; chosen
    devices by its capacity. Without `finish`, the result shows only which demands have a place.
    Names of demands are unique.
    """
    topology = Topology(box)
    limits = [capacity(gpu, headroom) for gpu in box]
    on_demand = [demand for demand in demands if demand.on_demand]
    eager = [demand for demand in demands if not demand.on_demand]
    # Whether a demand on demand fits depends on the final places of the others.
    placed, misfits = _together(eager, topology, limits, even=finish or bool(on_demand))
    sharing = _TimeSharing(topology, limits)
    for demand in eager:
        if demand.name in placed:
            sharing.add(demand, placed[demand.name])
    for demand in sorted(on_demand, key=lambda demand: demand.devices is None):
        found = sharing.place(demand)
        if found is None:
            misfits[demand.name] = Misfit(demand, sharing.free(demand))
        else:
            placed[demand.name] = found
            sharing.add(demand, found)
    for demand in on_demand:
        if demand.name in placed:
            placed[demand.name] = sharing.settle(demand, placed[demand.name])
    ordered = {one.name: placed[one.name] for one in demands if one.name in placed}
    if finish:
        ordered = fill(ordered, demands, box, headroom)
    left = (misfits[one.name] for one in demands if one.name in misfits)
    return Placement(ordered, tuple(left))


def _together(
    demands: Sequence[Demand], topology: Topology, limits: Sequence[int], *, even: bool
) -> tuple[dict[str, Placed], dict[str, Misfit]]:
    """Place the demands that are in memory at the same time."""
    packing = Packing(topology, topology.memory)
    placed: dict[str, Placed] = {}
    misfits: dict[str, Misfit] = {}
    for demand in demands:
        if demand.devices is None:
            continue
        if (found := packing.best(demand)) is None:
            free = tuple(packing.room(g) for g in topology.everywhere)
            misfits[demand.name] = Misfit(demand, free)
        else:
            placed[demand.name] = Placed(demand.devices, found[0])
            packing.reserve(demand, *found)
    packing.limits = limits
    chosen = [demand for demand in demands if demand.devices is None]
    possible = [
        replace(demand, options=options)
        for demand in chosen
        if (options := tuple(o for k, o in enumerate(demand.options) if packing.ways(demand, [k])))
    ]
    pack(possible, packing)
    if even:
        even_out(packing)
    for demand, (option, group) in packing.where.items():
        placed[demand.name] = Placed(topology.indices(group), option)
    free = tuple(max(0, packing.room(g)) for g in topology.everywhere)
    left = {one.name: Misfit(one, free) for one in chosen if one.name not in placed}
    return placed, left | misfits


class _TimeSharing:
    """GPUs that replicas on demand share in time.

    Two conditions hold on each GPU. The replicas that are not on demand fit together, with the
    others asleep. Each of the others fits beside the pinned ones, with all the rest asleep.
    """

    def __init__(self, topology: Topology, limits: Sequence[int]) -> None:
        self._topology = topology
        self._capacity = limits
        # Bytes on each GPU:
        self._start = [0] * len(limits)  # while those on demand sleep
        self._asleep = [0] * len(limits)  # while all sleep that are not pinned
        self._woken = [0] * len(limits)  # that the largest on demand adds when it wakes
        self._together = [0] * len(limits)  # while only those sleep that displace others
        self._promised = [0] * len(limits)  # of all on demand, awake
        self._models: list[list[str]] = [[] for _ in limits]  # on demand

    def add(self, demand: Demand, placed: Placed) -> None:
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
        """Return a place beside all others, or else where it displaces the least."""
        for displaces in (False, True):
            ways = []
            for level, option in enumerate(demand.options):
                packing = self._packing(demand, option, displaces=displaces)
                ways += packing.ways(demand, [level])
            if ways:
                _, level, group = min(ways)
                devices = demand.devices or self._topology.indices(group)
                return Placed(devices, demand.options[level], displaces=displaces)
        return None

    def settle(self, demand: Demand, placed: Placed) -> Placed:
        """Once all are placed, let it displace others unless it fits beside them."""
        limits = self._limits(demand)
        more = [(g, whole - placed.option.asleep) for g, whole in self._takes(placed)]
        displaces = any(self._start[g] + size > limits[g] for g, size in more)
        for g, size in more:
            self._start[g] += 0 if displaces else size
        return replace(placed, displaces=displaces)

    def free(self, demand: Demand) -> tuple[int, ...]:
        """Return the bytes on each GPU that it could use while others sleep."""
        return tuple(max(0, room) for room in self._room(demand, demand.options[0]))

    def _takes(self, placed: Placed) -> list[tuple[int, int]]:
        takes = self._topology.takes(placed.option)
        return [(g, takes[g]) for g in self._topology.positions(placed.devices)]

    def _packing(self, demand: Demand, option: Option, *, displaces: bool) -> Packing:
        """Return what an option finds on the GPUs, with the limits that keep both conditions."""
        packing = Packing(self._topology, ())
        packing.models = self._models
        room = self._room(demand, option)
        if displaces:  # the least is promised on demand; of equal GPUs, the least is displaced
            pairs = zip(self._promised, self._together, strict=True)
            packing.loads = [promised + load // _LESSER for promised, load in pairs]
        else:
            packing.loads = self._together
            limits = zip(self._limits(demand), self._together, room, strict=True)
            room = [min(limit - load, left) for limit, load, left in limits]
        packing.limits = [load + left for load, left in zip(packing.loads, room, strict=True)]
        return packing

    def _limits(self, demand: Demand) -> Sequence[int]:
        return self._capacity if demand.devices is None else self._topology.memory

    def _room(self, demand: Demand, option: Option) -> list[int]:
        """Return the bytes on each GPU for it awake, or for it asleep where that has no room."""
        rooms = []
        for g, limit in enumerate(self._limits(demand)):
            awake = limit - self._asleep[g]
            asleep = min(limit - self._start[g], awake - self._woken[g])
            rooms.append(asleep if asleep < option.asleep else awake)
        return rooms


def fill(
    placed: Mapping[str, Placed], demands: Sequence[Demand], box: Box, headroom: float
) -> dict[str, Placed]:
    """Share out what remains: all grow in proportion to `grows` until a GPU of theirs is full.

    A GPU is full when one of its scenes is: the start, or that of a replica that displaces
    others. A replica grows in the scenes in which it is awake. At a full GPU or at `at_most` it
    stops; the others continue. Earlier `extra` is replaced. Progressive filling (max-min
    fairness; Bertsekas and Gallager, Data Networks, 6.5.2).
    """
    there = [(demand, placed[demand.name]) for demand in demands if demand.name in placed]
    room, scenes = _scenes(there, {gpu.index: gpu for gpu in box}, headroom)
    weights = {demand.name: demand.grows for demand, _ in there if demand.grows}
    extra = dict.fromkeys(weights, 0)

    def grow(name: str, more: int) -> None:
        extra[name] += more
        for scene in scenes[name]:
            room[scene] -= more

    active = list(weights)
    while active:
        total = Counter[Scene]()
        for name in active:
            total.update(dict.fromkeys(scenes[name], weights[name]))
        full = {scene: Fraction(max(0, room[scene]), total[scene]) for scene in total}
        levels = {name: min(full[scene] for scene in scenes[name]) for name in active}
        lowest = min(levels.values())
        for name in active:
            if levels[name] == lowest:
                grow(name, int(lowest * weights[name]))
        active = [name for name in active if levels[name] > lowest]
    for name in weights:  # the few bytes that remain from rounding down
        grow(name, max(0, min(room[scene] for scene in scenes[name])))
    return {name: replace(one, extra=extra.get(name, 0)) for name, one in placed.items()}


def _scenes(
    there: Sequence[tuple[Demand, Placed]], gpus: Mapping[int, Gpu], headroom: float
) -> tuple[dict[Scene, int], dict[str, list[Scene]]]:
    """Return the bytes that remain in each scene, and the scenes in which each replica grows."""
    room: dict[Scene, int] = {}
    scenes: dict[str, list[Scene]] = {demand.name: [] for demand, _ in there}
    for index, gpu in gpus.items():
        here = [(demand, one) for demand, one in there if index in one.devices]
        for scene in (_START, *(demand.name for demand, one in here if one.displaces)):
            room[index, scene] = capacity(gpu, headroom)
            for demand, one in here:
                awake = demand.pinned or scene == (demand.name if one.displaces else _START)
                room[index, scene] -= one.option.on(gpu) if awake else one.option.asleep
                if awake:
                    scenes[demand.name].append((index, scene))
    for demand, one in there:
        if demand.at_most is not None:  # a share may have given some of it
            takes = max(one.option.on(gpus[index]) for index in one.devices)
            room[None, demand.name] = one.option.needs + demand.at_most - takes
            scenes[demand.name].append((None, demand.name))
    return room, scenes
