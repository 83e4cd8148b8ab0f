"""Subschemas of a JSON schema, where they stand, and the values of their keywords. Pure."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

# A keyword of our own, at the root of a tool's parameters. They are a document of their own,
# wherever they stand. True: as `strict`; False: what cannot be honoured is left out.
ARGUMENTS = "x-llmserve-arguments"

TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
# Formats that xgrammar knows (vllm/v1/structured_output/backend_xgrammar.py).
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
# Keywords that no rewriting makes xgrammar honour, whatever the type.
REFUSED = ("not", "if", "$dynamicRef", "$recursiveRef")


class Unsupported(ValueError):
    """What of a schema cannot be honoured, with its place."""


class Never(Exception):
    """No value satisfies a subschema."""


@dataclass(frozen=True)
class Document:
    """What a `$ref` starts from."""

    root: Any
    place: str
    relaxed: bool = False

    def target(self, pointer: str) -> Any:
        """Raises LookupError, ValueError or TypeError if there is no such value."""
        found = self.root
        for step in pointer.split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            found = found[int(key)] if isinstance(found, list) else found[key]
        return found


@dataclass(frozen=True)
class Part:
    """A subschema, where it was found. Several of them are a conjunction."""

    schema: Any
    place: str
    document: Document

    def inside(self, *keys: Any) -> Part:
        schema = self.schema
        for key in keys:
            schema = schema[key]
        place = ".".join(map(str, (self.place, *keys) if self.place else keys))
        return Part(schema, place, self.document)

    def like(self, schema: Any) -> Part:
        return Part(schema, self.place, self.document)

    def refuse(self, key: str, reason: str) -> None:
        """Raises Unsupported, unless what cannot be honoured is to be left out."""
        if not self.document.relaxed:
            place = f" at {self.place[:200]}" if self.place else ""
            raise Unsupported(f"`{key}`{place} {reason}")


def document_of(root: Any, place: str) -> Document:
    return Document(root, place, isinstance(root, dict) and root.get(ARGUMENTS) is False)


# --- the values of keywords


def applies(part: Part, *keys: str) -> bool:
    return isinstance(part.schema, dict) and any(key in part.schema for key in keys)


def constrains(part: Part) -> bool:
    return any(key in KEYWORDS for key in part.schema)


def distinct(parts: Iterable[Part]) -> list[Part]:
    found = {key_of(each): each for each in parts if each.schema is not True and each.schema != {}}
    return list(found.values())


def key_of(part: Part) -> str:
    """Equal for parts that mean the same: in another document a reference does not."""
    return f"{part.document.place} {json.dumps(part.schema)}"


def list_of(part: Part, key: str) -> list[Any]:
    given = part.schema.get(key, [])
    if isinstance(given, list):
        return given
    part.refuse(key, "must be a list")
    return []


def parts_of(part: Part, key: str) -> list[Part]:
    """The subschemas in a list."""
    given = list_of(part, key)
    if key in part.schema and not given and key in APPLICATORS:
        part.refuse(key, "must not be empty")
    return [part.inside(key, number) for number in range(len(given))]


def dict_of(part: Part, key: str) -> dict[str, Any]:
    given = part.schema.get(key, {})
    if isinstance(given, dict):
        return given
    part.refuse(key, "must be an object")
    return {}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def has_number(part: Part, key: str) -> bool:
    if key not in part.schema:
        return False
    if not is_number(part.schema[key]):
        part.refuse(key, "must be a finite number")
        return False
    return True


def range_of(atoms: list[Part], low: str, high: str) -> tuple[int, int | None]:
    least = [each.schema[low] for each in atoms if has_number(each, low)]
    most = [each.schema[high] for each in atoms if has_number(each, high)]
    return math.ceil(max([0, *least])), math.floor(min(most)) if most else None


def require_order(least: int, most: int | None) -> None:
    if most is not None and most < least:
        raise Never
