"""Types, constants, strings and numbers in terms that xgrammar honours. Pure."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from llmserve.engine.structured_output.pattern import check_pattern
from llmserve.engine.structured_output.subschema import (
    FORMATS,
    KEYWORDS,
    NUMBERS,
    TYPES,
    Subschema,
    Unsatisfiable,
    has_number,
    is_number,
    list_of,
    range_of,
    require_order,
)


@dataclass(frozen=True)
class BranchFacts:
    """Facts that distinguish the branches of a `oneOf`. None: any value."""

    types: set[str]
    constants: set[str] | None
    properties: dict[str, set[str]]

    def tags(self, other: BranchFacts) -> list[str] | None:
        """Return the properties by which both differ; None if all their values differ anyway."""
        if not common(self.types, other.types):
            return None
        if self.constants is not None and other.constants is not None:
            return [] if self.constants & other.constants else None
        shared = self.properties.keys() & other.properties.keys()
        return sorted(name for name in shared if not self.properties[name] & other.properties[name])


def common(one: set[str], other: set[str]) -> set[str]:
    both = one & other
    if "integer" in one | other and "number" in one | other:
        both = both | {"integer"} - ({"integer"} if "number" in both else set())
    return both


def types_of(assertions: list[Subschema]) -> set[str]:
    """Return the allowed types. Raises Unsatisfiable.

    Without a `type`, keywords that constrain one type imply it.
    """
    types = explicit_types(assertions)
    if types is None:
        keywords = (key for each in assertions for key in each.schema)
        families = {KEYWORDS[key][0] for key in keywords if key in KEYWORDS}
        types = families or set(TYPES) - {"integer"}
    return types - {"integer"} if "number" in types else types


def explicit_types(assertions: list[Subschema]) -> set[str] | None:
    """Return the types that `type` allows; None for any. Raises Unsatisfiable."""
    types: set[str] | None = None
    for each in assertions:
        if "type" not in each.schema:
            continue
        given = each.schema["type"]
        names = given if isinstance(given, list) else [given]
        if not names or not all(isinstance(name, str) and name in TYPES for name in names):
            each.refuse("type", f"must be one or more of {', '.join(TYPES)}")
            continue
        types = set(names) if types is None else common(types, set(names))
    if types is not None and not types:
        raise Unsatisfiable
    return types


def _type_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case str():
            return "string"
        case int() | float():
            return "integer" if isinstance(value, int) or value.is_integer() else "number"
        case list():
            return "array"
    return "object"


def constants_of(assertions: list[Subschema]) -> dict[str, Any] | None:
    """Return the values that `enum` and `const` allow, by canonical text; None for any."""
    allowed: dict[str, Any] | None = None
    for each in assertions:
        sets = [list_of(each, "enum")] if "enum" in each.schema else []
        sets += [[each.schema["const"]]] if "const" in each.schema else []
        for values in sets:
            given = {_canonical(value): value for value in values}
            allowed = given if allowed is None else {k: allowed[k] for k in allowed if k in given}
    return allowed


def _canonical(value: Any) -> str:
    """Return a text that is equal for equal values: 1 and 1.0, objects in any order."""

    def plain(each: Any) -> Any:
        if isinstance(each, float) and each.is_integer():
            return int(each)
        if isinstance(each, list):
            return [plain(item) for item in each]
        if isinstance(each, dict):
            return {key: plain(item) for key, item in each.items()}
        return each

    return json.dumps(plain(value), sort_keys=True)


def enumerated(constants: dict[str, Any], assertions: list[Subschema]) -> dict[str, Any]:
    """Raises Unsatisfiable."""
    types = explicit_types(assertions) or set(TYPES)
    if "number" in types:
        types |= {"integer"}
    values = [value for value in constants.values() if _type_of(value) in types]
    for each in assertions:
        values = [value for value in values if _satisfies(value, each)]
    if not values:
        raise Unsatisfiable
    return {"enum": values}


def _satisfies(value: Any, part: Subschema) -> bool:
    """Whether a value of an `enum` satisfies the keywords beside it."""
    schema = part.schema
    kind = _type_of(value)
    keys = [key for key in schema if kind in KEYWORDS.get(key, ())]
    if kind == "string" and "pattern" not in keys:
        return all(_holds(key, len(value), schema[key]) for key in keys)
    if kind in NUMBERS and "multipleOf" not in keys:
        return all(_holds(key, value, schema[key]) for key in keys)
    for key in keys:
        part.refuse(key, "is not supported next to `enum` or `const`")
    return True


def _holds(key: str, size: float, bound: Any) -> bool:
    if not is_number(bound):
        return True
    if key.startswith("exclusive"):
        return bool(size > bound if key.endswith("Minimum") else size < bound)
    return bool(size >= bound if key.startswith("min") else size <= bound)


def rewrite_string(assertions: list[Subschema]) -> dict[str, Any]:
    least, most = range_of(assertions, "minLength", "maxLength")
    require_order(least, most)
    result: dict[str, Any] = {"type": "string"}
    patterns = {}
    for each in assertions:
        pattern = each.schema.get("pattern")
        if pattern is not None and check_supported_pattern(each, pattern):
            patterns[pattern] = each
    if len(patterns) > 1:
        [*patterns.values()][1].refuse("pattern", "is supported only once per string")
    for pattern, each in patterns.items():
        if not least and most is None:
            return result | {"pattern": pattern}
        each.refuse("pattern", "is not supported next to `minLength` or `maxLength`")
    if least or most is not None:
        return result | {"minLength": least} | ({} if most is None else {"maxLength": most})
    formats = [each.schema.get("format") for each in assertions]
    known = [each for each in formats if isinstance(each, str) and each in FORMATS]
    return result | {"format": known[0]} if known else result


def check_supported_pattern(part: Subschema, pattern: Any) -> bool:
    """Return whether xgrammar honours a pattern in a JSON string. Raises Unsupported."""
    reason = "must be a string" if not isinstance(pattern, str) else check_pattern(pattern)
    if reason:
        part.refuse("pattern", reason)
    return not reason


def rewrite_number(kind: str, assertions: list[Subschema]) -> dict[str, Any]:
    result: dict[str, Any] = {"type": kind}
    for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        bounds = [each.schema[key] for each in assertions if has_number(each, key)]
        if bounds:
            result[key] = max(bounds) if key.endswith("inimum") else min(bounds)
    for each in assertions:
        divisor = each.schema.get("multipleOf", 1)
        if "multipleOf" in each.schema and not (kind == "integer" and divisor == 1):
            each.refuse("multipleOf", "is not supported")
    if kind == "integer":
        return _integer_bounds(result)
    least = max(result.get("minimum", -math.inf), result.get("exclusiveMinimum", -math.inf))
    most = min(result.get("maximum", math.inf), result.get("exclusiveMaximum", math.inf))
    is_open = result.get("exclusiveMinimum") == least or result.get("exclusiveMaximum") == most
    if least > most or (least == most and is_open):
        raise Unsatisfiable
    return result


def _integer_bounds(given: dict[str, Any]) -> dict[str, Any]:
    """Return the bounds of integers as integers. Raises Unsatisfiable."""
    least = [math.ceil(given["minimum"])] if "minimum" in given else []
    least += [math.floor(given["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in given else []
    most = [math.floor(given["maximum"])] if "maximum" in given else []
    most += [math.ceil(given["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in given else []
    if least and most and max(least) > min(most):
        raise Unsatisfiable
    bounds = {"minimum": max(least)} if least else {}
    return {"type": "integer"} | bounds | ({"maximum": min(most)} if most else {})
