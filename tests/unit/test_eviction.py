from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.lifecycle.eviction import Resident, plan_eviction
from llmserve.lifecycle.placement import HOST_MEMORY, Level, Place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmserve.lifecycle.eviction import Steps
    from llmserve.lifecycle.placement import Takes

    Case = tuple[Takes, Takes, list[Resident[int]]]

STOPPED, DISK, NEAR, KV_RELEASED, READY = Level
GPU, OTHER = Place(0), Place(1)


def engine(key: str, size: int, *, level: Level = READY, value: float = 0.0) -> Resident[str]:
    """On GPU 0, and unable to sleep."""
    return Resident(key, level, {READY: {GPU: size}}, evictable=True, value=(value,))


def sleeper(
    key: str,
    *,
    ready: int = 60,
    kv_released: int = 40,
    asleep: int = 2,
    host: int = 20,
    level: Level = READY,
    value: float = 0.0,
    evictable: bool = True,
) -> Resident[str]:
    """On GPU 0, with its weights in host memory when it sleeps."""
    holds = {
        READY: {GPU: ready},
        KV_RELEASED: {GPU: kv_released},
        NEAR: {GPU: asleep, HOST_MEMORY: host},
    }
    return Resident(key, level, holds, evictable, (value,))


def stays(key: str, size: int) -> Resident[str]:
    return Resident(key, READY, {READY: {GPU: size}}, evictable=False)


@pytest.mark.parametrize(
    ("wanted", "residents", "steps"),
    [
        pytest.param(40, [engine("a", 60)], [], id="all fit"),
        pytest.param(41, [engine("a", 60)], [("a", STOPPED)], id="one byte too much"),
        pytest.param(60, [sleeper("a")], [("a", KV_RELEASED)], id="the KV cache is enough"),
        pytest.param(61, [sleeper("a")], [("a", NEAR)], id="the weights too"),
        pytest.param(99, [sleeper("a")], [("a", STOPPED)], id="the last bytes too"),
        pytest.param(
            99, [sleeper("a", level=NEAR)], [("a", STOPPED)], id="a sleeper that is in the way"
        ),
        pytest.param(98, [sleeper("a", level=NEAR)], [], id="a sleeper beside it"),
        pytest.param(
            50,
            [engine("a", 50, value=2), engine("b", 50, value=1)],
            [("b", STOPPED)],
            id="the least value",
        ),
        pytest.param(
            50,
            [
                engine("small", 10, value=1),
                engine("large", 60, value=2),
                engine("rest", 30, value=3),
            ],
            [("large", STOPPED)],
            id="one whose going changes nothing stays",
        ),
        pytest.param(
            60,
            [stays("pinned", 40), engine("a", 40, value=9)],
            [("a", STOPPED)],
            id="one that stays is left",
        ),
        pytest.param(
            61, [stays("pinned", 40), engine("a", 40)], None, id="one that stays is too large"
        ),
        pytest.param(101, [], None, id="larger than all there is"),
        pytest.param(
            90, [sleeper("a", evictable=False, level=NEAR)], [], id="a sleeper that has to stay"
        ),
        pytest.param(
            99,
            [sleeper("a", evictable=False, level=NEAR)],
            None,
            id="a sleeper in the way that stays",
        ),
    ],
)
def test_plan_of_one_eviction(
    wanted: int, residents: Sequence[Resident[str]], steps: Steps[str] | None
) -> None:
    assert plan_eviction({GPU: wanted}, {GPU: 100}, residents) == steps


def test_weights_without_host_memory_are_not_offloaded() -> None:
    capacity = {GPU: 100, HOST_MEMORY: 30}
    others = [sleeper("asleep", level=NEAR, value=9), sleeper("awake")]
    assert plan_eviction({GPU: 90}, capacity, others) == [("awake", STOPPED)]
    assert plan_eviction({GPU: 90}, capacity | {HOST_MEMORY: 40}, others) == [("awake", NEAR)]


def test_a_step_is_as_small_as_the_other_steps_allow() -> None:
    """Host memory that one does not take in the end is there for the other."""
    small = sleeper("small", ready=50, kv_released=50, asleep=0, host=10, value=1)
    large = sleeper("large", ready=60, kv_released=60, asleep=0, host=10, value=2)
    assert plan_eviction({GPU: 45}, {GPU: 100, HOST_MEMORY: 10}, [small, large]) == [
        ("large", NEAR)
    ]


def test_only_residents_of_the_gpu_are_lowered() -> None:
    here, there = engine("here", 50), Resident("there", READY, {READY: {OTHER: 50}}, evictable=True)
    both = Resident("both", READY, {READY: {GPU: 25, OTHER: 25}}, evictable=True, value=(1.0,))
    capacity = {GPU: 80, OTHER: 80}
    assert plan_eviction({GPU: 50}, capacity, [there, here, both]) == [("here", STOPPED)]
    assert plan_eviction({GPU: 80, OTHER: 5}, capacity, [there, here, both]) == [
        ("here", STOPPED),
        ("both", STOPPED),
    ]
    assert plan_eviction({GPU: 60, OTHER: 60}, capacity, [there, here, both]) is not None


def test_what_has_no_capacity_is_not_bounded() -> None:
    assert plan_eviction({GPU: 10**15}, {}, [engine("a", 10**15)]) == []


# --- for all

_SIZE = st.integers(0, 12)
_PLACES = (HOST_MEMORY, GPU, OTHER)


@st.composite
def _resident(draw: st.DrawFn, key: int) -> Resident[int]:
    """One that holds on a GPU no more at a lower level, and in host memory only asleep."""
    holds: dict[Level, Takes] = {}
    on_gpus = {gpu: draw(_SIZE) for gpu in draw(st.sets(st.sampled_from((GPU, OTHER)), min_size=1))}
    holds[READY] = on_gpus
    for level in (KV_RELEASED, NEAR, DISK):
        if draw(st.booleans()):
            on_gpus = {gpu: draw(st.integers(0, size)) for gpu, size in on_gpus.items()}
            host = {HOST_MEMORY: draw(_SIZE)} if level is NEAR else {}
            holds[level] = on_gpus | host
    level = draw(st.sampled_from(sorted(holds)))
    return Resident(key, level, holds, draw(st.booleans()), (float(draw(st.integers(0, 3))),))


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    """The bytes needed, the capacities, and residents that fit."""
    residents = [draw(_resident(key)) for key in range(draw(st.integers(0, 5)))]
    capacity = {
        place: sum(one.at(one.level).get(place, 0) for one in residents) + draw(_SIZE)
        for place in _PLACES
    }
    return {gpu: draw(st.integers(0, 40)) for gpu in (GPU, OTHER)}, capacity, residents


def _fits(
    wanted: Takes, capacity: Takes, residents: Sequence[Resident[int]], to: dict[int, Level]
) -> bool:
    levels = [(one, to.get(one.key, one.level)) for one in residents]
    return all(
        wanted.get(place, 0) + sum(one.at(level).get(place, 0) for one, level in levels) <= size
        for place, size in capacity.items()
    )


@given(_cases())
def test_the_result_fits(case: Case) -> None:
    steps = plan_eviction(*case)
    assert steps is None or _fits(*case, dict(steps))


@given(_cases())
def test_no_plan_only_if_all_evictable_do_not_suffice(case: Case) -> None:
    bottom = {one.key: STOPPED for one in case[2] if one.evictable}
    assert (plan_eviction(*case) is None) == (not _fits(*case, bottom))


@given(_cases())
def test_steps_lower_evictable_residents_to_their_levels(case: Case) -> None:
    steps = plan_eviction(*case) or []
    by_key = {one.key: one for one in case[2]}
    assert len(dict(steps)) == len(steps)
    for key, level in steps:
        assert by_key[key].evictable
        assert level < by_key[key].level
        assert level in {STOPPED, *by_key[key].holds}


@given(_cases())
def test_each_step_is_necessary_and_smallest(case: Case) -> None:
    steps = dict(plan_eviction(*case) or [])
    for one in case[2]:
        smaller = [each for each in one.holds if steps.get(one.key, one.level) < each <= one.level]
        assert not any(_fits(*case, steps | {one.key: each}) for each in smaller)


@given(
    count=st.integers(1, 6),
    free=st.integers(0, 9),
    wanted=st.integers(0, 60),
    order=st.randoms(use_true_random=False),
)
def test_least_valuable_of_equals_are_evicted_and_no_more(
    count: int, free: int, wanted: int, order: object
) -> None:
    values = list(range(count))
    order.shuffle(values)  # type: ignore[attr-defined]  # random.Random
    residents = [Resident(each, READY, {READY: {GPU: 10}}, True, (float(each),)) for each in values]
    steps = plan_eviction({GPU: wanted}, {GPU: 10 * count + free}, residents)
    needed = max(0, -(-(wanted - free) // 10))
    if needed > count:
        assert steps is None
    else:
        assert steps is not None
        assert sorted(steps) == [(each, STOPPED) for each in range(needed)]
