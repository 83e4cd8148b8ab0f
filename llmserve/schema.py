"""JSON schemas in the terms that xgrammar honours. Pure.

xgrammar 0.2.8 ignores some keywords, and many next to others, without an error: its
grammar then allows answers that the schema forbids. `honoured` rewrites a schema so that
each text of xgrammar's grammar satisfies it, or raises Unsupported. It may allow less than
the schema does: an object with `properties` and no `additionalProperties` is closed, for
example, and a schema whose keywords are those of one type has that type.

Keywords that JSON Schema does not define, `format` and the annotations constrain nothing.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from llmserve.pattern import check_pattern

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# A keyword of our own, at the root of a tool's parameters. They are a document of their own,
# wherever they stand. True: as `strict`; False: what cannot be honoured is left out.
ARGUMENTS = "x-llmserve-arguments"

_NODES = 20_000  # subschemas of a result
_BRANCHES = 200  # of a `oneOf`, which are compared with each other
_TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
# Formats that xgrammar knows (vllm/v1/structured_output/backend_xgrammar.py).
FORMATS = frozenset(
    {"email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri"}
    | {"uri-reference", "uri-template", "json-pointer", "relative-json-pointer"}
)
# The types that each keyword constrains; other values satisfy it.
_NUMBERS = ("number", "integer")
_KEYWORDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("minLength", "maxLength", "pattern"), ("string",)),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _NUMBERS),
    "multipleOf": _NUMBERS,
    **dict.fromkeys(("items", "prefixItems", "additionalItems", "unevaluatedItems"), ("array",)),
    **dict.fromkeys(("minItems", "maxItems", "uniqueItems", "contains"), ("array",)),
    **dict.fromkeys(("properties", "required", "additionalProperties"), ("object",)),
    **dict.fromkeys(("patternProperties", "propertyNames", "minProperties"), ("object",)),
    **dict.fromkeys(("maxProperties", "unevaluatedProperties"), ("object",)),
    **dict.fromkeys(("dependentRequired", "dependentSchemas", "dependencies"), ("object",)),
}
_APPLICATORS = ("$ref", "allOf", "anyOf", "oneOf")
_IN_PLACE = {*_APPLICATORS, ARGUMENTS}
# Keywords that no rewriting makes xgrammar honour, whatever the type.
_REFUSED = ("not", "if", "$dynamicRef", "$recursiveRef")


class Unsupported(ValueError):
    """What of a schema cannot be honoured, with its place."""


class _Never(Exception):
    """No value satisfies a subschema."""


@dataclass(frozen=True)
class _Document:
    """What a `$ref` starts from."""

    root: Any
    place: str
    relaxed: bool = False

    def target(self, pointer: str) -> Any:
        """Raises LookupError or ValueError if there is no such subschema."""
        found = self.root
        for step in pointer.split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            found = found[int(key)] if isinstance(found, list) else found[key]
        if not isinstance(found, dict | bool):
            raise LookupError(pointer)
        return found


@dataclass(frozen=True)
class _Part:
    """A subschema, where it was found. Several of them are a conjunction."""

    schema: Any
    place: str
    document: _Document

    def inside(self, *keys: Any) -> _Part:
        schema = self.schema
        for key in keys:
            schema = schema[key]
        place = ".".join(map(str, (self.place, *keys) if self.place else keys))
        return _Part(schema, place, self.document)

    def like(self, schema: Any) -> _Part:
        return _Part(schema, self.place, self.document)

    def refuse(self, key: str, reason: str) -> None:
        """Raises Unsupported, unless what cannot be honoured is to be left out."""
        if not self.document.relaxed:
            place = f" at {self.place[:200]}" if self.place else ""
            raise Unsupported(f"`{key}`{place} {reason}")


def honoured(schema: Any, place: str = "") -> Any:
    """A schema for xgrammar, each of whose values satisfies `schema`. Raises Unsupported."""
    return _Rewriting().result(_Part(schema, place, _document(schema, place)))


def _document(root: Any, place: str) -> _Document:
    return _Document(root, place, isinstance(root, dict) and root.get(ARGUMENTS) is False)


class _Rewriting:
    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._defs: dict[str, Any] = {}
        self._nodes = 0

    def result(self, part: _Part) -> Any:
        try:
            root = self._inline([part])
        except _Never:
            raise Unsupported("no value satisfies it") from None
        except RecursionError:
            raise Unsupported("it is nested too deeply, or refers to itself") from None
        if not _is_finite(root, self._defs):
            raise Unsupported("only an endless text satisfies it")
        return {**root, "$defs": self._defs} if self._defs else root

    # --- conjunctions

    def _lower(self, parts: list[_Part]) -> Any:
        """The conjunction of `parts` for xgrammar; False if no value satisfies it."""
        parts = _distinct(parts)
        is_simple = len(parts) < 2 and not any(_applies(each, "$ref", "allOf") for each in parts)
        try:
            return self._inline(parts) if is_simple else self._named(parts)
        except _Never:
            return False

    def _named(self, parts: list[_Part]) -> Any:
        """A conjunction that can contain itself becomes a definition."""
        key = "\n".join(sorted(_key(each) for each in parts))
        name = self._names.get(key)
        if name is None:
            name = self._names[key] = f"d{len(self._names)}"
            self._defs[name] = True  # it can refer to itself
            try:
                self._defs[name] = self._inline(parts)
            except _Never:
                self._defs[name] = False
        return self._defs[name] and {"$ref": f"#/$defs/{name}"}

    def _inline(self, parts: list[_Part]) -> dict[str, Any]:
        """Raises _Never."""
        self._nodes += 1
        if self._nodes > _NODES:
            raise Unsupported("it is too large with its references and `allOf` resolved")
        atoms: list[_Part] = []
        choices: list[list[_Part]] = []
        for part in parts:
            self._flatten(part, atoms, choices, frozenset(), alone=len(parts) == 1)
        if not choices:
            return self._values(atoms)
        first, *others = choices
        for choice in others:
            atoms.append(choice[0].like({"anyOf": [each.schema for each in choice]}))
        branches = [self._lower([*atoms, each]) for each in first]
        branches = [each for each in branches if each is not False]
        if not branches:
            raise _Never
        return {"anyOf": branches}

    def _flatten(
        self,
        part: _Part,
        atoms: list[_Part],
        choices: list[list[_Part]],
        through: frozenset[str],
        *,
        alone: bool,
    ) -> None:
        """Sort a subschema into assertions and alternatives. Raises _Never."""
        schema = part.schema
        if schema is True:
            return
        if schema is False:
            raise _Never
        if not isinstance(schema, dict):
            return part.refuse("schema", "must be an object or a boolean")
        if ARGUMENTS in schema:
            if schema is not part.document.root:
                part = _Part(schema, part.place, _document(schema, part.place))
            atoms.append(part.like({"type": "object"}))
        self._refuse_keywords(part)
        if "$ref" in schema and (found := self._target(part)) is not None:
            if found.place in through:
                raise Unsupported(f"`$ref` at {part.place or 'the root'} refers to itself")
            self._flatten(found, atoms, choices, through | {found.place}, alone=False)
        for each in _list(part, "allOf"):
            self._flatten(each, atoms, choices, through, alone=False)
        if "anyOf" in schema:
            choices.append(_list(part, "anyOf") or [part.like(True)])
        if "oneOf" in schema:
            choices.append(self._exclusive(part) or [part.like(True)])
        own = {key: value for key, value in schema.items() if key not in _IN_PLACE}
        if any(key in _KEYWORDS or key in {"type", "enum", "const", "format"} for key in own):
            atoms.append(part.like(_without_unevaluated(part, own, alone=alone)))

    def _refuse_keywords(self, part: _Part) -> None:
        schema = part.schema
        for key in _REFUSED:
            if key in schema and not (key == "if" and not {"then", "else"} & schema.keys()):
                part.refuse(key, "is not supported. Leave it out, or say the same with `anyOf`.")
        if "$id" in schema and schema is not part.document.root:
            part.refuse("$id", "is supported at the root alone")

    def _target(self, part: _Part) -> _Part | None:
        """Where a `$ref` leads to: a JSON Pointer into the same document."""
        ref, document = part.schema["$ref"], part.document
        if isinstance(ref, str):
            own = document.root.get("$id") if isinstance(document.root, dict) else None
            pointer = unquote(ref.removeprefix(own) if own and isinstance(own, str) else ref)
            if pointer == "#" or pointer.startswith("#/"):
                try:
                    found = document.target(pointer)
                    return _Part(found, document.place + pointer, document)
                except (LookupError, ValueError, TypeError):
                    part.refuse("$ref", "leads to nothing in this schema")
                    return None
        part.refuse("$ref", "must be a JSON Pointer into the same schema, such as `#/$defs/name`")
        return None

    # --- oneOf

    def _exclusive(self, part: _Part) -> list[_Part]:
        """The branches of a `oneOf` as those of an `anyOf`, of which one at most is satisfied."""
        branches = _list(part, "oneOf")
        if len(branches) > _BRANCHES:
            raise Unsupported(f"`oneOf` has {len(branches)} branches; at most {_BRANCHES}")
        facts = [self._facts(each) for each in branches]
        needed: list[set[str]] = [set() for _ in branches]
        for one, other in combinations(range(len(branches)), 2):
            tags = facts[one].tags(facts[other])
            if tags is None:
                continue
            if not tags:
                part.refuse(
                    "oneOf",
                    "needs branches of different types, or with a property that is a different "
                    "constant in each. Use `anyOf`, or add such a property.",
                )
                continue
            needed[one].add(tags[0])
            needed[other].add(tags[0])
        return [
            each.like({"type": "object", "required": sorted(names), "allOf": [each.schema]})
            if names
            else each
            for each, names in zip(branches, needed, strict=True)
        ]

    def _facts(self, part: _Part) -> _Facts:
        atoms: list[_Part] = []
        try:
            self._flatten(part, atoms, [], frozenset(), alone=False)
            types = _explicit_types(atoms) or set(_TYPES)
            constants = _constants(atoms)
            properties: dict[str, set[str]] = {}
            for atom in atoms:
                for name in _dict(atom, "properties"):
                    inner: list[_Part] = []
                    found = atom.inside("properties", name)
                    self._flatten(found, inner, [], frozenset(), alone=False)
                    if (values := _constants(inner)) is not None:
                        properties[name] = set(values)
        except _Never:
            return _Facts(set(), set(), {})
        return _Facts(types, None if constants is None else set(constants), properties)

    # --- values

    def _values(self, atoms: list[_Part]) -> dict[str, Any]:
        """Raises _Never."""
        constants = _constants(atoms)
        if constants is not None:
            return _enumerated(constants, atoms)
        types = _types(atoms)
        if len(types) == len(_TYPES) - 1 and not any(_constrains(atom) for atom in atoms):
            return {}
        found: list[dict[str, Any]] = []
        for kind in (each for each in _TYPES if each in types):
            try:
                found.append(self._typed(kind, atoms))
            except _Never:
                continue
        if not found:
            raise _Never
        return found[0] if len(found) == 1 else {"anyOf": found}

    def _typed(self, kind: str, atoms: list[_Part]) -> dict[str, Any]:
        match kind:
            case "string":
                return _string(atoms)
            case "integer" | "number":
                return _number(kind, atoms)
            case "array":
                return self._array(atoms)
            case "object":
                return self._object(atoms)
        return {"type": kind}

    def _array(self, atoms: list[_Part]) -> dict[str, Any]:
        least, most = _range(atoms, "minItems", "maxItems")
        _refuse_sets(atoms, most)
        prefix, rest = _items(atoms)
        lowered = []
        for parts in prefix[:most]:
            item = self._lower(parts)
            if item is False:
                most = len(lowered)
                break
            lowered.append(item)
        items = self._lower(rest)
        is_tuple = bool(lowered) and not rest and least <= len(lowered)
        if items is False or is_tuple or (most is not None and most <= len(lowered)):
            items, most = False, len(lowered)
        _require_order(least, most)
        made: dict[str, Any] = {"type": "array", "items": items}
        if lowered:
            made["prefixItems"] = lowered
        if lowered or items is not False:
            made["minItems"] = least
        if items is not False and most is not None:
            made["maxItems"] = most
        return made

    def _object(self, atoms: list[_Part]) -> dict[str, Any]:
        least, most = _range(atoms, "minProperties", "maxProperties")
        required = _required(atoms)
        additional = [
            each.inside("additionalProperties")
            for each in atoms
            if "additionalProperties" in each.schema
        ]
        properties = self._properties(atoms, required, additional)
        made: dict[str, Any] = {"type": "object"}
        rest = self._additional(atoms, properties, additional, least)
        if len(properties) < least and rest.get("additionalProperties") is False:
            raise _Never
        _require_order(max(len(required), least), most)
        if properties:
            made["properties"] = properties
        if required:
            made["required"] = [name for name in properties if name in required]
        made |= rest
        if least > len(required):
            made["minProperties"] = least
        if most is not None:
            made["maxProperties"] = most
        return made

    def _properties(
        self, atoms: list[_Part], required: set[str], additional: list[_Part]
    ) -> dict[str, Any]:
        names = [name for each in atoms for name in _dict(each, "properties")]
        made: dict[str, Any] = {}
        for name in dict.fromkeys([*names, *sorted(required)]):
            parts = []
            for each in atoms:
                if name in _dict(each, "properties"):
                    parts.append(each.inside("properties", name))
                elif "additionalProperties" in each.schema:
                    parts.append(each.inside("additionalProperties"))
            lowered = self._lower(parts)
            if lowered is not False:
                made[name] = lowered
            elif name in required:
                raise _Never
            elif additional:
                _forbid(atoms, name, additional)
        return made

    def _additional(
        self,
        atoms: list[_Part],
        properties: dict[str, Any],
        additional: list[_Part],
        least: int,
    ) -> dict[str, Any]:
        """What is said of properties without a name of their own. Raises _Never."""
        patterns = [(each, name) for each in atoms for name in _dict(each, "patternProperties")]
        names = [
            each.inside("propertyNames") for each in atoms if _limits_names(each.schema)
        ]
        has_names = bool(properties) or any(_dict(each, "properties") for each in atoms)
        if (names or patterns) and (has_names or len(patterns) > 1 or (names and patterns)):
            owner, key = (patterns[0][0], "patternProperties") if patterns else (atoms[0], "propertyNames")
            owner.refuse(key, "is supported without other names or patterns of properties alone")
            return {"additionalProperties": False} if has_names else {"additionalProperties": True}
        if patterns:
            ((each, pattern),) = patterns
            if not _is_honoured(each.inside("patternProperties", pattern), pattern):
                return {"additionalProperties": True}
            _refuse_distinct(each, least)
            others = [
                other.inside("additionalProperties")
                for other in atoms
                if other is not each and "additionalProperties" in other.schema
            ]
            value = self._lower([each.inside("patternProperties", pattern), *others])
            if value is False:
                return {"additionalProperties": False}
            return {"patternProperties": {pattern: value}}
        value = self._lower(additional)
        is_closed = properties or any(
            "properties" in each.schema or each.schema.get("unevaluatedProperties") is False
            for each in atoms
        )
        if value is False or (not additional and is_closed) or 1 < least <= len(properties):
            return {"additionalProperties": False}
        if atoms:
            _refuse_distinct(atoms[0], least)
        if not names:
            return {"additionalProperties": value or True}
        name = self._lower([*names, names[0].like({"type": "string"})])
        if name is False:
            return {"additionalProperties": False}
        return {"propertyNames": name, "additionalProperties": value or True}


# --- types of values


@dataclass(frozen=True)
class _Facts:
    """What tells the branches of a `oneOf` apart. None: any value."""

    types: set[str]
    constants: set[str] | None
    properties: dict[str, set[str]]

    def tags(self, other: _Facts) -> list[str] | None:
        """Properties that, where both have them, differ; None if the values differ anyway."""
        if not _common(self.types, other.types):
            return None
        if self.constants is not None and other.constants is not None:
            return [] if self.constants & other.constants else None
        shared = self.properties.keys() & other.properties.keys()
        return sorted(
            name for name in shared if not self.properties[name] & other.properties[name]
        )


def _common(one: set[str], other: set[str]) -> set[str]:
    both = one & other
    if "integer" in one | other and "number" in one | other:
        both = both | {"integer"} - ({"integer"} if "number" in both else set())
    return both


def _types(atoms: list[_Part]) -> set[str]:
    """The types that are allowed. Raises _Never.

    Without a `type`, keywords that constrain one type stand for it.
    """
    types = _explicit_types(atoms)
    if types is None:
        keywords = (key for each in atoms for key in each.schema)
        families = {_KEYWORDS[key][0] for key in keywords if key in _KEYWORDS}
        types = families or set(_TYPES) - {"integer"}
    return types - {"integer"} if "number" in types else types


def _explicit_types(atoms: list[_Part]) -> set[str] | None:
    """What `type` leaves; None for any. Raises _Never."""
    types: set[str] | None = None
    for each in atoms:
        if "type" not in each.schema:
            continue
        given = each.schema["type"]
        names = given if isinstance(given, list) else [given]
        if not names or not all(isinstance(name, str) and name in _TYPES for name in names):
            each.refuse("type", f"must be one or more of {', '.join(_TYPES)}")
            continue
        types = set(names) if types is None else _common(types, set(names))
    if types is not None and not types:
        raise _Never
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
            return "integer" if value == int(value) else "number"
        case list():
            return "array"
    return "object"


def _constants(atoms: list[_Part]) -> dict[str, Any] | None:
    """The values that `enum` and `const` leave, by their canonical text; None for any."""
    left: dict[str, Any] | None = None
    for each in atoms:
        sets = [_list_of(each, "enum")] if "enum" in each.schema else []
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


def _enumerated(constants: dict[str, Any], atoms: list[_Part]) -> dict[str, Any]:
    """Raises _Never."""
    types = _explicit_types(atoms) or set(_TYPES)
    values = [value for value in constants.values() if _common({_type_of(value)}, types)]
    for each in atoms:
        values = [value for value in values if _satisfies(value, each)]
    if not values:
        raise _Never
    return {"enum": values}


def _satisfies(value: Any, part: _Part) -> bool:
    """Whether a value of an `enum` satisfies the keywords beside it."""
    schema = part.schema
    kind = _type_of(value)
    keys = [key for key in schema if kind in _KEYWORDS.get(key, ())]
    if kind == "string" and "pattern" not in keys:
        return all(_holds(key, len(value), schema[key]) for key in keys)
    if kind in _NUMBERS and "multipleOf" not in keys:
        return all(_holds(key, value, schema[key]) for key in keys)
    for key in keys:
        part.refuse(key, "is not supported beside `enum` or `const`")
    return True


def _holds(key: str, size: float, bound: Any) -> bool:
    if not _is_number(bound):
        return True
    if key.startswith("exclusive"):
        return size > bound if key.endswith("Minimum") else size < bound
    return size >= bound if key.startswith("min") else size <= bound


def _string(atoms: list[_Part]) -> dict[str, Any]:
    least, most = _range(atoms, "minLength", "maxLength")
    _require_order(least, most)
    made: dict[str, Any] = {"type": "string"}
    patterns = {}
    for each in atoms:
        pattern = each.schema.get("pattern")
        if pattern is not None and _is_honoured(each, pattern):
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


def _is_honoured(part: _Part, pattern: Any) -> bool:
    """Raises Unsupported for a pattern that xgrammar does not honour in a JSON string."""
    reason = "must be a string" if not isinstance(pattern, str) else check_pattern(pattern)
    if reason:
        part.refuse("pattern", reason)
    return not reason


def _number(kind: str, atoms: list[_Part]) -> dict[str, Any]:
    made: dict[str, Any] = {"type": kind}
    for key, choose in (
        ("minimum", max),
        ("maximum", min),
        ("exclusiveMinimum", max),
        ("exclusiveMaximum", min),
    ):
        bounds = [each.schema[key] for each in atoms if _has_number(each, key)]
        if bounds:
            made[key] = choose(bounds)
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
        raise _Never
    return made


def _whole(made: dict[str, Any]) -> dict[str, Any]:
    """Bounds of integers as integers. Raises _Never."""
    least = [math.ceil(made["minimum"])] if "minimum" in made else []
    least += [math.floor(made["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in made else []
    most = [math.floor(made["maximum"])] if "maximum" in made else []
    most += [math.ceil(made["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in made else []
    if least and most and max(least) > min(most):
        raise _Never
    bounds = {"minimum": max(least)} if least else {}
    return {"type": "integer"} | bounds | ({"maximum": min(most)} if most else {})


def _refuse_sets(atoms: list[_Part], most: int | None) -> None:
    for each in atoms:
        if each.schema.get("uniqueItems") and (most is None or most > 1):
            each.refuse("uniqueItems", "is not supported")
        if "contains" in each.schema and each.schema.get("minContains") != 0:
            each.refuse("contains", "is not supported")
        elif "maxContains" in each.schema and "contains" in each.schema:
            each.refuse("maxContains", "is not supported")


def _items(atoms: list[_Part]) -> tuple[list[list[_Part]], list[_Part]]:
    """The first items, and what all others are."""
    prefix: list[list[_Part]] = []
    rest: list[_Part] = []
    for each in atoms:
        is_old = isinstance(each.schema.get("items"), list)  # of drafts before 2020-12
        key = "items" if is_old else "prefixItems"
        tail = "additionalItems" if is_old else "items"
        own = _list(each, key)
        if own and (prefix or rest):
            each.refuse(key, "is not supported together with other items")
            continue
        if tail in each.schema:
            if prefix:
                each.refuse(tail, "is not supported together with other items")
                continue
            rest.append(each.inside(tail))
        prefix += [[item] for item in own]
    return prefix, rest


def _required(atoms: list[_Part]) -> set[str]:
    names: set[str] = set()
    for each in atoms:
        given = _list_of(each, "required")
        if not all(isinstance(name, str) for name in given):
            each.refuse("required", "must be a list of names")
        names |= {name for name in given if isinstance(name, str)}
        for key in ("dependentRequired", "dependentSchemas", "dependencies"):
            if each.schema.get(key):
                each.refuse(key, "is not supported")
    return names


def _limits_names(schema: dict[str, Any]) -> bool:
    """Whether `propertyNames` says more than that names are strings."""
    given = schema.get("propertyNames", True)
    return not (
        given is True
        or (isinstance(given, dict) and given.get("type", "string") == "string")
        and not any(key in _KEYWORDS or key in _APPLICATORS or key in {"enum", "const", *_REFUSED}
                    for key in given)
    )


def _forbid(atoms: list[_Part], name: str, additional: list[_Part]) -> None:
    """Refuse a property that is false where others are free: xgrammar would allow it."""
    if all(each.schema is False for each in additional):
        return
    owner = next(each for each in atoms if name in _dict(each, "properties"))
    owner.refuse("properties", f"forbids {name!r}, which is supported in a closed object alone")


def _refuse_distinct(part: _Part, least: int) -> None:
    if least > 1:
        part.refuse("minProperties", "above 1 is supported for properties with names alone")


def _without_unevaluated(part: _Part, own: dict[str, Any], *, alone: bool) -> dict[str, Any]:
    """`unevaluatedProperties` and `unevaluatedItems` as what they come to."""
    for key, plain in (
        ("unevaluatedProperties", "additionalProperties"),
        ("unevaluatedItems", "items"),
    ):
        if key not in own or own[key] is True:
            continue
        applied = {each for each in _APPLICATORS if each in part.schema}
        closes = alone and key == "unevaluatedProperties" and own[key] is False
        if not applied:
            own = {plain: own[key]} | {each: own[each] for each in own if each != key}
        elif not closes or applied & {"anyOf", "oneOf"}:
            part.refuse(key, "is not supported beside `$ref`, `allOf`, `anyOf` or `oneOf` here")
    return own


# --- the values of keywords


def _applies(part: _Part, *keys: str) -> bool:
    return isinstance(part.schema, dict) and any(key in part.schema for key in keys)


def _constrains(part: _Part) -> bool:
    return any(key in _KEYWORDS for key in part.schema)


def _distinct(parts: Iterable[_Part]) -> list[_Part]:
    found = {_key(each): each for each in parts if each.schema is not True and each.schema != {}}
    return list(found.values())


def _key(part: _Part) -> str:
    """Equal for parts that mean the same: in another document a reference does not."""
    return f"{part.document.place} {json.dumps(part.schema)}"


def _list_of(part: _Part, key: str) -> list[Any]:
    given = part.schema.get(key, [])
    if isinstance(given, list):
        return given
    part.refuse(key, "must be a list")
    return []


def _list(part: _Part, key: str) -> list[_Part]:
    """The subschemas in a list."""
    given = _list_of(part, key)
    if key in part.schema and not given and key in _APPLICATORS:
        part.refuse(key, "must not be empty")
    return [part.inside(key, number) for number in range(len(given))]


def _dict(part: _Part, key: str) -> dict[str, Any]:
    given = part.schema.get(key, {})
    if isinstance(given, dict):
        return given
    part.refuse(key, "must be an object")
    return {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _has_number(part: _Part, key: str) -> bool:
    if key not in part.schema:
        return False
    if not _is_number(part.schema[key]):
        part.refuse(key, "must be a number")
        return False
    return True


def _range(atoms: list[_Part], low: str, high: str) -> tuple[int, int | None]:
    least = [each.schema[low] for each in atoms if _has_number(each, low)]
    most = [each.schema[high] for each in atoms if _has_number(each, high)]
    return math.ceil(max([0, *least])), math.floor(min(most)) if most else None


def _require_order(least: int, most: int | None) -> None:
    if most is not None and most < least:
        raise _Never


def _is_finite(root: Any, defs: dict[str, Any]) -> bool:
    """Whether some text of a result ends: each recursion has a way out."""
    ending: set[str] = set()

    def ends(schema: Any) -> bool:
        if not isinstance(schema, dict):
            return bool(schema)
        if "$ref" in schema:
            return schema["$ref"].rpartition("/")[2] in ending
        if "anyOf" in schema:
            return any(map(ends, schema["anyOf"]))
        needed = [schema["properties"][name] for name in schema.get("required", ())]
        least = schema.get("minItems", 0)
        needed += schema.get("prefixItems", [])[:least]
        if least > len(schema.get("prefixItems", ())):
            needed.append(schema["items"])
        return all(map(ends, needed))

    grown = True
    while grown:
        found = {name for name, each in defs.items() if name not in ending and ends(each)}
        ending |= found
        grown = bool(found)
    return ends(root)


def constraints_in(tag: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a structural tag holds schemas and expressions: the object, and its key."""
    unseen = [tag]
    while unseen:
        value = unseen.pop()
        if isinstance(value, list):
            unseen += value
        elif isinstance(value, dict):
            for key, each in value.items():
                if key in {"json_schema", "schema"} or (key, value.get("type")) == _EXPRESSION:
                    yield value, key
                else:
                    unseen.append(each)


_EXPRESSION = ("pattern", "regex")
