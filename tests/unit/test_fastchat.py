from __future__ import annotations

import pytest

from llmserve.registry.fastchat import SUCCESSORS, successor


@pytest.mark.parametrize("key", ["num_gpus", "num-gpus", "NUM_GPUS"])
def test_an_option_is_known_however_it_is_spelled(key: str) -> None:
    assert successor(key) == (
        f"FastChat's {key} is `tensor_parallel_size` here; `devices` says which GPUs, if any will not do"
    )


def test_another_word_is_none_of_fastchat_s() -> None:
    assert successor("max_in_flight") is None


@pytest.mark.parametrize("key", SUCCESSORS)
def test_every_option_is_told_its_successor_or_that_it_is_gone(key: str) -> None:
    told = successor(key) or ""
    assert "`" in told or "is gone: " in told
