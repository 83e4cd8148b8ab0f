"""Boxes as they are described."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from llmserve.errors import ConfigError
from llmserve.gpus.device import GIB, described, find, from_file, listed, short_name

if TYPE_CHECKING:
    from pathlib import Path


def test_a_known_gpu_has_what_its_driver_reports() -> None:
    box = described("8xH100-80G")
    assert [gpu.index for gpu in box] == list(range(8))
    assert {gpu.memory for gpu in box} == {81_559 * 2**20}
    assert {gpu.capability for gpu in box} == {(9, 0)}
    assert len({gpu.island for gpu in box}) == 1  # NVLink between all


def test_a_box_of_two_kinds() -> None:
    box = described("2xA100-40G, 2xL4")
    assert [short_name(gpu.name) for gpu in box] == ["A100-SXM4-40GB"] * 2 + ["L4"] * 2
    assert len({gpu.island for gpu in box}) == 3  # the L4s are not linked
    assert listed(box) == "2 x A100-SXM4-40GB, 2 x L4"


def test_described_unknown_gpu_has_its_memory() -> None:
    (gpu,) = described("GAUDI-96G")
    assert (gpu.name, gpu.memory, gpu.capability) == ("GAUDI-96G", 96 * GIB, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8xH1000", "nearest: H100"),
        ("8xMINE", "add its memory, as in MINE-24G"),
        ("0xH100", "number of GPUs 0"),
        ("2000xH100", "1 to 1024"),
        ("MINE-0G", "add its memory"),
        ("8x", "invalid GPU"),
        ("", "invalid GPU ''"),
        ("H100,,", "invalid GPU ''"),
        ("8 H100 80G", "invalid GPU"),
    ],
)
def test_described_invalid_box_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        described(text)


def test_a_box_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "box.yaml"
    file.write_text(
        "gpus:\n"
        "- {name: H100, count: 2}\n"
        "- {name: Mine, memory: 10GiB, count: 2, linked: true}\n"
        "- {name: L4, memory: 20GiB}\n"
    )
    box = from_file(file)
    assert [gpu.memory // GIB for gpu in box] == [79, 79, 10, 10, 20]
    assert box[2].island == box[3].island
    assert len({gpu.island for gpu in box}) == 3
    assert [gpu.index for gpu in box] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "gpus:\n- {name: H100, cuont: 2}\n",
            "box.yaml:2: gpus.0.cuont: unknown key; nearest: count",
        ),
        ("gpus: []\n", "box.yaml:1: gpus"),
        ("- H100\n", "box.yaml"),
        ("gpus:\n- {name: Mine}\n", "box.yaml:2: gpus.0.name: unknown GPU Mine"),
        ("gpus: [\n", "box.yaml"),
    ],
)
def test_from_file_reports_each_mistake(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "box.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        from_file(file)


def test_a_gpu_is_found_by_id_or_uuid() -> None:
    box = described("2xH100")
    assert find(box, 1) is box[1]
    assert find(box, 2) is None
    assert find(box, "GPU-1") is None  # a described box has no UUIDs
