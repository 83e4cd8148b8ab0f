from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.admission import Slot, Slots
from llmserve.errors import Overloaded


def test_a_full_model_refuses_and_says_its_limit() -> None:
    slots = Slots("chat", 2)
    slots.take()
    slots.take()
    with pytest.raises(Overloaded) as refused:
        slots.take()
    assert "`chat` has 2 requests in flight" in refused.value.message
    assert refused.value.headers() == {"retry-after": "1"}
    assert slots.count() == 2


def test_a_slot_left_twice_is_given_back_once() -> None:
    slots = Slots("chat", 2)
    slots.take()
    slot = slots.take()
    assert slots.count() == 2
    slot.release()
    slot.release()
    assert slots.count() == 1


@given(limit=st.integers(1, 5), steps=st.lists(st.integers(-1, 9), max_size=60))
def test_in_flight_stays_between_zero_and_the_limit(limit: int, steps: list[int]) -> None:
    """A step takes a slot (-1) or leaves the nth one ever taken, perhaps again."""
    slots = Slots("chat", limit)
    taken: list[Slot] = []
    held: set[int] = set()
    for step in steps:
        if step >= 0:
            if step < len(taken):
                taken[step].release()
                held.discard(step)
        elif len(held) < limit:
            held.add(len(taken))
            taken.append(slots.take())
        else:
            with pytest.raises(Overloaded):
                slots.take()
        assert slots.count() == len(held)
        assert 0 <= slots.count() <= limit
