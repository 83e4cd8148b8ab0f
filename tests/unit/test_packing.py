from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.gpus.device import GIB, Box, Gpu
from llmserve.planning.packing import Effort, Item, Packing, Topology, even_out, pack

EFFORT = 20_000


def box_of(count: int, *, gib: int = 80, linked: int = 64) -> Box:
    """Equal GPUs, so many of them linked to each other."""
    return tuple(Gpu(k, "GPU", gib * GIB, (9, 0), island=k // linked) for k in range(count))


def empty(box: Box) -> Packing:
    return Packing(box, [gpu.memory for gpu in box])


def item(name: str, gib: float, box: Box, devices: int = 1, model: str = "") -> Item:
    return Item(name, model or name, devices, (int(gib * GIB),) * len(box))


def packed(sizes: list[float], box: Box) -> Packing:
    items = [item(f"m{k}", gib, box) for k, gib in enumerate(sizes)]
    return pack(items, empty(box), Effort(EFFORT))


def test_groups_are_of_linked_gpus_where_there_are_enough() -> None:
    topology = Topology(box_of(4, linked=2), linked=True)
    assert topology.among((0, 1, 2, 3), 2) == [(0, 1), (2, 3)]
    assert topology.pools(4) == [(0, 1, 2, 3)]
    assert len(topology.unlinked().among((0, 1, 2, 3), 2)) == 6


def test_of_many_gpus_only_neighbours_make_groups() -> None:
    """Of 64 GPUs there are 635,376 groups of four."""
    box = box_of(64)
    groups = Topology(box, linked=True).among(tuple(range(64)), 4)
    assert len(groups) == 61
    assert all(group[-1] - group[0] == 3 for group in groups)


def test_flaws_of_a_group() -> None:
    topology = Topology(box_of(4, linked=2), linked=True)
    single, aligned, crooked = map(topology.flaws, ((1,), (2, 3), (1, 2)))
    assert single == aligned == 0
    assert crooked > 1  # and not linked
    assert 0 < Topology(box_of(4), linked=True).flaws((1, 2)) < 1


def test_evening_out_mends_what_greedy_leaves() -> None:
    """Largest first ends with 33 and 27 GiB."""
    packing = packed([15, 15, 10, 10, 10], box_of(2))
    assert sorted(packing.loads) == [25 * GIB, 35 * GIB]
    assert not packing.is_even()
    even_out(packing)
    assert packing.loads == [30 * GIB, 30 * GIB]


def test_room_is_made_for_what_is_left() -> None:
    """Largest first ends with 70 and 75 GiB, and no room for 15 GiB."""
    packing = packed([45, 30, 25, 25, 20, 15], box_of(2))
    assert not packing.left
    assert packing.loads == [80 * GIB, 80 * GIB]


def test_what_is_fixed_stays() -> None:
    box = box_of(2)
    packing = empty(box)
    packing.fix(item("fixed", 60, box), (1,))
    packing = pack([item(f"m{k}", 20, box) for k in range(3)], packing, Effort(EFFORT))
    even_out(packing)
    assert packing.loads == [60 * GIB, 60 * GIB]
    assert "fixed" not in {one.name for one in packing.where}


def test_replicas_that_are_together_are_parted() -> None:
    box = box_of(2)
    packing = empty(box)
    for number in range(2):
        packing.put(item(f"chat/{number}", 10, box, model="chat"), (0,))
        packing.put(item(f"m{number}", 10, box), (1,))
    assert packing.crowded() == [0]
    even_out(packing)
    assert packing.crowded() == []
    assert packing.is_even()


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 16), many=st.integers(0, 40), seed=st.integers(0, 2**32))
def test_evening_out_loses_nothing_and_brings_no_replicas_together(
    count: int, many: int, seed: int
) -> None:
    random_ = random.Random(seed)
    box = box_of(count, linked=4)
    items = [
        item(f"m{k}", random_.uniform(1, 60), box, random_.choice([1, 1, 2]), f"m{k // 2}")
        for k in range(many)
    ]
    packing = pack(items, empty(box), Effort(EFFORT))
    before = set(packing.where)
    assert before.isdisjoint(packing.left)
    assert before.union(packing.left) == set(items)
    pairs = together(packing)
    even_out(packing)
    assert set(packing.where) == before
    assert packing.loads == loads(packing)
    assert all(packing.room(g) >= 0 for g in range(count))
    assert together(packing) <= pairs


def loads(packing: Packing) -> list[int]:
    """Bytes on each GPU, added up anew."""
    taken = [0] * len(packing.loads)
    for one, group in packing.where.items():
        for g in group:
            taken[g] += one.takes[g]
    return taken


def together(packing: Packing) -> int:
    """Pairs of replicas of a model on a GPU."""
    each = (models.count(model) for models in packing.models for model in set(models))
    return sum(count * (count - 1) // 2 for count in each)
