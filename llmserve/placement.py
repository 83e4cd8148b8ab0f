"""Which GPUs a replica gets. Pure: demands and GPUs in, placement out.

Explicit devices first; then the largest demands, each onto the GPUs that are emptiest
afterwards; then moves and swaps between full and empty GPUs until they are even. What
is left of the GPUs is shared out at the end.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from llmserve.gpus import Box, Gpu

BALANCE = 1.10  # largest to smallest use of a GPU that is even enough
_TRIES = 50_000  # moves and swaps that are looked at; a count, so that every machine ends alike

_GAIN = 1e-9  # of the sum of squared uses; less is rounding

_Group = tuple[int, ...]  # indices of GPUs, ascending


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
    """A demand that found no place, and the bytes that were free for it on each GPU."""

    demand: Demand
    free: tuple[int, ...]


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

    Without `finish` only who finds a place counts: neither even nor shared out. Explicit devices are bounded by the GPU's whole memory, in the order of the demands,
    chosen ones by its capacity.
    """
    ground = _Packing(box, [capacity(gpu, headroom) for gpu in box])
    left: dict[str, Misfit] = {}
    for demand in demands:
        if demand.devices is not None and not ground.put_explicit(demand):
            free = tuple(gpu.memory - taken for gpu, taken in zip(box, ground.taken, strict=True))
            left[demand.name] = Misfit(demand, free)
    packing = _packed([demand for demand in demands if demand.devices is None], ground)
    if finish:
        _even_out(packing)
    for demand in demands:
        if demand.name not in packing.placed and demand.name not in left:
            left[demand.name] = Misfit(
                demand, tuple(packing.room(index) for index in range(len(box)))
            )
    placed = {d.name: packing.placed[d.name] for d in demands if d.name in packing.placed}
    if finish:
        placed = fill(placed, demands, box, headroom)
    return Placement(placed, tuple(left[d.name] for d in demands if d.name in left))


def fill(
    placed: Mapping[str, Placed], demands: Iterable[Demand], box: Box, headroom: float
) -> dict[str, Placed]:
    """Shares out what is left: all grow in proportion to `grows` until a GPU of theirs is full.

    Progressive filling (max-min fairness; Bertsekas and Gallager, Data Networks, 6.5.2).
    """
    room = [capacity(gpu, headroom) for gpu in box]
    for one in placed.values():
        for index in one.devices:
            room[index] -= one.option.on(box[index])
    growing = {d.name: d for d in demands if d.grows > 0 and d.name in placed}
    extra = dict.fromkeys(placed, 0)
    while growing:
        level = min(_levels(growing.values(), placed, extra, room))
        for name, demand in list(growing.items()):
            more = int(level * demand.grows)
            extra[name] += more
            for index in placed[name].devices:
                room[index] -= more
        growing = {
            name: demand
            for name, demand in growing.items()
            if (demand.at_most is None or extra[name] < demand.at_most)
            and min(_levels([demand], placed, extra, room)) * demand.grows >= 1
            and all(room[i] >= _users(i, growing, placed) for i in placed[name].devices)
        }
    return {name: replace(one, extra=extra[name]) for name, one in placed.items()}


def _users(index: int, growing: Mapping[str, Demand], placed: Mapping[str, Placed]) -> int:
    return sum(index in placed[name].devices for name in growing)


def _levels(
    demands: Iterable[Demand],
    placed: Mapping[str, Placed],
    extra: Mapping[str, int],
    room: Sequence[int],
) -> Iterator[float]:
    """By how much a unit of `grows` may grow until each limit is met."""
    weights: dict[int, int] = {}
    for demand in demands:
        for index in placed[demand.name].devices:
            weights[index] = weights.get(index, 0) + demand.grows
        if demand.at_most is not None:
            yield max(0, demand.at_most - extra[demand.name]) / demand.grows
    for index, weight in weights.items():
        yield max(0, room[index]) / weight


class _Packing:
    """Who is where, and how much of each GPU is taken."""

    def __init__(self, box: Box, limits: Sequence[int]) -> None:
        self.box = box
        self.limits = limits
        self.taken = [0] * len(box)
        self.placed: dict[str, Placed] = {}
        self.chosen: dict[str, Demand] = {}  # those that may be moved

    def copy(self) -> _Packing:
        other = _Packing(self.box, self.limits)
        other.taken = list(self.taken)
        other.placed, other.chosen = dict(self.placed), dict(self.chosen)
        return other

    def room(self, index: int) -> int:
        return max(0, self.limits[index] - self.taken[index])

    def use(self, index: int) -> float:
        return self.taken[index] / self.box[index].memory

    def put_explicit(self, demand: Demand) -> bool:
        """Where the registry says; False if a GPU's memory is not enough."""
        option, devices = demand.options[0], demand.devices or ()
        if any(self.taken[i] + option.on(self.box[i]) > self.box[i].memory for i in devices):
            return False
        self._add(demand.name, Placed(devices, option), 1)
        return True

    def put(self, demand: Demand, option: Option, group: _Group) -> None:
        self.chosen[demand.name] = demand
        self._add(demand.name, Placed(group, option), 1)

    def lift(self, name: str) -> Placed:
        del self.chosen[name]
        placed = self.placed[name]
        self._add(name, placed, -1)
        return placed

    def _add(self, name: str, placed: Placed, sign: int) -> None:
        if sign > 0:
            self.placed[name] = placed
        else:
            del self.placed[name]
        for index in placed.devices:
            self.taken[index] += sign * placed.option.on(self.box[index])

    def groups(self, option: Option) -> list[_Group]:
        """Where an option has room: in linked groups if there are any, of one kind always."""
        fits = [gpu for gpu in self.box if option.on(gpu) <= self.room(gpu.index)]
        if option.devices == 1:
            return [(gpu.index,) for gpu in fits]
        linked = list(self._of_each(fits, option, lambda gpu: (gpu.kind, gpu.island)))
        return linked or list(self._of_each(fits, option, lambda gpu: gpu.kind))

    def _of_each(
        self, fits: Sequence[Gpu], option: Option, key: Callable[[Gpu], Any]
    ) -> Iterator[_Group]:
        """Of GPUs alike: aligned groups, and that of the emptiest."""
        size = option.devices
        for alike in _grouped(self.box, key):
            there = [gpu.index for gpu in alike if gpu in fits]
            whole = [gpu.index for gpu in alike]
            aligned = [tuple(whole[at : at + size]) for at in range(0, len(whole) - size + 1, size)]
            emptiest = tuple(sorted(sorted(there, key=lambda i: (self.use(i), i))[:size]))
            found = [group for group in aligned if set(group) <= set(there)]
            yield from dict.fromkeys([*found, *([emptiest] if len(emptiest) == size else [])])

    def together(self, demand: Demand, group: _Group) -> int:
        """How many of the group's GPUs have another replica of the model."""
        if demand.model == demand.name:
            return 0  # it has no other
        others = {
            index
            for name, placed in self.placed.items()
            if name != demand.name
            and name in self.chosen
            and self.chosen[name].model == demand.model
            for index in placed.devices
        }
        return len(others & set(group))

    def crowd(self, option: Option, group: _Group) -> float:
        """The use of the group's fullest GPU with the option on it."""
        return max((self.taken[i] + option.on(self.box[i])) / self.box[i].memory for i in group)

    def balance(self) -> float:
        uses = [self.use(index) for index in range(len(self.box))]
        return max(uses) / min(uses) if min(uses) else float("inf")

    def growth(self, option: Option, group: _Group) -> float:
        """By how much the sum of squared uses would grow."""
        more = [(self.use(i), option.on(self.box[i]) / self.box[i].memory) for i in group]
        return sum((use + part) ** 2 - use**2 for use, part in more)

    def cost(self, indices: Iterable[int]) -> float:
        return sum(self.use(index) ** 2 for index in indices)


def _grouped(box: Box, key: Callable[[Gpu], Any]) -> list[list[Gpu]]:
    groups: dict[Any, list[Gpu]] = {}
    for gpu in box:
        groups.setdefault(key(gpu), []).append(gpu)
    return list(groups.values())


def _packed(demands: Sequence[Demand], ground: _Packing) -> _Packing:
    """With the fewest devices each with which as many as possible find a place."""
    levels = {demand.name: 0 for demand in demands}
    best = _greedy(demands, levels, ground)
    exhausted: set[str] = set()
    while len(best.chosen) < len(demands):
        larger = [
            d for d in demands if levels[d.name] + 1 < len(d.options) and d.name not in exhausted
        ]
        if not larger:
            break
        # One that found no place first; then whoever takes the most of a GPU.
        demand = max(
            larger, key=lambda d: (d.name not in best.chosen, d.options[levels[d.name]].needs)
        )
        levels[demand.name] += 1
        tried = _greedy(demands, levels, ground)
        if len(tried.chosen) > len(best.chosen):
            best = tried
        elif levels[demand.name] + 1 == len(demand.options):
            levels[demand.name] = 0
            exhausted.add(demand.name)
    return best


def _greedy(demands: Sequence[Demand], levels: Mapping[str, int], ground: _Packing) -> _Packing:
    """The largest first, each where most is left; or where least is, if more fit so."""
    wanted = [(demand, demand.options[levels[demand.name]]) for demand in demands]
    wanted.sort(key=lambda each: (-each[1].devices, -_largest(each[1], ground.box)))
    spread = _put(wanted, ground, 1)
    if len(spread.chosen) == len(demands):
        return spread
    tight = _put(wanted, ground, -1)
    return tight if len(tight.chosen) > len(spread.chosen) else spread


def _largest(option: Option, box: Box) -> int:
    return max(option.on(gpu) for gpu in box)


def _put(wanted: Iterable[tuple[Demand, Option]], ground: _Packing, sign: int) -> _Packing:
    packing = ground.copy()
    for demand, option in wanted:
        groups = packing.groups(option)
        if groups:
            group = min(
                groups,
                key=lambda group: (
                    packing.together(demand, group),
                    sign * packing.crowd(option, group),
                    group,
                ),
            )
            packing.put(demand, option, group)
    return packing


def _even_out(packing: _Packing) -> None:
    """Moves and swaps that make uses more even, until they are, or none helps."""
    tries = itertools.count()
    while packing.balance() > BALANCE and _improved(packing, tries):
        pass


def _improved(packing: _Packing, tries: Iterator[int]) -> bool:
    fullest = sorted(range(len(packing.box)), key=lambda i: (-packing.use(i), i))
    for index in fullest:
        here = [name for name in packing.chosen if index in packing.placed[name].devices]
        for name in here:
            if _moved(packing, name, tries):
                return True
        for names in itertools.chain(
            itertools.combinations(here, 1), itertools.combinations(here, 2)
        ):
            for other in reversed(fullest):
                if _swapped(packing, names, other, index, tries):
                    return True
    return False


def _moved(packing: _Packing, name: str, tries: Iterator[int]) -> bool:
    """Elsewhere, if that is more even."""
    demand, now = packing.chosen[name], packing.placed[name]
    together = packing.together(demand, now.devices)
    packing.lift(name)
    for group in packing.groups(now.option):
        if group == now.devices or packing.together(demand, group) > together:
            continue
        if next(tries) >= _TRIES:
            break
        if packing.growth(now.option, group) < packing.growth(now.option, now.devices) - _GAIN:
            packing.put(demand, now.option, group)
            return True
    packing.put(demand, now.option, now.devices)
    return False


def _swapped(
    packing: _Packing, names: Sequence[str], other: int, index: int, tries: Iterator[int]
) -> bool:
    """Some of a GPU's single replicas for one of another's."""
    if packing.use(other) >= packing.use(index):
        return False
    mine = [(packing.chosen[name], packing.placed[name]) for name in names]
    for theirs in [n for n in packing.chosen if other in packing.placed[n].devices]:
        if next(tries) >= _TRIES:
            return False
        each = [*mine, (packing.chosen[theirs], packing.placed[theirs])]
        if any(len(placed.devices) > 1 for _, placed in each):
            continue
        before = packing.cost((index, other))
        for demand, _ in each:
            packing.lift(demand.name)
        for demand, placed in each:
            packing.put(demand, placed.option, (index if demand.name == theirs else other,))
        if packing.cost((index, other)) < before - _GAIN and _allowed(
            packing, each, (index, other)
        ):
            return True
        for demand, _ in each:
            packing.lift(demand.name)
        for demand, placed in each:
            packing.put(demand, placed.option, placed.devices)
    return False


def _allowed(
    packing: _Packing, moved: Iterable[tuple[Demand, Placed]], indices: Iterable[int]
) -> bool:
    """Within what may be given away, and no two replicas of a model on a GPU."""
    within = all(packing.taken[index] <= packing.limits[index] for index in indices)
    return within and not any(
        packing.together(demand, packing.placed[demand.name].devices) for demand, _ in moved
    )
