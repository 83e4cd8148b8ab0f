from __future__ import annotations

import pytest

from llmserve.registry.fastchat import SUCCESSORS, successor


@pytest.mark.parametrize("key", ["num_gpus", "num-gpus", "NUM_GPUS"])
def test_option_is_known_in_any_spelling(key: str) -> None:
    assert successor(key) == (
        f"FastChat's {key} is `tensor_parallel_size` here; `devices` selects the GPUs"
    )


def test_other_key_has_no_successor() -> None:
    assert successor("max_in_flight") is None


@pytest.mark.parametrize("key", SUCCESSORS)
def test_every_option_has_a_successor_or_was_removed(key: str) -> None:
    text = successor(key) or ""
    assert "`" in text or "was removed: " in text
