from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from llmserve.engine import startup_log
from llmserve.engine.startup_log import StartLog, cause_of
from llmserve.errors import EngineError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model-chat.log"


def test_startlog_without_file_has_nothing(path: Path) -> None:
    log = StartLog(path)
    assert not log.read_new()
    path.mkdir()  # no file
    assert not log.read_new()
    assert not log.is_warming


def test_startlog_begin_puts_the_log_before_aside(path: Path) -> None:
    path.write_text("Warming up\n")
    log = StartLog(path)
    log.begin()
    assert not log.read_new()
    path.write_text("Starting\n")
    assert log.read_new()
    assert not log.is_warming
    assert path.with_name(f"{path.name}.1").read_text() == "Warming up\n"


def test_startlog_that_is_cut_short_is_read_on(path: Path) -> None:
    """logrotate, `copytruncate`."""
    path.write_text("Starting, with many words\n")
    log = StartLog(path)
    assert log.read_new()
    path.write_text("Warming up\n")
    assert log.read_new()
    assert log.is_warming
    assert not log.read_new()


def test_startlog_sign_cut_between_two_looks_is_found(path: Path) -> None:
    log = StartLog(path)
    text = b"x" * 1000 + b"Model loading took 3 s"
    for size in (900, 1005, 1010, len(text)):
        path.write_bytes(text[:size])
        assert log.read_new()
    assert log.is_warming
    assert not log.read_new()


def test_startlog_reads_what_is_new_block_by_block(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup_log, "_BLOCK", 100)
    path.write_bytes(b"x" * 250)
    log = StartLog(path)
    assert [log.read_new() for _ in range(4)] == [True, True, True, False]


def test_startlog_renamed_in_between_has_nothing(path: Path) -> None:
    log = StartLog(path)
    path.write_text("line\n")
    assert log.read_new()
    path.rename(path.with_suffix(".1"))
    assert not log.read_new()


ECHO = RuntimeError("Engine core initialization failed. See root cause above.")


def test_cause_is_found_in_the_last_block_of_the_log(path: Path) -> None:
    path.write_text("x" * 3_000_000 + "\nValueError: no room\n")
    assert cause_of(ECHO, path) == "ValueError: no room"


def test_cause_of_an_endless_line_takes_no_time(path: Path) -> None:
    path.write_text("A." * 500_000)  # cut: the pattern would go back and forth in it
    assert cause_of(ECHO, path).startswith("the engine's process ended without an error message")


def test_cause_without_a_log_is_the_error_s_own(path: Path) -> None:
    assert cause_of(ECHO, path) == f"RuntimeError: {ECHO}"


def test_cause_of_our_own_error_is_its_message(path: Path) -> None:
    assert cause_of(EngineError("killed"), path) == "killed"


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (
            (
                "To serve at least one request with the model's max seq len (8192), (1.0 GiB KV cache "
                "is needed, which is larger than the available KV cache memory (0.5 GiB). Based on the "
                "available memory, the estimated maximum model length is 4080. Try increasing "
                "`gpu_memory_utilization` or decreasing `max_model_len`"
            ),
            (
                "the KV cache of 0.5 GiB is too small: one request of 8,192 tokens needs 1.0 GiB; "
                "increase `kv_cache` or set engine: {max_model_len: 4080}"
            ),
        ),
        (
            (
                "To serve at least one request with the model's max seq len (8192), (1.0 GiB KV cache "
                "is needed, which is larger than the available KV cache memory (0.01 GiB). Try increasing"
            ),
            (
                "the KV cache of 0.01 GiB is too small: one request of 8,192 tokens needs 1.0 GiB; "
                "increase `kv_cache`"
            ),
        ),
        (
            "No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
            "no memory for the KV cache; increase `memory` or `kv_cache` of the model",
        ),
    ],
)
def test_a_kv_cache_too_small_is_told_in_the_registry_s_words(
    path: Path, raised: str, told: str
) -> None:
    path.write_text(f"(EngineCore pid=7) ERROR 11-22 10:00:00 [core.py:1] ValueError: {raised}\n")
    assert (
        cause_of(RuntimeError("Engine core initialization failed. See root cause above."), path)
        == told
    )
