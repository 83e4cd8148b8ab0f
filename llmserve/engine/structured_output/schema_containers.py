"""Arrays and objects in terms that xgrammar honours. Pure.

`Rewrite` rewrites a conjunction of subschemas; it returns False if no value satisfies it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmserve.engine.structured_output.schema_types import check_supported_pattern
from llmserve.engine.structured_output.subschema import (
    APPLICATORS,
    KEYWORDS,
    REFUSED,
    Subschema,
    Unsatisfiable,
    dict_of,
    list_of,
    range_of,
    require_order,
    subschemas_of,
)

Rewrite = Callable[[list[Subschema]], Any]


def rewrite_array(assertions: list[Subschema], rewrite: Rewrite) -> dict[str, Any]:
    """Raises Unsatisfiable."""
    least, most = range_of(assertions, "minItems", "maxItems")
    _refuse_sets(assertions, most)
    prefix, rest = _items(assertions)
    rewritten: list[Any] = []
    for parts in prefix[:most]:
        item = rewrite(parts)
        if item is False:
            most = len(rewritten)
            break
        rewritten.append(item)
    items = rewrite(rest)
    is_tuple = bool(rewritten) and not rest and least <= len(rewritten)
    if items is False or is_tuple or (most is not None and most <= len(rewritten)):
        items, most = False, len(rewritten)
    require_order(least, most)
    result: dict[str, Any] = {"type": "array", "items": items}
    if rewritten:
        result["prefixItems"] = rewritten
    if rewritten or items is not False:
        result["minItems"] = least
    if items is not False and most is not None:
        result["maxItems"] = most
    return result


def _refuse_sets(assertions: list[Subschema], most: int | None) -> None:
    for each in assertions:
        if each.schema.get("uniqueItems") and (most is None or most > 1):
            each.refuse("uniqueItems", "is not supported")
        if "contains" in each.schema and each.schema.get("minContains") != 0:
            each.refuse("contains", "is not supported")
        elif "maxContains" in each.schema and "contains" in each.schema:
            each.refuse("maxContains", "is not supported")


def _items(assertions: list[Subschema]) -> tuple[list[list[Subschema]], list[Subschema]]:
    """Return the subschemas of each of the first items, and those of all others."""
    prefix: list[list[Subschema]] = []
    rest: list[Subschema] = []
    for each in assertions:
        is_old = isinstance(each.schema.get("items"), list)  # of drafts before 2020-12
        key = "items" if is_old else "prefixItems"
        tail = "additionalItems" if is_old else "items"
        own = subschemas_of(each, key)
        if own and (prefix or rest):
            each.refuse(key, "is not supported together with other items")
            continue
        if tail in each.schema:
            if prefix:
                each.refuse(tail, "is not supported together with other items")
                continue
            rest.append(each.child(tail))
        prefix += [[item] for item in own]
    return prefix, rest


def rewrite_object(assertions: list[Subschema], rewrite: Rewrite) -> dict[str, Any]:
    """Raises Unsatisfiable."""
    least, most = range_of(assertions, "minProperties", "maxProperties")
    required = _required(assertions)
    additional = [
        each.child("additionalProperties")
        for each in assertions
        if "additionalProperties" in each.schema
    ]
    properties = _properties(assertions, required, additional, rewrite)
    rest = _additional(assertions, properties, additional, least, rewrite)
    if len(properties) < least and rest.get("additionalProperties") is False:
        raise Unsatisfiable
    require_order(max(len(required), least), most)
    result: dict[str, Any] = {"type": "object"}
    if properties:
        result["properties"] = properties
    if required:
        result["required"] = [name for name in properties if name in required]
    result |= rest
    if least > len(required):
        result["minProperties"] = least
    if most is not None:
        result["maxProperties"] = most
    return result


def _properties(
    assertions: list[Subschema],
    required: set[str],
    additional: list[Subschema],
    rewrite: Rewrite,
) -> dict[str, Any]:
    names = [name for each in assertions for name in dict_of(each, "properties")]
    result: dict[str, Any] = {}
    for name in dict.fromkeys([*names, *sorted(required)]):
        parts = []
        for each in assertions:
            if name in dict_of(each, "properties"):
                parts.append(each.child("properties", name))
            elif "additionalProperties" in each.schema:
                parts.append(each.child("additionalProperties"))
        rewritten = rewrite(parts)
        if rewritten is not False:
            result[name] = rewritten
        elif name in required:
            raise Unsatisfiable
        elif additional:
            _forbid(assertions, name, additional)
    return result


def _additional(
    assertions: list[Subschema],
    properties: dict[str, Any],
    additional: list[Subschema],
    least: int,
    rewrite: Rewrite,
) -> dict[str, Any]:
    """Return the keywords for properties that are not in `properties`."""
    patterns = [(each, name) for each in assertions for name in dict_of(each, "patternProperties")]
    names = [each.child("propertyNames") for each in assertions if _limits_names(each.schema)]
    has_names = bool(properties) or any(dict_of(each, "properties") for each in assertions)
    if (names or patterns) and (has_names or len(patterns) > 1 or (names and patterns)):
        owner, key = (
            (patterns[0][0], "patternProperties") if patterns else (names[0], "propertyNames")
        )
        owner.refuse(key, "is supported only without other names or patterns of properties")
        return {"additionalProperties": not has_names}
    if patterns:
        return _patterned(assertions, *patterns[0], least, rewrite)
    value = rewrite(additional)
    is_closed = properties or any(
        "properties" in each.schema or each.schema.get("unevaluatedProperties") is False
        for each in assertions
    )
    if value is False or (not additional and is_closed) or 1 < least <= len(properties):
        return {"additionalProperties": False}
    if assertions:
        _refuse_distinct(assertions[0], least)
    if not names:
        return {"additionalProperties": value or True}
    name = rewrite([*names, names[0].with_schema({"type": "string"})])
    if name is False:
        return {"additionalProperties": False}
    return {"propertyNames": name, "additionalProperties": value or True}


def _patterned(
    assertions: list[Subschema], owner: Subschema, pattern: str, least: int, rewrite: Rewrite
) -> dict[str, Any]:
    """Return the keywords for names of one pattern, next to which xgrammar allows no others."""
    if not check_supported_pattern(owner.child("patternProperties", pattern), pattern):
        return {"additionalProperties": True}
    _refuse_distinct(owner, least)
    others = [
        each.child("additionalProperties")
        for each in assertions
        if each is not owner and "additionalProperties" in each.schema
    ]
    value = rewrite([owner.child("patternProperties", pattern), *others])
    if value is False:
        return {"additionalProperties": False}
    return {"patternProperties": {pattern: value}}


def _required(assertions: list[Subschema]) -> set[str]:
    names: set[str] = set()
    for each in assertions:
        given = list_of(each, "required")
        if not all(isinstance(name, str) for name in given):
            each.refuse("required", "must be a list of names")
        names |= {name for name in given if isinstance(name, str)}
        for key in ("dependentRequired", "dependentSchemas", "dependencies"):
            if each.schema.get(key):
                each.refuse(key, "is not supported")
    return names


def _limits_names(schema: dict[str, Any]) -> bool:
    """Whether `propertyNames` requires more than that names are strings."""
    given = schema.get("propertyNames", True)
    return not (
        given is True
        or (
            (isinstance(given, dict) and given.get("type", "string") == "string")
            and not any(
                key in KEYWORDS or key in APPLICATORS or key in {"enum", "const", *REFUSED}
                for key in given
            )
        )
    )


def _forbid(assertions: list[Subschema], name: str, additional: list[Subschema]) -> None:
    """Refuse a property that is false in an open object: xgrammar would allow it."""
    if all(each.schema is False for each in additional):
        return
    owner = next(each for each in assertions if name in dict_of(each, "properties"))
    owner.refuse("properties", f"forbids {name!r}, which is supported only in a closed object")


def _refuse_distinct(part: Subschema, least: int) -> None:
    if least > 1:
        part.refuse("minProperties", "above 1 is supported only for named properties")
