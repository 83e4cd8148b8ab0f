"""Bounds on what a request may ask vLLM to compile. Pure.

vLLM compiles schemas, patterns and grammars, with memory that grows with the counts in
them. A check takes NODES_LIMIT steps at most, and its expression does not backtrack.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from llmserve.api.json_text import load
from llmserve.errors import BodyTooLarge, RequestError

# Where a body can hold a JSON schema, a regular expression or a grammar.
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
    """Where a value is. Its path is written out for an error only."""

    key: str | int
    parent: ValuePath | None = None
    depth: int = 1

    def inside(self, key: str | int) -> ValuePath:
        return ValuePath(key, self, self.depth + 1)

    def __str__(self) -> str:
        keys: list[str] = []
        place: ValuePath | None = self
        while place is not None:
            keys.append(str(place.key)[:_SHOWN])
            place = place.parent
        return ".".join(reversed(keys))[:_SHOWN]


def check_constraints(body: dict[str, Any]) -> None:
    """Raises RequestError for what exceeds a limit, with its place in the body."""
    unseen: list[tuple[ValuePath, Any]] = [
        (ValuePath(key), body[key])
        for key in _CONSTRAINTS
        if isinstance(body.get(key), list | dict)
    ]
    nodes = 0
    while unseen:
        place, value = unseen.pop()
        nodes += len(value)
        _check_size(place, nodes)
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str):
                _check_value(place, key, each)
            inner = _unpacked(key, each)
            if isinstance(inner, list | dict):
                unseen.append((place.inside(key), inner))


def _check_size(place: ValuePath, nodes: int) -> None:
    if nodes > NODES_LIMIT:
        raise _refused(place, f"{nodes} values in schemas and tools", f"up to {NODES_LIMIT}")
    if place.depth > DEPTH_LIMIT:
        raise _refused(place, "deeper nesting", f"up to {DEPTH_LIMIT} levels")


def _check_value(place: ValuePath, key: str, value: Any) -> None:
    if key in _COUNTS and isinstance(value, int | float) and value > COUNT_LIMIT:
        raise _refused(place.inside(key), "a larger count", f"counts up to {COUNT_LIMIT}")
    if key not in _PATTERNS or not isinstance(value, str):
        return
    if len(value) > PATTERN_LIMIT:
        came, limit = f"{len(value)} characters", f"up to {PATTERN_LIMIT}"
        raise _refused(place.inside(key), came, limit)
    pairs = _REPEATED.findall("".join(value.split()))
    if any(len(count) > 9 or int(count or 0) > COUNT_LIMIT for pair in pairs for count in pair):
        raise _refused(place.inside(key), "a larger count", f"counts up to {COUNT_LIMIT}")


def _unpacked(key: str | int, value: Any) -> Any:
    """A schema, or the JSON text of one. What is no JSON is refused by vLLM, in its words."""
    if key not in _JSON_TEXTS or not isinstance(value, str):
        return value
    try:
        return load(value.encode())
    except BodyTooLarge:
        raise
    except RequestError:
        return None


def _refused(place: ValuePath, came: str, allowed: str) -> RequestError:
    path = str(place)
    return RequestError(
        f"{path} is too large: it has {came}; allowed: {allowed}. Send a smaller one.", param=path
    )
