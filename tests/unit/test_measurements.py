"""Measurements are kept whole or not at all, and what cannot be read is none."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmserve.gpus.device import described
from llmserve.planning import measurements
from llmserve.planning.measurements import Measured
from llmserve.planning.memory_model import Settings
from tests.fakes import spec
from tests.unit.shapes import LLAMA_8B

MARK = "0123456789abcdef01234567"


def mark(gpu: str = "H100", **entry: Any) -> str:
    (box0,) = described(gpu)
    of = spec(**entry)
    return measurements.fingerprint(of, LLAMA_8B, Settings.of(of, LLAMA_8B, 1, box0), box0)


def test_what_was_kept_is_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert Measured(folder).overhead(MARK) is None
    Measured(folder).keep(MARK, 3 * 2**30, {"grown_bytes": [1, 2]})
    assert Measured(folder).overhead(MARK) == 3 * 2**30
    assert Measured(folder).overhead("of another") is None
    assert [file.name for file in folder.iterdir()] == [f"{MARK}.json"]
    kept = json.loads((folder / f"{MARK}.json").read_text())
    assert kept == {"overhead_bytes": 3 * 2**30, "grown_bytes": [1, 2]}


def test_a_later_measurement_takes_the_earlier_one_s_place(tmp_path: Path) -> None:
    kept = Measured(tmp_path)
    kept.keep(MARK, 1, {})
    kept.keep(MARK, 2, {})
    assert kept.overhead(MARK) == 2
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else has been imported: some libraries change every logger there is."""
    monkeypatch.setattr(measurements.log, "disabled", False)
    caplog.set_level(logging.WARNING, logger="llmserve.planning.measurements")


def test_a_measurement_that_breaks_off_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Measured(tmp_path)
    kept.keep(MARK, 1, {})
    whole = Path.write_text

    def broken(file: Path, text: str, **more: Any) -> int:
        whole(file, text[: len(text) // 2], **more)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", broken)
    kept.keep(MARK, 2, {})
    assert kept.overhead(MARK) == 1
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"3", b"null", b"{}", b"\xff\xfe", b'{"overhead_bytes": null}'),
        *(b'{"overhead_bytes": "much"}', b'{"overhead_bytes": [1]}'),
    ],
)
def test_overhead_of_invalid_file_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / f"{MARK}.json").write_bytes(content)
    assert Measured(tmp_path).overhead(MARK) is None


def test_a_folder_in_a_file_s_place_is_no_measurement(tmp_path: Path) -> None:
    (tmp_path / f"{MARK}.json").mkdir()
    assert Measured(tmp_path).overhead(MARK) is None


def test_keep_in_unwritable_folder_logs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    kept = Measured(tmp_path / "file" / "memory")
    kept.keep(MARK, 1, {})
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(tmp_path / "file" / "memory") in record.getMessage()
    assert kept.overhead(MARK) is None


def test_the_cache_is_where_caches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Measured().folder == tmp_path / "llmserve" / "memory"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Measured().folder == Path.home() / ".cache" / "llmserve" / "memory"


def test_a_fingerprint_is_that_of_everything_that_changes_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert mark() == mark(engine={"seed": 3, "download_dir": "/x"}, kv_cache="3GiB", devices=(0,))
    others = {
        mark("H200"),
        mark("H100-PCIE"),
        mark(loras={"one": "/a"}),
        mark(engine={"max_num_seqs": 3}),
        mark(engine={"enforce_eager": True}),
        mark(engine={"enable_prefix_caching": False}),
    }
    before = mark()
    assert len(others | {before}) == 7
    monkeypatch.setattr(measurements, "_version", lambda package: f"{package} of tomorrow")
    assert mark() != before


def test_a_fingerprint_is_that_of_the_adapters_rank(tmp_path: Path) -> None:
    marks = set()
    for rank in (8, 64, 8):
        (tmp_path / "adapter_config.json").write_text(f'{{"r": {rank}}}', encoding="utf-8")
        marks.add(mark(loras={"one": str(tmp_path)}))
    assert len(marks) == 2
    assert mark(loras={"one": "org/a"}) == mark(loras={"other": "org/a"})
    assert mark(loras={"one": "org/a"}) != mark(loras={"one": "org/b"})


def test_a_fingerprint_is_that_of_a_shape() -> None:
    (box0,) = described("H100")
    settings = Settings.of(spec(), LLAMA_8B, 1, box0)
    longer = replace(LLAMA_8B, layers=33)
    one, other = (measurements.fingerprint(spec(), of, settings, box0) for of in (LLAMA_8B, longer))
    assert one != other
    assert len(one) == 24
