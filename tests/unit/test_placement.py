from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.gpus.device import GIB, Box, Gpu
from llmserve.planning.packing import BALANCE, Demand, Option
from llmserve.planning.placement import Placed, Placement, capacity, fill, place
from tests.unit.effort import calls

HEADROOM = 0.1


def box_of(*gib: int, linked: int = 64) -> Box:
    """GPUs of these sizes, so many of them linked to each other."""
    return tuple(
        Gpu(index, f"GPU {size}G", size * GIB, (9, 0), island=index // linked)
        for index, size in enumerate(gib)
    )


def needs(name: str, *each: tuple[int, float], **others: int | None) -> Demand:
    """A demand by (devices, GiB on each)."""
    options = tuple(Option(devices, int(gib * GIB)) for devices, gib in each)
    return Demand(name, options, grows=others.get("grows") or 0, at_most=others.get("at_most"))


def fixed(name: str, gib: float, *devices: int, share: float = 0.0) -> Demand:
    return Demand(name, (Option(len(devices), int(gib * GIB), share),), devices)


def loads(placed: dict[str, Placed], box: Box) -> list[int]:
    """Bytes on each GPU."""
    taken = [0] * len(box)
    for one in placed.values():
        for index in one.devices:
            taken[index] += one.option.on(box[index]) + one.extra
    return taken


def bare(placement: Placement) -> dict[str, Placed]:
    """Before anything was shared out."""
    return {name: replace(one, extra=0) for name, one in placement.placed.items()}


def ratio(placement: Placement, box: Box) -> float:
    uses = [load / gpu.memory for load, gpu in zip(loads(bare(placement), box), box, strict=True)]
    return max(uses) / min(uses) if min(uses) else math.inf


def where(placement: Placement) -> dict[str, tuple[int, ...]]:
    return {name: one.devices for name, one in placement.placed.items()}


def left(placement: Placement) -> list[str]:
    return [misfit.demand.name for misfit in placement.left]


# --- what is placed where


def test_uses_are_even() -> None:
    box = box_of(80, 80)
    gib = {"chat": 40, "code": 30, "embed": 10, "rerank": 20}
    demands = [needs(name, (1, size)) for name, size in gib.items()]
    placement = place(demands, box, HEADROOM)
    assert loads(placement.placed, box) == [50 * GIB, 50 * GIB]
    assert list(placement.placed) == list(gib)


def test_uses_of_unequal_gpus_are_even() -> None:
    box = box_of(80, 40)
    demands = [needs(f"m{size}", (1, size)) for size in (20, 16, 14, 10)]
    assert loads(place(demands, box, HEADROOM).placed, box) == [40 * GIB, 20 * GIB]


def test_an_explicit_replica_is_evened_out_by_the_others() -> None:
    box = box_of(80, 80)
    demands = [fixed("chat", 50, 1), *(needs(f"m{k}", (1, 10)) for k in range(7))]
    assert loads(place(demands, box, HEADROOM).placed, box) == [60 * GIB, 60 * GIB]


def test_the_fewest_devices_with_which_the_whole_fits() -> None:
    box = box_of(80, 80)
    chat, code = needs("chat", (1, 60), (2, 31)), needs("code", (1, 50), (2, 26))
    assert where(place([chat, code], box, HEADROOM)) == {"chat": (0,), "code": (1,)}
    embed = needs("embed", (1, 15))  # beside 60 GiB there are 12, beside 50 there are 22
    three = place([chat, code, embed], box, HEADROOM)
    assert where(three) == {"chat": (0,), "code": (1,), "embed": (1,)}
    thirds = [needs(f"m{k}", (1, 48), (2, 24)) for k in range(3)]
    placed = where(place(thirds, box, HEADROOM))
    assert sorted(placed.values()) == [(0,), (0, 1), (1,)]


def test_what_takes_the_most_on_a_device_gets_more_devices() -> None:
    """Either alone on both GPUs would do."""
    box = box_of(80, 80)
    demands = [
        needs("small", (1, 34), (2, 18)),
        needs("large", (1, 50), (2, 26)),
        needs("other", (1, 44)),
    ]
    placed = where(place(demands, box, HEADROOM))
    assert placed["large"] == (0, 1)
    assert len(placed["small"]) == 1


def test_groups_are_aligned() -> None:
    box = box_of(*[80] * 8)
    demands = [needs(f"m{k}", (2, 40)) for k in range(4)]
    assert sorted(where(place(demands, box, HEADROOM)).values()) == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_a_crooked_group_is_better_than_none() -> None:
    box = box_of(80, 80, 80, 80)
    demands = [fixed("a", 70, 0), fixed("b", 70, 3), needs("chat", (2, 40))]
    assert where(place(demands, box, HEADROOM))["chat"] == (1, 2)


def test_linked_groups_are_preferred() -> None:
    box = box_of(*[80] * 4, linked=2)
    demands = [fixed("busy", 30, 0), fixed("idle", 1, 2), needs("chat", (2, 40))]
    assert where(place(demands, box, HEADROOM))["chat"] == (2, 3)
    demands = [fixed("a", 30, 1), fixed("b", 30, 3), needs("chat", (2, 40))]
    assert where(place(demands, box, HEADROOM))["chat"] == (0, 1)


def test_unlinked_groups_are_the_last_resort() -> None:
    box = box_of(*[80] * 4, linked=2)
    demands = [fixed("a", 50, 1), fixed("b", 50, 3), needs("chat", (2, 40))]
    assert where(place(demands, box, HEADROOM))["chat"] == (0, 2)
    assert where(place([needs("chat", (4, 20))], box, HEADROOM))["chat"] == (0, 1, 2, 3)


def test_a_group_is_of_one_kind() -> None:
    box = box_of(80, 80, 40, 40)
    assert where(place([needs("chat", (2, 60))], box, HEADROOM)) == {"chat": (0, 1)}
    assert left(place([needs("chat", (3, 10))], box, HEADROOM)) == ["chat"]


def test_a_share_is_of_each_gpu() -> None:
    box = box_of(80, 40)
    half = Demand("chat", (Option(1, 30 * GIB, 0.5),))
    assert half.options[0].on(box[0]) == 40 * GIB
    assert half.options[0].on(box[1]) == 30 * GIB


def test_replicas_are_apart() -> None:
    """Also where it would be more even if they were together."""
    box = box_of(80, 80)
    demands = [needs("chat/0", (1, 20)), needs("chat/1", (1, 20)), needs("code", (1, 40))]
    placed = where(place(demands, box, HEADROOM))
    assert placed["chat/0"] != placed["chat/1"]


def test_more_replicas_than_gpus_share() -> None:
    box = box_of(80, 80)
    demands = [needs(f"chat/{k}", (1, 20)) for k in range(3)]
    placement = place(demands, box, HEADROOM)
    assert not placement.left
    assert Counter(where(placement).values()).most_common(1)[0][1] == 2


def test_a_replica_keeps_away_from_an_explicit_one() -> None:
    box = box_of(80, 80)
    demands = [fixed("chat/0", 1, 0), fixed("code", 40, 1), needs("chat/1", (1, 20))]
    assert where(place(demands, box, HEADROOM))["chat/1"] == (1,)


# --- explicit devices


def test_explicit_devices_may_take_the_headroom() -> None:
    box = box_of(80)
    demands = [fixed("chat", 10, 0, share=0.95)]
    assert loads(place(demands, box, HEADROOM).placed, box) == [int(0.95 * 80 * GIB)]


def test_place_explicit_devices_without_memory_is_a_misfit() -> None:
    box = box_of(80, 80)
    demands = [fixed("a", 50, 0), fixed("b", 40, 0, 1), fixed("c", 30, 0)]
    placement = place(demands, box, HEADROOM)
    assert where(placement) == {"a": (0,), "c": (0,)}
    (misfit,) = placement.left
    assert misfit.demand.name == "b"
    assert misfit.free == (30 * GIB, 80 * GIB)


def test_place_reports_free_memory_of_a_misfit() -> None:
    box = box_of(80, 40)
    placement = place([needs("chat", (1, 60)), needs("code", (1, 50))], box, HEADROOM)
    (misfit,) = placement.left
    assert misfit.demand.name in {"chat", "code"}
    assert misfit.free[1] == 36 * GIB
    assert misfit.free[0] in {12 * GIB, 22 * GIB}


def test_no_demand_and_no_gpu() -> None:
    assert place([], box_of(80), HEADROOM) == Placement({}, ())
    assert left(place([needs("chat", (1, 1))], (), HEADROOM)) == ["chat"]


def test_without_finish_nothing_is_shared_out() -> None:
    demands = [needs("chat", (1, 10), grows=1)]
    placement = place(demands, box_of(80), HEADROOM, finish=False)
    assert placement.placed["chat"].extra == 0


# --- what is left


def extras(demands: list[Demand], box: Box) -> dict[str, float]:
    """GiB that each got besides."""
    return {name: one.extra / GIB for name, one in place(demands, box, HEADROOM).placed.items()}


def test_what_is_left_is_shared_by_weight() -> None:
    demands = [needs("chat", (1, 30), grows=3), needs("code", (1, 10), grows=1)]
    assert extras(demands, box_of(80)) == {"chat": 24, "code": 8}


def test_fill_stops_at_at_most() -> None:
    demands = [needs("a", (1, 30), grows=1, at_most=2 * GIB), needs("b", (1, 10), grows=1)]
    assert extras(demands, box_of(80)) == {"a": 2, "b": 30}


def test_fill_gives_nothing_without_weight() -> None:
    assert extras([needs("embed", (1, 2)), needs("chat", (1, 10), grows=1)], box_of(80)) == {
        "embed": 0,
        "chat": 60,
    }


def test_a_group_grows_by_the_same_on_each_device() -> None:
    """GPU 0 is full first: with that the group stops, and `code` has GPU 1 to itself."""
    box = box_of(80, 80)
    demands = [
        fixed("embed", 32, 0),
        replace(needs("chat", (2, 20), grows=1), devices=(0, 1)),
        replace(needs("code", (1, 10), grows=1), devices=(1,)),
    ]
    assert extras(demands, box) == {"embed": 0, "chat": 20, "code": 22}


def test_fill_counts_the_surplus_of_a_share() -> None:
    demand = Demand("chat", (Option(1, 10 * GIB, 0.5),), grows=1, at_most=35 * GIB)
    assert extras([demand], box_of(80)) == {"chat": 5}
    assert extras([replace(demand, at_most=20 * GIB)], box_of(80)) == {"chat": 0}


def test_fill_gives_nothing_on_a_gpu_over_capacity() -> None:
    demands = [
        fixed("a", 75, 0),
        replace(needs("b", (1, 1), grows=1), devices=(0,)),
        replace(needs("c", (2, 1), grows=1), devices=(0, 1)),
    ]
    assert extras(demands, box_of(80, 80)) == {"a": 0, "b": 0, "c": 0}


def test_filling_again_changes_nothing() -> None:
    box = box_of(80, 80)
    demands = [needs("chat", (2, 30), grows=3), needs("code", (1, 10), grows=1)]
    placed = place(demands, box, HEADROOM).placed
    assert fill(placed, demands, box, HEADROOM) == placed


# --- on demand


def turns(demand: Demand, asleep: float = 2, *, on_demand: bool = False) -> Demand:
    """One that may sleep, and holds so many GiB then."""
    options = tuple(replace(option, asleep=int(asleep * GIB)) for option in demand.options)
    return replace(demand, options=options, on_demand=on_demand)


def lazy(demand: Demand, asleep: float = 2) -> Demand:
    return turns(demand, asleep, on_demand=True)


def stays(demand: Demand) -> Demand:
    return replace(turns(demand), pinned=True)


def displacing(placement: Placement) -> list[str]:
    return [name for name, one in placement.placed.items() if one.displaces]


def test_on_demand_goes_beside_the_others_where_it_fits() -> None:
    demands = [lazy(needs("late", (1, 40))), turns(fixed("chat", 50, 0))]
    placement = place(demands, box_of(80, 80), HEADROOM)
    assert where(placement) == {"late": (1,), "chat": (0,)}
    assert not displacing(placement)


def test_more_devices_beside_others_are_better_than_displacing() -> None:
    demands = [
        *(turns(fixed(f"m{k}", 30, k)) for k in range(2)),
        lazy(needs("x", (1, 50), (2, 26))),
    ]
    placement = place(demands, box_of(80, 80), HEADROOM)
    assert where(placement)["x"] == (0, 1)
    assert not displacing(placement)


def test_place_on_demand_displaces_the_least() -> None:
    demands = [
        turns(fixed("chat", 50, 0)),
        turns(fixed("code", 30, 1)),
        *(lazy(needs(name, (1, 60))) for name in ("x", "y", "z")),
    ]
    placement = place(demands, box_of(80, 80), HEADROOM)
    assert [where(placement)[name] for name in ("x", "y", "z")] == [(1,), (0,), (1,)]
    assert displacing(placement) == ["x", "y", "z"]


def test_linked_gpus_are_displaced_first() -> None:
    box = box_of(*[80] * 4, linked=2)
    demands = [*(turns(fixed(f"m{k}", 40, k)) for k in (1, 3)), lazy(needs("x", (2, 50)))]
    assert where(place(demands, box, HEADROOM))["x"] == (0, 2)  # nobody is there
    demands += [turns(fixed(f"m{k}", 40, k)) for k in (0, 2)]
    assert where(place(demands, box, HEADROOM))["x"] == (0, 1)


def test_replicas_on_demand_are_apart() -> None:
    demands = [
        turns(fixed("chat", 50, 0)),
        turns(fixed("code", 30, 1)),
        *(lazy(needs(f"x/{k}", (1, 60))) for k in range(2)),
    ]
    placed = where(place(demands, box_of(80, 80), HEADROOM))
    assert {placed["x/0"], placed["x/1"]} == {(0,), (1,)}
    demands = [fixed("chat", 50, 1), *(lazy(needs(f"x/{k}", (1, 20))) for k in range(2))]
    placed = where(place(demands, box_of(80, 80), HEADROOM))
    assert [placed["x/0"], placed["x/1"]] == [(0,), (1,)]


def test_the_pinned_are_not_displaced() -> None:
    box = box_of(80, 80)
    demands = [stays(fixed("chat", 20, 0)), turns(fixed("code", 60, 1)), lazy(needs("x", (1, 60)))]
    assert where(place(demands, box, HEADROOM))["x"] == (1,)
    placement = place([*demands, stays(fixed("embed", 5, 1))], box, HEADROOM)
    assert where(placement)["x"] == (1,)
    placement = place([*demands, stays(fixed("rerank", 11, 1))], box, HEADROOM)
    (misfit,) = placement.left
    assert (misfit.demand.name, misfit.free) == ("x", (52 * GIB, 1 * GIB))


def test_place_sleeping_replicas_need_room_too() -> None:
    demands = [turns(fixed("chat", 70, 0)), lazy(needs("x", (1, 20)), asleep=5)]
    (misfit,) = place(demands, box_of(80), HEADROOM).left
    assert misfit.free == (2 * GIB,)
    (misfit,) = place(
        [lazy(needs("x", (1, 70))), lazy(needs("y", (1, 20)), asleep=5)], box_of(80), HEADROOM
    ).left
    assert (misfit.demand.name, misfit.free) == ("y", (2 * GIB,))


def test_place_on_demand_shares_a_gpu_in_time() -> None:
    demands = [lazy(needs(f"x{k}", (1, 60))) for k in range(6)]
    placement = place(demands, box_of(80), HEADROOM)
    assert not placement.left
    assert displacing(placement) == ["x1", "x2", "x3", "x4", "x5"]
    assert left(place([*demands, lazy(needs("x6", (1, 60)), asleep=3)], box_of(80), HEADROOM))


def test_place_on_demand_displaces_if_sleepers_need_the_room() -> None:
    """`x` fits beside `chat`, but not with `y` asleep there as well."""
    demands = [turns(fixed("chat", 40, 0)), lazy(needs("x", (1, 30))), lazy(needs("y", (1, 60)), 4)]
    placement = place(demands, box_of(80), HEADROOM)
    assert not placement.left
    assert displacing(placement) == ["x", "y"]
    assert not displacing(place(demands[:2], box_of(80), HEADROOM))


@pytest.mark.parametrize("finish", [True, False])
def test_place_on_demand_is_independent_of_finish(*, finish: bool) -> None:
    """As they are first placed there is room beside 43 GiB; evenly, 49 and 53 are taken."""
    demands = [stays(needs(f"m{gib}-{k}", (1, gib))) for k, gib in enumerate((25, 18, 18, 17, 24))]
    for gib, missing in ((28, ["x"]), (23, [])):
        asked = [*demands, lazy(needs("x", (1, gib)))]
        assert left(place(asked, box_of(80, 80), HEADROOM, finish=finish)) == missing


def test_named_devices_on_demand_are_bounded_by_the_memory() -> None:
    demands = [
        stays(fixed("chat", 10, 0)),
        turns(fixed("code", 20, 0)),
        lazy(fixed("x", 68, 0)),
        lazy(fixed("y", 71, 0), asleep=0),
    ]
    placement = place(demands, box_of(80), HEADROOM)
    assert displacing(placement) == ["x"]
    (misfit,) = placement.left
    assert (misfit.demand.name, misfit.free) == ("y", (66 * GIB,))


def test_fill_shares_memory_among_replicas_awake_at_once() -> None:
    demands = [
        turns(fixed("embed", 3, 0), asleep=1),
        turns(needs("chat", (1, 20), grows=1)),
        lazy(needs("x", (1, 55), grows=1), asleep=4),
    ]
    # chat: beside `embed`, and `x` asleep; x: beside both asleep
    assert extras(demands, box_of(80)) == {"embed": 0, "chat": 45, "x": 14}
    small = replace(demands[2], options=(Option(1, 9 * GIB, asleep=4 * GIB),))
    assert extras([*demands[:2], small], box_of(80)) == {"embed": 0, "chat": 20, "x": 20}


def test_the_pinned_share_with_each_that_displaces_others() -> None:
    demands = [
        replace(stays(needs("chat", (1, 10))), grows=2),
        turns(needs("code", (1, 20), grows=1)),
        lazy(needs("x", (1, 50), grows=1)),
        lazy(needs("y", (1, 48), at_most=5 * GIB, grows=1)),
    ]
    # x: 72 less 10, 50 and the 4 of those asleep are 8 for `chat` and `x`, 2 to 1
    assert {name: round(extra, 3) for name, extra in extras(demands, box_of(80)).items()} == {
        "chat": 5.333,
        "code": 32.667,
        "x": 2.667,
        "y": 4.667,
    }


# --- any box, any demands

MIB = 2**20


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    count = draw(st.integers(1, 64) if draw(st.booleans()) else st.integers(1, 6))
    linked = draw(st.sampled_from([1, 2, 4, 8, 64]))
    sizes = draw(st.sampled_from([(80,), (80, 40), (24, 48, 80)]))
    run = draw(st.integers(1, 8))
    return box_of(*(sizes[k // run % len(sizes)] for k in range(count)), linked=linked)


@st.composite
def demands_for(draw: st.DrawFn, box: Box) -> list[Demand]:
    demands: list[Demand] = []
    random_ = random.Random(draw(st.integers(0, 2**32)))
    largest = draw(st.sampled_from([8, 40, 120])) * GIB
    for model in range(draw(st.integers(0, 12))):
        size = random_.randint(1, largest)
        degrees = sorted(random_.sample([1, 2, 3, 4, 8], random_.randint(1, 3)))
        share = random_.choice([0.0, 0.0, 0.3])
        options = tuple(Option(devices, size // devices + MIB, share) for devices in degrees)
        copies = random_.choice([1, 1, 1, 2, 4])
        for number in range(copies):
            demand = Demand(
                f"m{model}" if copies == 1 else f"m{model}/{number}",
                options,
                grows=random_.choice([0, 1, size]),
                at_most=random_.choice([None, 0, size]),
            )
            if random_.random() < 0.15 and degrees[0] <= len(box):
                devices = random_.sample(range(len(box)), degrees[0])
                demand = replace(demand, devices=tuple(sorted(devices)))
            demands.append(demand)
    return demands


@st.composite
def cases(draw: st.DrawFn) -> tuple[Box, list[Demand]]:
    box = draw(boxes())
    return box, draw(demands_for(box))


@settings(max_examples=120, deadline=None)
@given(cases())
def test_whatever_is_asked_for(case: tuple[Box, list[Demand]]) -> None:
    box, demands = case
    placement = place(demands, box, HEADROOM)
    asked = {demand.name: demand for demand in demands}
    nothing_is_lost(placement, asked)
    for name, one in placement.placed.items():
        demand = asked[name]
        assert one.option in demand.options
        assert len(set(one.devices)) == one.option.devices
        if demand.devices is None:
            assert len({box[index].kind for index in one.devices}) == 1
        else:
            assert one.devices == demand.devices
    nothing_is_over(placement, asked, box)
    nothing_could_grow(placement, asked, box)
    assert place(demands, box, HEADROOM) == placement


def nothing_is_lost(placement: Placement, asked: dict[str, Demand]) -> None:
    missing = left(placement)
    assert len(missing) == len(set(missing))
    assert set(missing) | set(placement.placed) == set(asked)
    assert not set(missing) & set(placement.placed)
    assert list(placement.placed) == [name for name in asked if name in placement.placed]
    assert missing == [name for name in asked if name in missing]


def nothing_is_over(placement: Placement, asked: dict[str, Demand], box: Box) -> None:
    explicit = {
        name: one for name, one in bare(placement).items() if asked[name].devices is not None
    }
    for gpu, load, explicit_bytes in zip(
        box, loads(placement.placed, box), loads(explicit, box), strict=True
    ):
        assert explicit_bytes <= gpu.memory
        assert load <= max(capacity(gpu, HEADROOM), explicit_bytes)


def nothing_could_grow(placement: Placement, asked: dict[str, Demand], box: Box) -> None:
    """But for a few bytes."""
    taken = loads(placement.placed, box)
    for name, one in placement.placed.items():
        demand = asked[name]
        assert one.extra >= 0
        assert one.extra == 0 or demand.grows
        if demand.at_most is not None:
            assert one.extra <= demand.at_most
        elif demand.grows:
            room = min(capacity(box[index], HEADROOM) - taken[index] for index in one.devices)
            assert room <= len(asked)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_sharing_out_is_fair(case: tuple[Box, list[Demand]]) -> None:
    """Who has no more is on a full GPU on which nobody has more for its weight."""
    box, demands = case
    weight = {demand.name: demand.grows for demand in demands}
    limited = {demand.name for demand in demands if demand.at_most is not None}
    placed = place(demands, box, HEADROOM).placed
    taken = loads(placed, box)
    few = len(demands)  # bytes, from rounding down
    for name in weight.keys() & placed.keys() - limited:
        if not weight[name]:
            continue
        assert any(
            capacity(box[index], HEADROOM) - taken[index] <= few
            and all(
                (one.extra - few) * weight[name] <= (placed[name].extra + few) * weight[other]
                for other, one in placed.items()
                if index in one.devices
            )
            for index in placed[name].devices
        )


@settings(max_examples=60, deadline=None)
@given(boxes(), st.integers(1, 90), st.sampled_from([1, 2, 3, 4, 8]))
def test_what_fits_alone_is_placed(box: Box, gib: int, devices: int) -> None:
    kinds = Counter(gpu.kind for gpu in box if gib * GIB <= capacity(gpu, HEADROOM))
    fits = any(count >= devices for count in kinds.values())
    placement = place([needs("chat", (devices, gib))], box, HEADROOM)
    assert bool(placement.placed) == fits


# Always the same examples: the search is bounded, and one box in some hundreds stays at 1.1-1.2.
@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 64) | st.integers(2, 8),
    sizes=st.sampled_from([(80,), (80, 40), (24, 48, 80)]),
    use=st.floats(0.1, 0.8),
    seed=st.integers(0, 2**32),
)
def test_where_an_even_placement_exists_an_even_one_is_found(
    count: int, sizes: tuple[int, ...], use: float, seed: int
) -> None:
    random_ = random.Random(seed)
    box = box_of(*(sizes[k % len(sizes)] for k in range(count)))
    needed: list[int] = []
    for gpu in box:
        whole = int(gpu.memory * use)
        cuts = sorted(random_.randint(1, whole - 1) for _ in range(random_.randint(0, 2)))
        needed += [end - start for start, end in itertools.pairwise([0, *cuts, whole])]
    random_.shuffle(needed)
    demands = [Demand(f"m{k}", (Option(1, size),)) for k, size in enumerate(needed)]
    placement = place(demands, box, HEADROOM)
    assert not placement.left
    assert ratio(placement, box) <= BALANCE


@settings(max_examples=40, deadline=None)
@given(count=st.integers(2, 16), seed=st.integers(0, 2**32))
def test_replicas_are_apart_where_there_is_room(count: int, seed: int) -> None:
    random_ = random.Random(seed)
    box = box_of(*[80] * count)
    demands = [
        needs(f"m{model}/{number}", (1, random_.randint(1, 70 // 4)))
        for model in range(4)
        for number in range(random_.randint(2, count))
    ]
    placement = place(demands, box, HEADROOM)
    assert not placement.left
    for _, same in itertools.groupby(demands, key=lambda demand: demand.model):
        devices = [placement.placed[demand.name].devices for demand in same]
        assert len(set(devices)) == len(devices)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_order_does_not_matter_without_explicit_devices(case: tuple[Box, list[Demand]]) -> None:
    box, demands = case
    chosen = [replace(demand, devices=None) for demand in demands]
    forth, back = place(chosen, box, HEADROOM), place(chosen[::-1], box, HEADROOM)
    assert where(forth) == where(back)


def every_placement(demands: list[Demand], box: Box) -> list[int]:
    """The devices in all of each linked placement within the capacity."""
    found: list[int] = []
    taken = [0] * len(box)

    def descend(rest: list[Demand], devices: int) -> None:
        if not rest:
            found.append(devices)
            return
        for option in rest[0].options:
            for group in itertools.combinations(range(len(box)), option.devices):
                if any(taken[g] + option.needs > capacity(box[g], HEADROOM) for g in group):
                    continue
                for g in group:
                    taken[g] += option.needs
                descend(rest[1:], devices + option.devices)
                for g in group:
                    taken[g] -= option.needs

    descend(demands, 0)
    return found


@settings(max_examples=60, deadline=None)
@given(count=st.integers(2, 4), sizes=st.lists(st.integers(2, 100), min_size=1, max_size=4))
def test_few_demands_get_the_fewest_devices_there_can_be(count: int, sizes: list[int]) -> None:
    box = box_of(*[80] * count)
    demands = [
        needs(f"m{k}", *((devices, size / devices + 1) for devices in (1, 2, 4)))
        for k, size in enumerate(sizes)
    ]
    possible = every_placement(demands, box)
    placement = place(demands, box, HEADROOM)
    assert bool(placement.left) == (not possible)
    if possible:
        assert sum(len(devices) for devices in where(placement).values()) == min(possible)


# --- effort


@pytest.mark.parametrize(
    ("gpus", "models", "largest", "limit"),
    [
        (64, 100, 25, 1_600_000),
        (64, 100, 41, 1_600_000),
        (64, 100, 75, 1_600_000),
        (8, 12, 75, 300_000),
    ],
)
def test_it_is_quick(gpus: int, models: int, largest: int, limit: int) -> None:
    random_ = random.Random(0)
    demands = []
    for k in range(models):
        size = random_.uniform(largest / 2, largest)
        each = ((devices, size / devices + 1) for devices in (1, 2, 4, 8))
        demands.append(needs(f"m{k}", *each, grows=1))
    _, effort = calls(lambda: place(demands, box_of(*[80] * gpus, linked=8), HEADROOM))
    assert effort < limit


@st.composite
def registries(draw: st.DrawFn) -> tuple[Box, list[Demand]]:
    """Demands of which some are pinned and some on demand."""
    box, demands = draw(cases())
    random_ = random.Random(draw(st.integers(0, 2**32)))
    kinds = {demand.model: random_.choice(["eager", "pinned", "lazy"]) for demand in demands}
    asleep = {demand.model: random_.choice([0.02, 0.1, 0.5]) for demand in demands}
    return box, [
        replace(
            demand,
            options=tuple(
                replace(option, asleep=int(asleep[demand.model] * option.needs))
                for option in demand.options
            ),
            pinned=kinds[demand.model] == "pinned",
            on_demand=kinds[demand.model] == "lazy",
        )
        for demand in demands
    ]


@settings(max_examples=120, deadline=None)
@given(registries())
def test_place_any_replica_fits_while_awake(case: tuple[Box, list[Demand]]) -> None:
    box, demands = case
    placement = place(demands, box, HEADROOM)
    asked = {demand.name: demand for demand in demands}
    nothing_is_lost(placement, asked)
    alone = place([demand for demand in demands if not demand.on_demand], box, HEADROOM)
    assert {n: d for n, d in where(placement).items() if not asked[n].on_demand} == where(alone)
    sums = {gpu.index: scenes_of(gpu, placement, asked) for gpu in box}
    for gpu in box:
        there = [asked[n] for n, one in placement.placed.items() if gpu.index in one.devices]
        explicit = any(demand.devices is not None for demand in there)
        limit = gpu.memory if explicit else capacity(gpu, HEADROOM)
        assert max(sums[gpu.index].values()) <= limit
    for name, one in placement.placed.items():
        assert asked[name].on_demand or not one.displaces
        if asked[name].grows and asked[name].at_most is None:
            assert any(
                total > capacity(box[index], HEADROOM) - len(demands)
                for index in one.devices
                for turn, total in sums[index].items()
                if asked[name].pinned or turn == (name if one.displaces else "")
            )
    assert place(demands, box, HEADROOM) == placement
    tried = place(demands, box, HEADROOM, finish=False)
    assert bool(left(tried)) == bool(placement.left)


def scenes_of(gpu: Gpu, placement: Placement, asked: dict[str, Demand]) -> dict[str, int]:
    """Bytes on a GPU at the start, and while any one that is on demand is awake."""
    there = {n: one for n, one in placement.placed.items() if gpu.index in one.devices}
    whole = {n: one.option.on(gpu) + one.extra for n, one in there.items()}
    asleep = {n: one.option.asleep for n, one in there.items()}
    start = sum(asleep[n] if one.displaces else whole[n] for n, one in there.items())
    return {"": start} | {
        turn: sum(whole[n] if asked[n].pinned or n == turn else asleep[n] for n in there)
        for turn in there
        if asked[turn].on_demand
    }


@settings(max_examples=60, deadline=None)
@given(registries())
def test_place_without_on_demand_ignores_sleep(case: tuple[Box, list[Demand]]) -> None:
    box, demands = case
    eager = [replace(demand, on_demand=False) for demand in demands]
    bare_ = [
        replace(
            demand,
            pinned=False,
            options=tuple(replace(option, asleep=0) for option in demand.options),
        )
        for demand in eager
    ]
    one, other = place(eager, box, HEADROOM), place(bare_, box, HEADROOM)
    assert where(one) == where(other)
    assert loads(one.placed, box) == loads(other.placed, box)
    assert [misfit.free for misfit in one.left] == [misfit.free for misfit in other.left]
