"""Limits of the schemas, patterns and grammars of a request. Pure.

vLLM compiles them with memory that grows with their counts. A check has at most NODES_LIMIT
steps, and its regular expression does not backtrack.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from llmserve.api.json_text import load
from llmserve.errors import BodyTooLarge, RequestError

# Keys of a body with JSON schemas, regular expressions or grammars.
_CONSTRAINTS = (
    "response_format",
    "structured_outputs",
    "text",
    "tools",
    "functions",
    "output_config",
    "output_format",
)
_COUNTS = frozenset(
    {"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"}
)
_PATTERNS = frozenset({"pattern", "regex", "grammar"})
_JSON_TEXTS = frozenset({"json", "structural_tag"})  # of structured_outputs
_REPEATED = re.compile(r"\{(\d*+)(?:,(\d*+))?+\}")  # in a pattern without white space
COUNT_LIMIT = 100_000
PATTERN_LIMIT = 64 * 2**10  # characters of a pattern or a grammar
NODES_LIMIT = 2**16  # values in the constraints of a body
DEPTH_LIMIT = 128
_SHOWN = 200  # characters of a path


@dataclass(slots=True)
class ValuePath:
    """The path of a value in a body. Only an error needs it as text."""

    key: str | int
    parent: ValuePath | None = None
    depth: int = 1

    def inside(self, key: str | int) -> ValuePath:
        return ValuePath(key, self, self.depth + 1)

    def __str__(self) -> str:
        keys: list[str] = []
        step: ValuePath | None = self
        while step is not None:
            keys.append(str(step.key)[:_SHOWN])
            step = step.parent
        return ".".join(reversed(keys))[:_SHOWN]


def check_constraints(body: dict[str, Any]) -> None:
    """Raise RequestError with the path of the first value that exceeds a limit."""
    unseen: list[tuple[ValuePath, Any]] = [
        (ValuePath(key), body[key])
        for key in _CONSTRAINTS
        if isinstance(body.get(key), list | dict)
    ]
    nodes = 0
    while unseen:
        path, value = unseen.pop()
        nodes += len(value)
        _check_size(path, nodes)
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str):
                _check_value(path, key, each)
            inner = _unpacked(key, each)
            if isinstance(inner, list | dict):
                unseen.append((path.inside(key), inner))


def _check_size(path: ValuePath, nodes: int) -> None:
    if nodes > NODES_LIMIT:
        raise _refused(path, f"{nodes} values in schemas and tools", f"up to {NODES_LIMIT}")
    if path.depth > DEPTH_LIMIT:
        raise _refused(path, "deeper nesting", f"up to {DEPTH_LIMIT} levels")


def _check_value(path: ValuePath, key: str, value: Any) -> None:
    if key in _COUNTS and isinstance(value, int | float) and value > COUNT_LIMIT:
        raise _refused(path.inside(key), "a larger count", f"counts up to {COUNT_LIMIT}")
    if key not in _PATTERNS or not isinstance(value, str):
        return
    if len(value) > PATTERN_LIMIT:
        came, limit = f"{len(value)} characters", f"up to {PATTERN_LIMIT}"
        raise _refused(path.inside(key), came, limit)
    pairs = _REPEATED.findall("".join(value.split()))
    if any(len(count) > 9 or int(count or 0) > COUNT_LIMIT for pair in pairs for count in pair):
        raise _refused(path.inside(key), "a larger count", f"counts up to {COUNT_LIMIT}")


def _unpacked(key: str | int, value: Any) -> Any:
    """Return a value, parsed if it is the JSON text of a schema. vLLM refuses invalid JSON."""
    if key not in _JSON_TEXTS or not isinstance(value, str):
        return value
    try:
        return load(value.encode())
    except BodyTooLarge:
        raise
    except RequestError:
        return None


def _refused(path: ValuePath, came: str, allowed: str) -> RequestError:
    name = str(path)
    return RequestError(
        f"{name} is too large: it has {came}; allowed: {allowed}. Send a smaller one.", param=name
    )
