"""Replicas in places on the GPUs of a box, and what each place costs. Pure."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

from llmserve.gpus.device import GIB

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

    from llmserve.gpus.device import Box, Gpu

BALANCE = 1.10  # ratio of the largest to the smallest use of a GPU up to which a box is even

# Costs of a place. Unevenness costs about 1 for each full GPU.
_UNLINKED = 1e6  # a group over GPUs that are not linked
_WIDER = 1e4  # each device beyond the fewest
_LARGER = 1.0  # less, for each GiB of the replica on the fewest devices
_TOGETHER = 1e2  # each pair of replicas of one model on a GPU
_CROOKED = 1.0  # a group such as 1-2, which blocks 0-1 and 2-3

_GROUPS = 32  # groups of one size among some GPUs; if there are more, only neighbours

Group = tuple[int, ...]  # positions in the box, ascending


@dataclass(frozen=True)
class Option:
    """One way to run a replica: a number of GPUs, and the bytes on each of them."""

    devices: int
    needs: int  # bytes on each device, at least
    share: float = 0.0  # of each device's memory, at least
    asleep: int = 0  # of `needs`, bytes on each device that it holds while it sleeps

    def on(self, gpu: Gpu) -> int:
        """Return the bytes that it takes of a GPU."""
        return max(self.needs, int(self.share * gpu.memory))


@dataclass(frozen=True, eq=False)
class Demand:
    """A replica to place."""

    name: str  # "chat", or "chat/1" for the second replica
    options: tuple[Option, ...]  # fewest devices first
    devices: tuple[int, ...] | None = None  # explicit GPU indices; None: the search chooses
    grows: int = 0  # weight for its part of the remaining memory; 0: no part
    at_most: int | None = None  # bytes on each device that it can use besides `needs`
    pinned: bool = False  # it never sleeps
    on_demand: bool = False  # not pinned; it may displace others that are not pinned

    @cached_property
    def model(self) -> str:
        model, _, number = self.name.rpartition("/")
        return model if model and number.isdecimal() else self.name


Way = tuple[float, int, Group]  # cost, index of the option, GPUs


class Topology:
    """The GPUs of a box and the groups that they make."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.memory = [gpu.memory for gpu in box]
        self.everywhere = tuple(range(len(box)))
        self._islands = self._partition(lambda gpu: (gpu.kind, gpu.island))
        kinds = self._partition(lambda gpu: gpu.kind)
        self._pools = list(dict.fromkeys([*self._islands, *kinds]))
        self.takes = cache(self._takes)
        self.aligned = cache(self._aligned)
        self.among = cache(self._among)
        self.flaws = cache(self._flaws)

    def pools(self, devices: int) -> list[Group]:
        """Return sets of GPUs of which any `devices` make a group."""
        return [pool for pool in self._pools if len(pool) >= devices]

    def positions(self, indices: Iterable[int]) -> Group:
        """Return the positions of GPUs by their indices; of those that the box has."""
        return tuple(g for g, gpu in enumerate(self.box) if gpu.index in indices)

    def indices(self, group: Group) -> tuple[int, ...]:
        return tuple(self.box[g].index for g in group)

    def least(self, demand: Demand) -> int:
        """Return the bytes on all its devices together, at least."""
        return min(option.devices * min(self.takes(option)) for option in demand.options)

    def _partition(self, key: Callable[[Gpu], Hashable]) -> list[Group]:
        parts: dict[Hashable, list[int]] = {}
        for g, gpu in enumerate(self.box):
            parts.setdefault(key(gpu), []).append(g)
        return [tuple(part) for part in parts.values()]

    def _takes(self, option: Option) -> list[int]:
        """Return the bytes of an option on each GPU."""
        return [option.on(gpu) for gpu in self.box]

    def _aligned(self, devices: int) -> list[Group]:
        """Return disjoint groups of each pool."""
        groups = (
            pool[first : first + devices]
            for pool in self.pools(devices)
            for first in range(0, len(pool) - devices + 1, devices)
        )
        return list(dict.fromkeys(groups))

    def _among(self, some: Group, devices: int) -> list[Group]:
        """Return the groups of these GPUs, or the aligned and neighbouring ones of very many."""
        groups = [group for group in self.aligned(devices) if set(some).issuperset(group)]
        for pool in self.pools(devices):
            members = [g for g in pool if g in some]
            if math.comb(len(members), devices) <= _GROUPS:
                groups += itertools.combinations(members, devices)
            else:
                groups += zip(*(members[first:] for first in range(devices)), strict=False)
        return list(dict.fromkeys(groups))

    def _flaws(self, group: Group) -> float:
        apart = not any(set(island).issuperset(group) for island in self._islands)
        crooked = group not in self.aligned(len(group))
        return _UNLINKED * apart + _CROOKED * crooked


class Packing:
    """Demands in their places, and the bytes that are taken of each GPU."""

    def __init__(self, topology: Topology, limits: Sequence[int]) -> None:
        self.topology = topology
        self.limits = limits  # bytes on each GPU
        self.loads = [0] * len(limits)
        self.models: list[list[str]] = [[] for _ in limits]
        self.where: dict[Demand, tuple[Option, Group]] = {}
        self.tight = False  # the fullest GPUs cost the least
        self.steps = 0  # groups weighed so far
        memory = topology.memory
        mean = sum(memory) / max(1, len(memory))
        # Weighted so, the squares of loads have the least sum where all uses are the same.
        self._weights = [1 / (size * mean) for size in memory]

    def room(self, g: int) -> int:
        return self.limits[g] - self.loads[g]

    def use(self, g: int) -> float:
        return self.loads[g] / self.topology.memory[g]

    def is_even(self) -> bool:
        uses = [self.use(g) for g in self.topology.everywhere]
        return max(uses) <= BALANCE * min(uses)

    def reserve(self, demand: Demand, option: Option, group: Group) -> None:
        """Take the bytes for good."""
        takes = self.topology.takes(option)
        for g in group:
            self.loads[g] += takes[g]
            self.models[g].append(demand.model)

    def put(self, demand: Demand, option: Option, group: Group) -> None:
        self.reserve(demand, option, group)
        self.where[demand] = option, group

    def lift(self, demand: Demand) -> tuple[Option, Group]:
        option, group = self.where.pop(demand)
        takes = self.topology.takes(option)
        for g in group:
            self.loads[g] -= takes[g]
            self.models[g].remove(demand.model)
        return option, group

    def restore(self, where: dict[Demand, tuple[Option, Group]]) -> None:
        """Lift everything and put it where it was."""
        for demand in list(self.where):
            self.lift(demand)
        for demand, (option, group) in where.items():
            self.put(demand, option, group)

    def costs(self, demand: Demand, option: Option, groups: Iterable[Group]) -> Iterator[float]:
        """Return what an option costs on each of some groups."""
        loads, models, weights = self.loads, self.models, self._weights
        takes, wider = self.topology.takes(option), _wider(demand, option)
        for group in groups:
            together = strain = 0.0
            for g in group:
                together += models[g].count(demand.model)
                strain += (2 * loads[g] + takes[g]) * takes[g] * weights[g]
            strain = -strain if self.tight else strain
            yield wider + self.topology.flaws(group) + _TOGETHER * together + strain

    def best(self, demand: Demand, least: int = 0) -> tuple[Option, Group] | None:
        """Return the cheapest place with room, on `least` devices or more."""
        levels = [k for k, option in enumerate(demand.options) if option.devices >= least]
        ways = self.ways(demand, levels)
        return (demand.options[ways[0][1]], ways[0][2]) if ways else None

    def ways(
        self,
        demand: Demand,
        levels: Iterable[int],
        some: Group | None = None,
        below: float = math.inf,
    ) -> list[Way]:
        """Return the places with room, the cheapest first; of equal GPUs, one.

        `some`: the GPUs to choose from, if not all. Costs are `below` that, if it is known early.
        """
        memory = self.topology.memory
        ways: dict[Hashable, Way] = {}
        for level in levels:
            option = demand.options[level]
            if _wider(demand, option) >= below:
                continue
            groups = self._roomy(demand, option, some or self.topology.everywhere)
            for cost, group in zip(self.costs(demand, option, groups), groups, strict=True):
                g = group[0]
                # Groups are placed first, so for the rest GPUs of the same state are the same.
                state = (memory[g], self.loads[g], *self.models[g])
                ways.setdefault(state if option.devices == 1 else group, (cost, level, group))
        return sorted(ways.values())

    def _roomy(self, demand: Demand, option: Option, some: Group) -> list[Group]:
        """Return groups with room for an option, with the emptiest group of each pool."""
        loads, limits, takes = self.loads, self.limits, self.topology.takes(option)
        roomy = {g for g in some if loads[g] + takes[g] <= limits[g]}
        if demand.devices is not None:
            groups = [self.topology.positions(demand.devices)]
        else:
            groups = list(self.topology.among(some, option.devices))
            for pool in self.topology.pools(option.devices) if option.devices > 1 else ():
                emptiest = sorted(roomy.intersection(pool), key=self.use)[: option.devices]
                groups.append(tuple(sorted(emptiest)))
        self.steps += len(groups)
        return [g for g in groups if len(g) == option.devices and roomy.issuperset(g)]


def _wider(demand: Demand, option: Option) -> float:
    """Return the cost of the devices beyond the fewest; of equal ones, the larger replica's."""
    first = demand.options[0]
    return (_WIDER - _LARGER * first.needs / GIB) * (option.devices - first.devices)
