"""The log of an engine that starts: how far it has come, and why it failed."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

from llmserve.errors import LLMServeError

if TYPE_CHECKING:
    from pathlib import Path

_BLOCK = 1 << 20  # read at once
_SIGN_BYTES = 64  # no sign of a phase is longer
_LINE = 2000  # characters of a line in which a cause is looked for
_WARMING = re.compile(rb"Model loading took|GPU KV cache size|# CPU blocks|Warming up")

# "(EngineCore pid=7) ERROR 11-22 10:00:00 [core.py:1] ValueError: To serve ..."
_RAISED = re.compile(
    r"^(?:\([^)]*\)\s*)?(?:ERROR \S+ \S+ \[[^\]]*\]\s)?(?:[\w.]+\.)?"
    r"(?P<kind>[A-Z]\w*(?:Error|Exception|Interrupt|Exit))(?:: (?P<text>.+))?$"
)
# vLLM's words for a KV cache that holds no request (vllm/v1/core/kv_cache_utils.py), which name
# its own options; a contract test compares.
_TOO_SMALL = re.compile(
    r"max seq len \((?P<tokens>\d+)\), \((?P<needed>[\d.]+) GiB KV cache is needed, which is larger "
    r"than the available KV cache memory \((?P<there>[\d.]+) GiB\)\."
    r"(?:.* the estimated maximum model length is (?P<fits>\d+)\.)?"
)
_NOTHING_LEFT = "No available memory for the cache blocks."
_ECHOES = ("initialization failed", "See stack trace", "See root cause")


class StartLog:
    """Read from where it was last read; a file that cannot be read has nothing new."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_warming = False
        self._at = 0
        self._before = b""

    def begin(self) -> None:
        """Keep the log of the engine before, which may have died."""
        keep_last(self.path)

    def grew(self) -> bool:
        """Read a block of what is new; whether there was anything."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._at:  # cut short, as logrotate does
                    self._at = 0
                file.seek(self._at)
                block = file.read(_BLOCK)
        except OSError:
            return False
        self._at += len(block)
        text = self._before + block
        if _WARMING.search(text):
            self.is_warming = True
        self._before = text[-_SIGN_BYTES:]
        return bool(block)


def keep_last(file: Path) -> None:
    """Rename the log of the run before: it gets a `.1` at its end, in place of an older one."""
    with contextlib.suppress(FileNotFoundError):
        file.replace(file.with_name(file.name + ".1"))


def cause_of(error: BaseException, log: Path) -> str:
    """Why an engine did not start, in one line.

    vLLM raises "see root cause above" here; the cause itself is in the engine's log.
    """
    if isinstance(error, LLMServeError):
        return error.message
    lines = _last_lines(log) if _echoes(str(error)) else None
    if lines is None:
        return one_line(type(error).__name__, str(error))
    causes = [found for line in lines if (found := _RAISED.match(line)) and not _echoes(line)]
    if not causes:
        return f"the engine's process ended without a word; its log: {log}"
    return one_line(causes[-1]["kind"], causes[-1]["text"] or "")


def _last_lines(log: Path) -> list[str] | None:
    """Of the last block; None if the log cannot be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _BLOCK))
            block = file.read(_BLOCK)
    except OSError:
        return None
    return [line[:_LINE] for line in block.decode("utf-8", "replace").splitlines()]


def _echoes(text: str) -> bool:
    """Whether it only says that something failed elsewhere."""
    return any(echo in text for echo in _ECHOES)


def one_line(kind: str, text: str, limit: int = 300) -> str:
    text = " ".join(text.split())
    if (ours := _of_kv_cache(text)) is not None:
        return ours
    # pydantic's frame around what a validator of vLLM's said
    text = re.sub(r"^\d+ validation errors? for \w+ (Value error, )?", "", text)
    text = re.sub(r" \[type=\w+, input_value=.*$", "", text)
    shown = text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " ..."
    return f"{kind}: {shown}" if shown else kind


def _of_kv_cache(text: str) -> str | None:
    """What vLLM says of a KV cache that is too small, in the registry's words."""
    if text.startswith(_NOTHING_LEFT):
        return "no memory is left for the KV cache; `memory` or `kv_cache` of its entry gives more"
    if (found := _TOO_SMALL.search(text)) is None:
        return None
    fits = f"; what would fit: engine: {{max_model_len: {found['fits']}}}" if found["fits"] else ""
    return (
        f"{found['there']} GiB of KV cache is less than {int(found['tokens']):,} tokens take, "
        f"{found['needed']} GiB{fits}"
    )
