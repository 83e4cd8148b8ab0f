"""Bounds on what a request may ask vLLM to compile. Pure.

vLLM compiles schemas, patterns and grammars in the server's process
(vllm/sampling_params.py, StructuredOutputsParams; vllm/v1/structured_output), and memory
grows with the counts in them: one request could end all models.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from llmserve.errors import RequestError

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
_REPEATED = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")
COUNT_LIMIT = 100_000


def check_constraints(body: dict[str, Any]) -> None:
    """Raises RequestError for a count beyond COUNT_LIMIT, with its place in the body."""
    unseen = [(key, body[key]) for key in _CONSTRAINTS if key in body]
    while unseen:
        path, value = unseen.pop()
        if isinstance(value, list):
            unseen += [(f"{path}.{i}", each) for i, each in enumerate(value)]
        elif isinstance(value, dict):
            for key, each in value.items():
                here = f"{path}.{key}"
                if _too_many(key, each):
                    raise RequestError(
                        f"{here[:200]}: counts go up to {COUNT_LIMIT} here.", param=here[:200]
                    )
                unseen.append((here, _unpacked(key, each)))


def _too_many(key: str, value: Any) -> bool:
    if key in _COUNTS:
        return isinstance(value, int | float) and value > COUNT_LIMIT
    if key in _PATTERNS and isinstance(value, str):
        counts = (count for pair in _REPEATED.findall(value) for count in pair if count)
        return any(len(count) > 9 or int(count) > COUNT_LIMIT for count in counts)
    return False


def _unpacked(key: str, value: Any) -> Any:
    """`structured_outputs.json` may be a schema or its text."""
    if key == "json" and isinstance(value, str):
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            return None
    return value
