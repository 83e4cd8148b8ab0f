from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.gpus.device import GIB, Box, Gpu
from llmserve.planning.packing import Demand, Option, Packing, Topology
from llmserve.planning.packing_search import even_out, pack


def box_of(count: int, *, gib: int = 80, linked: int = 64) -> Box:
    """Equal GPUs, so many of them linked to each other."""
    return tuple(Gpu(k, "GPU", gib * GIB, (9, 0), island=k // linked) for k in range(count))


def empty(box: Box) -> Packing:
    return Packing(Topology(box), [gpu.memory for gpu in box])


def demand(name: str, gib: float, devices: int = 1) -> Demand:
    return Demand(name, (Option(devices, int(gib * GIB)),))


def put(packing: Packing, name: str, gib: float, g: int) -> None:
    one = demand(name, gib)
    packing.put(one, one.options[0], (g,))


def packed(sizes: list[float], box: Box) -> Packing:
    packing = empty(box)
    pack([demand(f"m{k}", gib) for k, gib in enumerate(sizes)], packing)
    return packing


def test_among_many_gpus_only_neighbours_make_groups() -> None:
    """Of 64 GPUs there are 635,376 groups of four."""
    groups = Topology(box_of(64)).among(tuple(range(64)), 4)
    assert len(groups) == 61
    assert all(group[-1] - group[0] == 3 for group in groups)


def test_flaws_of_a_group() -> None:
    topology = Topology(box_of(4, linked=2))
    single, aligned, crooked = map(topology.flaws, ((1,), (2, 3), (1, 2)))
    assert single == aligned == 0
    assert crooked > Topology(box_of(4)).flaws((1, 2)) > 0  # and not linked


def test_evening_out_mends_what_greedy_leaves() -> None:
    """Largest first ends with 33 and 27 GiB."""
    packing = packed([15, 15, 10, 10, 10], box_of(2))
    assert sorted(packing.loads) == [25 * GIB, 35 * GIB]
    assert not packing.is_even()
    even_out(packing)
    assert packing.loads == [30 * GIB, 30 * GIB]


def test_pack_makes_room_by_repacking() -> None:
    """Largest first ends with 70 and 75 GiB, and no room for 15 GiB."""
    packing = packed([45, 30, 25, 25, 20, 15], box_of(2))
    assert len(packing.where) == 6
    assert packing.loads == [80 * GIB, 80 * GIB]


def test_pack_leaves_reserved_bytes() -> None:
    packing = empty(box_of(2))
    fixed = demand("fixed", 60)
    packing.reserve(fixed, fixed.options[0], (1,))
    pack([demand(f"m{k}", 20) for k in range(3)], packing)
    even_out(packing)
    assert packing.loads == [60 * GIB, 60 * GIB]
    assert fixed not in packing.where


def test_replicas_that_are_together_are_parted() -> None:
    packing = empty(box_of(2))
    for number in range(2):
        put(packing, f"chat/{number}", 10, 0)
        put(packing, f"m{number}", 10, 1)
    assert together(packing) == 1
    even_out(packing)
    assert together(packing) == 0
    assert packing.is_even()


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 16), many=st.integers(0, 40), seed=st.integers(0, 2**32))
def test_even_out_keeps_demands_and_separation(count: int, many: int, seed: int) -> None:
    random_ = random.Random(seed)
    packing = empty(box_of(count, linked=4))
    demands = [
        demand(f"m{k // 2}/{k % 2}", random_.uniform(1, 60), random_.choice([1, 1, 2]))
        for k in range(many)
    ]
    pack(demands, packing)
    before = set(packing.where)
    assert before <= set(demands)
    pairs = together(packing)
    even_out(packing)
    assert set(packing.where) == before
    assert packing.loads == loads(packing)
    assert all(packing.room(g) >= 0 for g in range(count))
    assert together(packing) <= pairs


def loads(packing: Packing) -> list[int]:
    """Bytes on each GPU, as the sum of what is there."""
    taken = [0] * len(packing.loads)
    for option, group in packing.where.values():
        for g in group:
            taken[g] += option.needs
    return taken


def together(packing: Packing) -> int:
    """Pairs of replicas of a model on a GPU."""
    each = (models.count(model) for models in packing.models for model in set(models))
    return sum(count * (count - 1) // 2 for count in each)
