"""The log of a starting engine: its phase, and the root cause of a failure."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

from llmserve.errors import LLMServeError

if TYPE_CHECKING:
    from pathlib import Path

_BLOCK = 1 << 20  # read at once
_PATTERN_BYTES = 64  # the longest match of `_WARMING` is shorter
_LINE = 2000  # characters of a line that are searched for a cause
_WARMING = re.compile(rb"Model loading took|GPU KV cache size|# CPU blocks|Warming up")

# "(EngineCore pid=7) ERROR 11-22 10:00:00 [core.py:1] ValueError: To serve ..."
_RAISED = re.compile(
    r"^(?:\([^)]*\)\s*)?(?:ERROR \S+ \S+ \[[^\]]*\]\s)?(?:[\w.]+\.)?"
    r"(?P<kind>[A-Z]\w*(?:Error|Exception|Interrupt|Exit))(?:: (?P<text>.+))?$"
)
# vLLM's message about a KV cache that is too small for one request, with vLLM's option names
# (vllm/v1/core/kv_cache_utils.py). A contract test compares it.
_TOO_SMALL = re.compile(
    r"max seq len \((?P<tokens>\d+)\), \((?P<needed>[\d.]+) GiB KV cache is needed, which is larger "
    r"than the available KV cache memory \((?P<available>[\d.]+) GiB\)\."
    r"(?:.* the estimated maximum model length is (?P<fits>\d+)\.)?"
)
_NO_MEMORY = "No available memory for the cache blocks."
_ECHOES = ("initialization failed", "See stack trace", "See root cause")


class StartLog:
    """Reads a log in blocks, each after the last. An unreadable file counts as unchanged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_warming = False
        self._at = 0
        self._before = b""

    def begin(self) -> None:
        """Keep the log of the previous engine, which may have died."""
        keep_last(self.path)

    def read_new(self) -> bool:
        """Read the next block; return whether there was one."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._at:  # truncated, as by logrotate
                    self._at = 0
                file.seek(self._at)
                block = file.read(_BLOCK)
        except OSError:
            return False
        self._at += len(block)
        text = self._before + block
        if _WARMING.search(text):
            self.is_warming = True
        self._before = text[-_PATTERN_BYTES:]
        return bool(block)


def keep_last(file: Path) -> None:
    """Rename the log of the previous run to `FILE.1`, which is replaced."""
    with contextlib.suppress(FileNotFoundError):
        file.replace(file.with_name(file.name + ".1"))


def cause_of(error: BaseException, log: Path) -> str:
    """Return the root cause of a failed start, in one line.

    vLLM raises "see root cause above" in this process; the cause is in the engine's log.
    """
    if isinstance(error, LLMServeError):
        return error.message
    lines = _last_lines(log) if _echoes(str(error)) else None
    if lines is None:
        return one_line(type(error).__name__, str(error))
    causes = [found for line in lines if (found := _RAISED.match(line)) and not _echoes(line)]
    if not causes:
        return f"the engine's process ended without an error message; its log: {log}"
    return one_line(causes[-1]["kind"], causes[-1]["text"] or "")


def _last_lines(log: Path) -> list[str] | None:
    """Return the lines of the last block; None if the log is unreadable."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _BLOCK))
            block = file.read(_BLOCK)
    except OSError:
        return None
    return [line[:_LINE] for line in block.decode("utf-8", "replace").splitlines()]


def _echoes(text: str) -> bool:
    """Whether a message only refers to a failure elsewhere."""
    return any(echo in text for echo in _ECHOES)


def one_line(kind: str, text: str, limit: int = 300) -> str:
    """Return an exception's class and message in one bounded line."""
    text = " ".join(text.split())
    if (kv_cache := _kv_cache_cause(text)) is not None:
        return kv_cache
    # pydantic's text around the message of one of vLLM's validators
    text = re.sub(r"^\d+ validation errors? for \w+ (Value error, )?", "", text)
    text = re.sub(r" \[type=\w+, input_value=.*$", "", text)
    shown = text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " ..."
    return f"{kind}: {shown}" if shown else kind


def _kv_cache_cause(text: str) -> str | None:
    """Return the cause for a KV cache that is too small, with the registry's keys; else None."""
    if text.startswith(_NO_MEMORY):
        return "no memory for the KV cache; increase `memory` or `kv_cache` of the model"
    if (found := _TOO_SMALL.search(text)) is None:
        return None
    shorter = f" or set engine: {{max_model_len: {found['fits']}}}" if found["fits"] else ""
    return (
        f"the KV cache of {found['available']} GiB is too small: one request of "
        f"{int(found['tokens']):,} tokens needs {found['needed']} GiB; increase `kv_cache`{shorter}"
    )
