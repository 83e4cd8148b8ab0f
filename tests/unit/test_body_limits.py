from __future__ import annotations

from typing import Any

import pytest

from llmserve.api.body_limits import (
    CHOICES_LIMIT,
    ITEMS,
    KEYS_LIMIT,
    PARTS_LIMIT,
    check_choices,
    check_quantities,
)
from llmserve.errors import RequestError

PART = {"type": "text", "text": "a"}


def bodies(over: int) -> dict[str, dict[str, Any]]:
    """Bodies with one quantity at its limit, and `over` above it."""
    lists = {key: {key: ["a"] * (limit + over)} for key, limit in ITEMS.items()}
    return lists | {
        "messages.content": {"messages": [{"content": [PART] * (PARTS_LIMIT // 2 + over)}] * 2},
        "input.content": {"input": [{"content": [PART] * (PARTS_LIMIT + over)}]},
        "id lists": {"prompt": [[1]] * (ITEMS["prompt"] + over)},
        "n": {"n": CHOICES_LIMIT + over},
        "best_of": {"best_of": CHOICES_LIMIT + over},
        "keys": {str(i): i for i in range(KEYS_LIMIT + over)},
    }


@pytest.mark.parametrize("body", bodies(0).values(), ids=bodies(0))
def test_quantities_at_their_limit_are_taken(body: dict[str, Any]) -> None:
    check_quantities(body)


@pytest.mark.parametrize(("name", "body"), bodies(1).items(), ids=bodies(1))
def test_quantities_above_their_limit_are_refused(name: str, body: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        check_quantities(body)
    assert caught.value.param == (None if name == "keys" else next(iter(body)))
    assert "limit is" in caught.value.message


@pytest.mark.parametrize("key", ["input", "prompt"])
def test_quantities_of_token_ids_are_one_text(key: str) -> None:
    check_quantities({key: [7] * 100_000})


@pytest.mark.parametrize("value", [None, True, "a", {"a": 1}, 1e300, -1, [[]], [None]])
def test_quantities_of_another_type_are_left_to_vllm(value: Any) -> None:
    check_quantities(dict.fromkeys(ITEMS, value) | {"n": "many"})


@pytest.mark.parametrize(("choices", "prompts"), [(128, 16), (4, 512)])
def test_choices_of_all_prompts_have_a_limit(choices: int, prompts: int) -> None:
    check_choices("n", choices, prompts)
    with pytest.raises(RequestError, match="in all"):
        check_choices("n", choices, prompts + 1)
