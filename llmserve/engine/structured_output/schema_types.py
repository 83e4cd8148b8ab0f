"""Types, constants, strings and numbers in the terms that xgrammar honours. Pure."""

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
    Never,
    Part,
    has_number,
    is_number,
    list_of,
    range_of,
    require_order,
)


@dataclass(frozen=True)
class Facts:
    """What tells the branches of a `oneOf` apart. None: any value."""

    types: set[str]
    constants: set[str] | None
    properties: dict[str, set[str]]

    def tags(self, other: Facts) -> list[str] | None:
        """Properties that, where both have them, differ; None if the values differ anyway."""
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


def types_of(atoms: list[Part]) -> set[str]:
    """The types that are allowed. Raises Never.

    Without a `type`, keywords that constrain one type stand for it.
    """
    types = explicit_types(atoms)
    if types is None:
        keywords = (key for each in atoms for key in each.schema)
        families = {KEYWORDS[key][0] for key in keywords if key in KEYWORDS}
        types = families or set(TYPES) - {"integer"}
    return types - {"integer"} if "number" in types else types


def explicit_types(atoms: list[Part]) -> set[str] | None:
    """What `type` leaves; None for any. Raises Never."""
    types: set[str] | None = None
    for each in atoms:
        if "type" not in each.schema:
            continue
        given = each.schema["type"]
        names = given if isinstance(given, list) else [given]
        if not names or not all(isinstance(name, str) and name in TYPES for name in names):
            each.refuse("type", f"must be one or more of {', '.join(TYPES)}")
            continue
        types = set(names) if types is None else common(types, set(names))
    if types is not None and not types:
        raise Never
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


def constants_of(atoms: list[Part]) -> dict[str, Any] | None:
    """The values that `enum` and `const` leave, by their canonical text; None for any."""
    left: dict[str, Any] | None = None
    for each in atoms:
        sets = [list_of(each, "enum")] if "enum" in each.schema else []
        sets += [[each.schema["const"]]] if "const" in each.schema else []
        for values in sets:
            given = {_canonical(value): value for value in values}
            left = given if left is None else {k: v for k, v in left.items() if k in given}
    return left


def _canonical(value: Any) -> str:
    """Equal for what JSON Schema holds equal: 1 and 1.0, objects in any order."""

    def plain(each: Any) -> Any:
        if isinstance(each, float) and each.is_integer():
            return int(each)
        if isinstance(each, list):
            return [plain(item) for item in each]
        if isinstance(each, dict):
            return {key: plain(item) for key, item in each.items()}
        return each

    return json.dumps(plain(value), sort_keys=True)


def enumerated(constants: dict[str, Any], atoms: list[Part]) -> dict[str, Any]:
    """Raises Never."""
    types = explicit_types(atoms) or set(TYPES)
    values = [value for value in constants.values() if common({_type_of(value)}, types)]
    for each in atoms:
        values = [value for value in values if _satisfies(value, each)]
    if not values:
        raise Never
    return {"enum": values}


def _satisfies(value: Any, part: Part) -> bool:
    """Whether a value of an `enum` satisfies the keywords beside it."""
    schema = part.schema
    kind = _type_of(value)
    keys = [key for key in schema if kind in KEYWORDS.get(key, ())]
    if kind == "string" and "pattern" not in keys:
        return all(_holds(key, len(value), schema[key]) for key in keys)
    if kind in NUMBERS and "multipleOf" not in keys:
        return all(_holds(key, value, schema[key]) for key in keys)
    for key in keys:
        part.refuse(key, "is not supported beside `enum` or `const`")
    return True


def _holds(key: str, size: float, bound: Any) -> bool:
    if not is_number(bound):
        return True
    if key.startswith("exclusive"):
        return bool(size > bound if key.endswith("Minimum") else size < bound)
    return bool(size >= bound if key.startswith("min") else size <= bound)


def string_of(atoms: list[Part]) -> dict[str, Any]:
    least, most = range_of(atoms, "minLength", "maxLength")
    require_order(least, most)
    made: dict[str, Any] = {"type": "string"}
    patterns = {}
    for each in atoms:
        pattern = each.schema.get("pattern")
        if pattern is not None and is_honoured(each, pattern):
            patterns[pattern] = each
    if len(patterns) > 1:
        [*patterns.values()][1].refuse("pattern", "is supported once for a string")
    for pattern, each in patterns.items():
        if not least and most is None:
            return made | {"pattern": pattern}
        each.refuse("pattern", "is not supported beside `minLength` or `maxLength`")
    if least or most is not None:
        return made | {"minLength": least} | ({} if most is None else {"maxLength": most})
    formats = [each.schema.get("format") for each in atoms]
    known = [each for each in formats if isinstance(each, str) and each in FORMATS]
    return made | {"format": known[0]} if known else made


def is_honoured(part: Part, pattern: Any) -> bool:
    """Raises Unsupported for a pattern that xgrammar does not honour in a JSON string."""
    reason = "must be a string" if not isinstance(pattern, str) else check_pattern(pattern)
    if reason:
        part.refuse("pattern", reason)
    return not reason


def number_of(kind: str, atoms: list[Part]) -> dict[str, Any]:
    made: dict[str, Any] = {"type": kind}
    for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        bounds = [each.schema[key] for each in atoms if has_number(each, key)]
        if bounds:
            made[key] = max(bounds) if key.endswith("inimum") else min(bounds)
    for each in atoms:
        divisor = each.schema.get("multipleOf", 1)
        if "multipleOf" in each.schema and not (kind == "integer" and divisor == 1):
            each.refuse("multipleOf", "is not supported")
    if kind == "integer":
        return _whole(made)
    least = max(made.get("minimum", -math.inf), made.get("exclusiveMinimum", -math.inf))
    most = min(made.get("maximum", math.inf), made.get("exclusiveMaximum", math.inf))
    is_open = made.get("exclusiveMinimum") == least or made.get("exclusiveMaximum") == most
    if least > most or (least == most and is_open):
        raise Never
    return made


def _whole(made: dict[str, Any]) -> dict[str, Any]:
    """Bounds of integers as integers. Raises Never."""
    least = [math.ceil(made["minimum"])] if "minimum" in made else []
    least += [math.floor(made["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in made else []
    most = [math.floor(made["maximum"])] if "maximum" in made else []
    most += [math.ceil(made["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in made else []
    if least and most and max(least) > min(most):
        raise Never
    bounds = {"minimum": max(least)} if least else {}
    return {"type": "integer"} | bounds | ({"maximum": min(most)} if most else {})
