"""An engine sees its own GPUs only, and vLLM finds them there."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from vllm.platforms import interface
from vllm.platforms.interface import Platform

from llmserve.engine.worker import plugin

if TYPE_CHECKING:
    from collections.abc import Iterator


class Cuda(Platform):
    """The names and ids of CUDA, without a driver (vllm/platforms/cuda.py)."""

    device_control_env_var = "CUDA_VISIBLE_DEVICES"


@pytest.fixture
def assigned() -> Iterator[None]:
    yield
    interface._assigned_physical_gpu_ids = None


@pytest.mark.usefixtures("assigned")
@pytest.mark.parametrize("ids", [[0], [3], [2, 3], [3, 1, 0]])
@pytest.mark.parametrize("before", [None, "0,1,2,3"])
def test_an_engines_gpus_are_numbered_from_0(
    monkeypatch: pytest.MonkeyPatch, ids: list[int], before: str | None
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before or "")
    config = SimpleNamespace(parallel_config=SimpleNamespace(assigned_physical_gpu_ids=ids))
    plugin._hide_other_gpus(config)
    interface.set_assigned_physical_gpu_ids(ids)
    ranks = range(len(ids))
    assert [Cuda.logical_device_id_to_visible_device_id(rank) for rank in ranks] == list(ranks)
    assert [Cuda.device_id_to_physical_device_id(rank) for rank in ranks] == ids
    assert [Cuda.visible_device_id_to_physical_device_id(rank) for rank in ranks] == ids


def test_without_assigned_gpus_nothing_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    config = SimpleNamespace(parallel_config=SimpleNamespace(assigned_physical_gpu_ids=None))
    plugin._hide_other_gpus(config)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
