from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.lifecycle.dispatch import (
    DispatchRequest,
    Load,
    Lottery,
    Policy,
    PrefixAffinity,
    ShortestQueue,
    _blocks,
    policy_from_spec,
)
from tests.fakes import spec


@dataclass(eq=False)
class Replica:
    number: int
    load: Load = field(default_factory=Load)


def replicas(*tokens: int) -> list[Replica]:
    return [Replica(number, Load(min(each, 1), each)) for number, each in enumerate(tokens)]


def ask(text: str = "", model: str = "chat", answer: int = 512) -> DispatchRequest:
    return DispatchRequest.from_body(model, {"prompt": text}, answer)


def tokens_of(body: dict[str, Any], answer: int = 512) -> int:
    return DispatchRequest.from_body("chat", body, answer).tokens


def text(seed: int, characters: int) -> str:
    return "".join(random.Random(seed).choices("abcdefgh ", k=characters))


# --- what a request takes


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "x" * 400}, 100),
        ({"prompt": ["x" * 400, "y" * 40]}, 110),
        ({"prompt": [1, 2, 3]}, 3),
        ({"prompt": [[1, 2, 3], [4]]}, 4),
        ({"messages": [{"role": "user", "content": "x" * 80}] * 3}, 60),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 80}]}]}, 20),
        ({"system": "x" * 40, "messages": [{"role": "user", "content": "x" * 40}]}, 20),
        ({"instructions": "x" * 40, "input": "x" * 40}, 20),
        ({"input": [{"type": "function_call_output", "output": "x" * 40}]}, 10),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "data:" + "A" * 9999}},
                            {"type": "text", "text": "x" * 40},
                        ],
                    }
                ]
            },
            10,
        ),
        ({}, 0),
    ],
)
def test_a_prompt_s_tokens_are_those_of_its_texts(body: dict[str, Any], tokens: int) -> None:
    assert tokens_of(body, answer=0) == tokens


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({}, 512),
        ({"max_tokens": 9}, 512),
        ({"max_tokens": 10**9}, 512),
        ({"n": 4}, 2048),
        ({"n": 0}, 512),
        ({"n": True}, 512),
        ({"n": "many"}, 512),
    ],
)
def test_answer_counts_the_same_for_any_max_tokens(body: dict[str, Any], tokens: int) -> None:
    assert tokens_of(body) == tokens


def test_request_without_text_output_counts_its_prompt_only() -> None:
    assert tokens_of({"input": "x" * 40, "max_tokens": 9}, answer=0) == 10


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["content", "text", "output", "role"]), inner)
    ),
    max_leaves=20,
)
KEYS = st.sampled_from(["messages", "prompt", "input", "system", "max_tokens", "n"])


@given(st.dictionaries(KEYS, JSON))
def test_invalid_body_is_weighed(body: dict[str, Any]) -> None:
    chosen = replicas(0, 0)
    made = DispatchRequest.from_body("chat", body, 512)
    assert made.tokens > 0
    assert PrefixAffinity().choose(chosen, made) in chosen


def test_deeply_nested_body_is_weighed() -> None:
    nested: Any = "x" * 40
    for _ in range(5000):
        nested = [nested]
    assert tokens_of({"messages": nested}, answer=0) == 10


# --- lottery


def test_the_lottery_s_shares_follow_the_weights() -> None:
    lottery = Lottery((1.0, 2.0, 5.0), random.Random(7))
    three = replicas(0, 0, 0)
    drawn = Counter(lottery.choose(three, ask()).number for _ in range(8000))
    for number, share in enumerate((1000, 2000, 5000)):
        assert drawn[number] == pytest.approx(share, rel=0.1)


def test_lottery_s_shares_hold_among_ready_replicas() -> None:
    lottery = Lottery((1.0, 2.0, 5.0), random.Random(7))
    _, *left = replicas(0, 0, 0)
    drawn = Counter(lottery.choose(left, ask()).number for _ in range(7000))
    assert drawn.keys() == {1, 2}
    assert drawn[2] == pytest.approx(5000, rel=0.1)


# --- shortest queue

LOADS = st.lists(
    st.builds(Load, requests=st.integers(0, 3), tokens=st.integers(0, 3)), min_size=1, max_size=6
)


@given(st.lists(LOADS, min_size=1, max_size=8))
def test_no_replica_with_more_tokens_than_another_is_picked(rounds: list[list[Load]]) -> None:
    policy = ShortestQueue()
    for loads in rounds:
        ready = [Replica(number, load) for number, load in enumerate(loads)]
        chosen = policy.choose(ready, ask()).load
        assert (chosen.tokens, chosen.requests) == min((e.tokens, e.requests) for e in loads)


def test_idle_replicas_take_turns() -> None:
    policy = ShortestQueue()
    idle = replicas(0, 0, 0, 9)
    assert [policy.choose(idle, ask()).number for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("policy", [ShortestQueue(), PrefixAffinity()])
def test_requests_of_very_different_size_are_spread_by_size(policy: Policy) -> None:
    chance = random.Random(3)
    four = replicas(0, 0, 0, 0)
    for number in range(400):
        size = chance.choice((40, 400, 40_000))
        one = ask(text(number, size))
        policy.choose(four, one).load.add(one.tokens)
    loads = [replica.load.tokens for replica in four]
    assert max(loads) - min(loads) <= 40_000 // 4 + 512


# --- prefix affinity


def session(seed: int) -> str:
    """A conversation's beginning: some 1000 characters that are its own."""
    return text(seed, 1000 + seed % 300)


def test_repeats_go_to_the_replica_that_saw_the_prefix() -> None:
    policy, four = PrefixAffinity(), replicas(0, 0, 0, 0)
    chance = random.Random(5)
    saw: dict[int, int] = {}
    held: list[tuple[Replica, int]] = []
    repeats = same = 0
    for turn in range(2000):
        seed = chance.randrange(100)
        one = ask(session(seed) + text(1000 + turn, 200))
        chosen = policy.choose(four, one)
        chosen.load.add(one.tokens)
        held.append((chosen, one.tokens))
        if len(held) > 16:  # in flight at any time
            replica, tokens = held.pop(0)
            replica.load.remove(tokens)
        repeats += seed in saw
        same += saw.get(seed) == chosen.number
        saw[seed] = chosen.number
    assert same / repeats > 0.9
    assert len(set(saw.values())) == 4


def test_growing_conversation_keeps_its_replica() -> None:
    policy, three = PrefixAffinity(), replicas(0, 0, 0)
    messages = [{"role": "system", "content": text(0, 600)}]
    numbers = set()
    for turn in range(8):
        messages.append({"role": "user", "content": text(turn + 1, 300)})
        one = DispatchRequest.from_body("chat", {"messages": messages}, 512)
        numbers.add(policy.choose(three, one).number)
        messages.append({"role": "assistant", "content": text(turn + 100, 300)})
    assert len(numbers) == 1


def test_common_prefix_is_spread_when_load_is_uneven() -> None:
    policy, four = PrefixAffinity(), replicas(0, 0, 0, 0)
    for turn in range(400):  # all in flight at once
        one = ask(text(0, 2000) + text(turn + 1, 100))
        policy.choose(four, one).load.add(one.tokens)
    loads = [replica.load.tokens for replica in four]
    assert min(loads) > 0.9 * max(loads)


def test_shortest_queue_among_holders_of_a_prefix_is_chosen() -> None:
    policy = PrefixAffinity()
    busy, lent, idle = replicas(50_000, 0, 0)
    one = ask(text(0, 2000))
    policy.choose([busy], one)
    assert policy.choose([busy, lent], one) is lent  # too uneven
    assert policy.choose([busy, lent, idle], one) is lent


def test_a_long_known_prefix_outweighs_some_load() -> None:
    policy = PrefixAffinity()
    holder, idle = replicas(12_000, 0)
    policy.choose([holder], ask(text(0, 512)))
    assert policy.choose([holder, idle], ask(text(0, 512))) is idle
    policy.choose([holder], ask(text(1, 32_000)))
    assert policy.choose([holder, idle], ask(text(1, 32_000))) is holder


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (ask(text(0, 600) + "a"), ask(text(0, 600) + "b"), True),
        (ask("a" + text(0, 600)), ask("b" + text(0, 600)), False),
        (ask(text(0, 600)), ask(text(0, 600), model="adapter"), False),
        (ask(text(0, 500)), ask(text(0, 500)), False),  # less than a block
        (
            DispatchRequest("chat", [list(range(200))], 200),
            DispatchRequest("chat", [[*range(128), 7, 7]], 130),
            True,
        ),
        (
            DispatchRequest("chat", [list(range(200))], 200),
            DispatchRequest("chat", [[7, *range(200)]], 201),
            False,
        ),
    ],
    ids=["same", "other beginning", "other model", "short", "ids", "other ids"],
)
def test_a_prefix_is_known_by_whole_blocks_from_the_start(
    first: DispatchRequest, second: DispatchRequest, *, same: bool
) -> None:
    policy = PrefixAffinity()
    one, other = replicas(0, 0)
    chosen = policy.choose([one, other], first)
    assert (policy.choose([one, other], second) is chosen) is same


def test_forgotten_replica_holds_no_prefix() -> None:
    policy = PrefixAffinity()
    one, other = replicas(0, 0)
    prompt = ask(text(0, 2000))
    policy.choose([one], prompt)
    assert policy.choose([other], prompt) is other  # `one` is not ready
    policy.forget(other.number)
    assert [policy.choose([one, other], prompt) for _ in range(3)] == [one] * 3
    policy.forget(one.number)
    assert not policy._seen


def test_kept_blocks_are_bounded_and_old_ends_go_first() -> None:
    policy = PrefixAffinity(kept_blocks=10)
    (one,) = replicas(0)
    old, new = (ask(text(seed, 512 * 8)) for seed in (0, 1))
    policy.choose([one], old)
    policy.choose([one], new)
    assert len(policy._seen) == 10
    assert policy._holders([one], _blocks(old)) == ([one], 2)
    assert policy._holders([one], _blocks(new)) == ([one], 8)


# --- policies of a registry


@pytest.mark.parametrize(
    ("dispatch", "kind"),
    [
        ("lottery", Lottery),
        ("shortest_queue", ShortestQueue),
        ("prefix_affinity", PrefixAffinity),
    ],
)
def test_each_name_is_a_policy_where_there_is_a_choice(dispatch: str, kind: type) -> None:
    assert isinstance(policy_from_spec(spec(replicas=2, dispatch=dispatch)), kind)
    assert policy_from_spec(spec(dispatch=dispatch)) is None


def test_a_registry_s_weights_are_the_lottery_s() -> None:
    policy = policy_from_spec(spec(replicas=2, dispatch="lottery", weights=(1e9, 1e-9)))
    assert policy is not None
    two = replicas(0, 0)
    assert {policy.choose(two, ask()).number for _ in range(50)} == {0}
