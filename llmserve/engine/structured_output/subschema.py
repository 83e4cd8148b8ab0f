"""Subschemas of a JSON schema with their places, and the values of their keywords. Pure."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

# llmserve's own keyword, at the root of a tool's parameters, which are a document of their own.
# True: as `strict`; False: keywords that cannot be honoured are ignored.
ARGUMENTS = "x-llmserve-arguments"

TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
# Formats that xgrammar supports (vllm/v1/structured_output/backend_xgrammar.py).
FORMATS = frozenset(
    {"email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri"}
    | {"uri-reference", "uri-template", "json-pointer", "relative-json-pointer"}
)
# The types that each keyword constrains; other values satisfy it.
NUMBERS = ("number", "integer")
KEYWORDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("minLength", "maxLength", "pattern"), ("string",)),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), NUMBERS),
    "multipleOf": NUMBERS,
    **dict.fromkeys(("items", "prefixItems", "additionalItems", "unevaluatedItems"), ("array",)),
    **dict.fromkeys(("minItems", "maxItems", "uniqueItems", "contains"), ("array",)),
    **dict.fromkeys(("properties", "required", "additionalProperties"), ("object",)),
    **dict.fromkeys(("patternProperties", "propertyNames", "minProperties"), ("object",)),
    **dict.fromkeys(("maxProperties", "unevaluatedProperties"), ("object",)),
    **dict.fromkeys(("dependentRequired", "dependentSchemas", "dependencies"), ("object",)),
}
APPLICATORS = ("$ref", "allOf", "anyOf", "oneOf")
IN_PLACE = {*APPLICATORS, ARGUMENTS}
# Keywords without a form that xgrammar honours, for any type.
REFUSED = ("not", "if", "$dynamicRef", "$recursiveRef")


class Unsupported(ValueError):
    """A keyword that cannot be honoured, with its place."""


class Unsatisfiable(Exception):
    """No value satisfies a subschema."""


@dataclass(frozen=True)
class Document:
    """The schema in which a `$ref` is resolved."""

    root: Any
    place: str
    relaxed: bool = False  # unsupported keywords are ignored

    def target(self, pointer: str) -> Any:
        """Return the value at a JSON Pointer. Raises LookupError, ValueError or TypeError."""
        found = self.root
        for step in pointer.split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            found = found[int(key)] if isinstance(found, list) else found[key]
        return found


@dataclass(frozen=True)
class Subschema:
    """A subschema with its place. A list of them is a conjunction."""

    schema: Any
    place: str
    document: Document

    def child(self, *keys: Any) -> Subschema:
        schema = self.schema
        for key in keys:
            schema = schema[key]
        place = ".".join(map(str, (self.place, *keys) if self.place else keys))
        return Subschema(schema, place, self.document)

    def with_schema(self, schema: Any) -> Subschema:
        return Subschema(schema, self.place, self.document)

    def refuse(self, key: str, reason: str) -> None:
        """Raises Unsupported, unless unsupported keywords of the document are ignored."""
        if not self.document.relaxed:
            place = f" at {self.place[:200]}" if self.place else ""
            raise Unsupported(f"`{key}`{place} {reason}")


def document_of(root: Any, place: str) -> Document:
    return Document(root, place, isinstance(root, dict) and root.get(ARGUMENTS) is False)


# --- the values of keywords


def has_any(part: Subschema, *keys: str) -> bool:
    return isinstance(part.schema, dict) and any(key in part.schema for key in keys)


def distinct(parts: Iterable[Subschema]) -> list[Subschema]:
    found = {key_of(each): each for each in parts if each.schema is not True and each.schema != {}}
    return list(found.values())


def key_of(part: Subschema) -> str:
    """Return a key that is equal for equal subschemas of the same document."""
    return f"{part.document.place} {json.dumps(part.schema)}"


def list_of(part: Subschema, key: str) -> list[Any]:
    given = part.schema.get(key, [])
    if isinstance(given, list):
        return given
    part.refuse(key, "must be a list")
    return []


def subschemas_of(part: Subschema, key: str) -> list[Subschema]:
    """Return the subschemas in a list."""
    given = list_of(part, key)
    if key in part.schema and not given and key in APPLICATORS:
        part.refuse(key, "must not be empty")
    return [part.child(key, number) for number in range(len(given))]


def dict_of(part: Subschema, key: str) -> dict[str, Any]:
    given = part.schema.get(key, {})
    if isinstance(given, dict):
        return given
    part.refuse(key, "must be an object")
    return {}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def has_number(part: Subschema, key: str) -> bool:
    if key not in part.schema:
        return False
    if not is_number(part.schema[key]):
        part.refuse(key, "must be a finite number")
        return False
    return True


def range_of(assertions: list[Subschema], low: str, high: str) -> tuple[int, int | None]:
    least = [each.schema[low] for each in assertions if has_number(each, low)]
    most = [each.schema[high] for each in assertions if has_number(each, high)]
    return math.ceil(max([0, *least])), math.floor(min(most)) if most else None


def require_order(least: int, most: int | None) -> None:
    if most is not None and most < least:
        raise Unsatisfiable
