"""JSON schemas in the terms that xgrammar honours. Pure.

xgrammar 0.2.8 ignores some keywords, and many next to others, without an error: its
grammar then allows answers that the schema forbids. `honoured` rewrites a schema so that
each text of xgrammar's grammar satisfies it, or raises Unsupported. It may allow less than
the schema does: an object with `properties` and no `additionalProperties` is closed, for
example, and a schema whose keywords are those of one type has that type.

Keywords that JSON Schema does not define, `format` and the annotations constrain nothing.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from llmserve.engine.structured_output.schema_types import (
    Facts,
    constants_of,
    enumerated,
    explicit_types,
    is_honoured,
    number_of,
    string_of,
    types_of,
)
from llmserve.engine.structured_output.subschema import (
    APPLICATORS,
    ARGUMENTS,
    IN_PLACE,
    KEYWORDS,
    REFUSED,
    TYPES,
    Never,
    Part,
    Unsupported,
    applies,
    constrains,
    dict_of,
    distinct,
    document_of,
    key_of,
    list_of,
    parts_of,
    range_of,
    require_order,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_NODES = 20_000  # subschemas of a result
_BRANCHES = 200  # of a `oneOf`, which are compared with each other


def honoured(schema: Any, place: str = "") -> Any:
    """A schema for xgrammar, each of whose values satisfies `schema`. Raises Unsupported."""
    return _Rewriting().result(Part(schema, place, document_of(schema, place)))


class _Rewriting:
    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._defs: dict[str, Any] = {}
        self._nodes = 0

    def result(self, part: Part) -> Any:
        try:
            root = self._inline([part])
        except Never:
            raise Unsupported("no value satisfies it") from None
        except RecursionError:
            raise Unsupported("it is nested too deeply, or refers to itself") from None
        if not _is_finite(root, self._defs):
            raise Unsupported("only an endless text satisfies it")
        return {**root, "$defs": self._defs} if self._defs else root

    # --- conjunctions

    def _lower(self, parts: list[Part]) -> Any:
        """The conjunction of `parts` for xgrammar; False if no value satisfies it."""
        parts = distinct(parts)
        is_simple = len(parts) < 2 and not any(applies(each, "$ref", "allOf") for each in parts)
        try:
            return self._inline(parts) if is_simple else self._named(parts)
        except Never:
            return False

    def _named(self, parts: list[Part]) -> Any:
        """A conjunction that can contain itself becomes a definition."""
        key = "\n".join(sorted(key_of(each) for each in parts))
        name = self._names.get(key)
        if name is None:
            name = self._names[key] = f"d{len(self._names)}"
            self._defs[name] = True  # it can refer to itself
            try:
                self._defs[name] = self._inline(parts)
            except Never:
                self._defs[name] = False
        return self._defs[name] and {"$ref": f"#/$defs/{name}"}

    def _inline(self, parts: list[Part]) -> dict[str, Any]:
        """Raises Never."""
        self._nodes += 1
        if self._nodes > _NODES:
            raise Unsupported("it is too large with its references and `allOf` resolved")
        atoms: list[Part] = []
        choices: list[list[Part]] = []
        for part in parts:
            self._flatten(part, atoms, choices, frozenset(), alone=len(parts) == 1)
        if not choices:
            return self._values(atoms)
        first, *others = choices
        atoms += [each[0].like({"anyOf": [part.schema for part in each]}) for each in others]
        branches = [self._lower([*atoms, each]) for each in first]
        branches = [each for each in branches if each is not False]
        if not branches:
            raise Never
        return {"anyOf": branches}

    def _flatten(
        self,
        part: Part,
        atoms: list[Part],
        choices: list[list[Part]],
        through: frozenset[str],
        *,
        alone: bool,
    ) -> None:
        """Sort a subschema into assertions and alternatives. Raises Never."""
        schema = part.schema
        if schema is False:
            raise Never
        if not isinstance(schema, dict):
            if schema is not True:
                part.refuse("schema", "must be an object or a boolean")
            return
        if ARGUMENTS in schema:
            part = _arguments(part)
            atoms.append(part.like({"type": "object"}))
        self._refuse_keywords(part)
        if "$ref" in schema and (found := self._target(part)) is not None:
            if found.place in through:
                raise Unsupported(f"`$ref` at {part.place or 'the root'} refers to itself")
            self._flatten(found, atoms, choices, through | {found.place}, alone=False)
        for each in parts_of(part, "allOf"):
            self._flatten(each, atoms, choices, through, alone=False)
        choices += filter(None, (parts_of(part, "anyOf"), self._exclusive(part)))
        own = {key: value for key, value in schema.items() if key not in IN_PLACE}
        if any(map(_asserts, own)):
            atoms.append(part.like(_without_unevaluated(part, own, alone=alone)))

    def _refuse_keywords(self, part: Part) -> None:
        schema = part.schema
        for key in REFUSED:
            if key in schema and not (key == "if" and not {"then", "else"} & schema.keys()):
                part.refuse(key, "is not supported. Leave it out, or say the same with `anyOf`.")
        if "$id" in schema and schema is not part.document.root:
            part.refuse("$id", "is supported at the root alone")

    def _target(self, part: Part) -> Part | None:
        """Where a `$ref` leads to: a JSON Pointer into the same document."""
        ref, document = part.schema["$ref"], part.document
        if isinstance(ref, str):
            own = document.root.get("$id") if isinstance(document.root, dict) else None
            pointer = unquote(ref.removeprefix(own) if own and isinstance(own, str) else ref)
            if pointer == "#" or pointer.startswith("#/"):
                try:
                    found = document.target(pointer)
                    return Part(found, document.place + pointer, document)
                except (LookupError, ValueError, TypeError):
                    part.refuse("$ref", "leads to nothing in this schema")
                    return None
        part.refuse("$ref", "must be a JSON Pointer into the same schema, such as `#/$defs/name`")
        return None

    # --- oneOf

    def _exclusive(self, part: Part) -> list[Part]:
        """The branches of a `oneOf` as those of an `anyOf`, of which one at most is satisfied."""
        branches = parts_of(part, "oneOf")
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

    def _facts(self, part: Part) -> Facts:
        atoms: list[Part] = []
        try:
            self._flatten(part, atoms, [], frozenset(), alone=False)
            types = explicit_types(atoms) or set(TYPES)
            constants = constants_of(atoms)
            properties: dict[str, set[str]] = {}
            for atom in atoms:
                for name in dict_of(atom, "properties"):
                    inner: list[Part] = []
                    found = atom.inside("properties", name)
                    self._flatten(found, inner, [], frozenset(), alone=False)
                    if (values := constants_of(inner)) is not None:
                        properties[name] = set(values)
        except Never:
            return Facts(set(), set(), {})
        return Facts(types, None if constants is None else set(constants), properties)

    # --- values

    def _values(self, atoms: list[Part]) -> dict[str, Any]:
        """Raises Never."""
        constants = constants_of(atoms)
        if constants is not None:
            return enumerated(constants, atoms)
        types = types_of(atoms)
        if len(types) == len(TYPES) - 1 and not any(constrains(atom) for atom in atoms):
            return {}
        found: list[dict[str, Any]] = []
        for kind in (each for each in TYPES if each in types):
            try:
                found.append(self._typed(kind, atoms))
            except Never:
                continue
        if not found:
            raise Never
        return found[0] if len(found) == 1 else {"anyOf": found}

    def _typed(self, kind: str, atoms: list[Part]) -> dict[str, Any]:
        match kind:
            case "string":
                return string_of(atoms)
            case "integer" | "number":
                return number_of(kind, atoms)
            case "array":
                return self._array(atoms)
            case "object":
                return self._object(atoms)
        return {"type": kind}

    def _array(self, atoms: list[Part]) -> dict[str, Any]:
        least, most = range_of(atoms, "minItems", "maxItems")
        _refuse_sets(atoms, most)
        prefix, rest = _items(atoms)
        lowered: list[Any] = []
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
        require_order(least, most)
        made: dict[str, Any] = {"type": "array", "items": items}
        if lowered:
            made["prefixItems"] = lowered
        if lowered or items is not False:
            made["minItems"] = least
        if items is not False and most is not None:
            made["maxItems"] = most
        return made

    def _object(self, atoms: list[Part]) -> dict[str, Any]:
        least, most = range_of(atoms, "minProperties", "maxProperties")
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
            raise Never
        require_order(max(len(required), least), most)
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
        self, atoms: list[Part], required: set[str], additional: list[Part]
    ) -> dict[str, Any]:
        names = [name for each in atoms for name in dict_of(each, "properties")]
        made: dict[str, Any] = {}
        for name in dict.fromkeys([*names, *sorted(required)]):
            parts = []
            for each in atoms:
                if name in dict_of(each, "properties"):
                    parts.append(each.inside("properties", name))
                elif "additionalProperties" in each.schema:
                    parts.append(each.inside("additionalProperties"))
            lowered = self._lower(parts)
            if lowered is not False:
                made[name] = lowered
            elif name in required:
                raise Never
            elif additional:
                _forbid(atoms, name, additional)
        return made

    def _additional(
        self,
        atoms: list[Part],
        properties: dict[str, Any],
        additional: list[Part],
        least: int,
    ) -> dict[str, Any]:
        """What is said of properties without a name of their own. Raises Never."""
        patterns = [(each, name) for each in atoms for name in dict_of(each, "patternProperties")]
        names = [each.inside("propertyNames") for each in atoms if _limits_names(each.schema)]
        has_names = bool(properties) or any(dict_of(each, "properties") for each in atoms)
        if (names or patterns) and (has_names or len(patterns) > 1 or (names and patterns)):
            owner, key = (
                (patterns[0][0], "patternProperties") if patterns else (names[0], "propertyNames")
            )
            owner.refuse(key, "is supported without other names or patterns of properties alone")
            return {"additionalProperties": not has_names}
        if patterns:
            return self._patterned(atoms, *patterns[0], least)
        value = self._lower(additional)
        is_closed = properties or any(
            "properties" in each.schema or each.schema.get("unevaluatedProperties") is False
            for each in atoms
        )
        if value is False or (not additional and is_closed) or 1 < least <= len(properties):
            return {"additionalProperties": False}
        if atoms:
            _refuse_distinct(atoms[0], least)
        made = {"additionalProperties": value or True}
        if names:
            name = self._lower([*names, names[0].like({"type": "string"})])
            made = (
                {"additionalProperties": False} if name is False else {"propertyNames": name} | made
            )
        return made

    def _patterned(
        self, atoms: list[Part], owner: Part, pattern: str, least: int
    ) -> dict[str, Any]:
        """Names by one pattern. xgrammar allows no others then."""
        if not is_honoured(owner.inside("patternProperties", pattern), pattern):
            return {"additionalProperties": True}
        _refuse_distinct(owner, least)
        others = [
            each.inside("additionalProperties")
            for each in atoms
            if each is not owner and "additionalProperties" in each.schema
        ]
        value = self._lower([owner.inside("patternProperties", pattern), *others])
        if value is False:
            return {"additionalProperties": False}
        return {"patternProperties": {pattern: value}}


def _arguments(part: Part) -> Part:
    """A tool's parameters, as a document of their own."""
    if part.schema is part.document.root:
        return part
    return Part(part.schema, part.place, document_of(part.schema, part.place))


def _asserts(key: str) -> bool:
    return key in KEYWORDS or key in {"type", "enum", "const", "format"}


def _refuse_sets(atoms: list[Part], most: int | None) -> None:
    for each in atoms:
        if each.schema.get("uniqueItems") and (most is None or most > 1):
            each.refuse("uniqueItems", "is not supported")
        if "contains" in each.schema and each.schema.get("minContains") != 0:
            each.refuse("contains", "is not supported")
        elif "maxContains" in each.schema and "contains" in each.schema:
            each.refuse("maxContains", "is not supported")


def _items(atoms: list[Part]) -> tuple[list[list[Part]], list[Part]]:
    """The first items, and what all others are."""
    prefix: list[list[Part]] = []
    rest: list[Part] = []
    for each in atoms:
        is_old = isinstance(each.schema.get("items"), list)  # of drafts before 2020-12
        key = "items" if is_old else "prefixItems"
        tail = "additionalItems" if is_old else "items"
        own = parts_of(each, key)
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


def _required(atoms: list[Part]) -> set[str]:
    names: set[str] = set()
    for each in atoms:
        given = list_of(each, "required")
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
        or (
            (isinstance(given, dict) and given.get("type", "string") == "string")
            and not any(
                key in KEYWORDS or key in APPLICATORS or key in {"enum", "const", *REFUSED}
                for key in given
            )
        )
    )


def _forbid(atoms: list[Part], name: str, additional: list[Part]) -> None:
    """Refuse a property that is false where others are free: xgrammar would allow it."""
    if all(each.schema is False for each in additional):
        return
    owner = next(each for each in atoms if name in dict_of(each, "properties"))
    owner.refuse("properties", f"forbids {name!r}, which is supported in a closed object alone")


def _refuse_distinct(part: Part, least: int) -> None:
    if least > 1:
        part.refuse("minProperties", "above 1 is supported for properties with names alone")


def _without_unevaluated(part: Part, own: dict[str, Any], *, alone: bool) -> dict[str, Any]:
    """`unevaluatedProperties` and `unevaluatedItems` as what they come to."""
    for key, plain in (
        ("unevaluatedProperties", "additionalProperties"),
        ("unevaluatedItems", "items"),
    ):
        if key not in own or own[key] is True:
            continue
        applied = {each for each in APPLICATORS if each in part.schema}
        closes = alone and key == "unevaluatedProperties" and own[key] is False
        if not applied:
            own = {plain: own[key]} | {each: own[each] for each in own if each != key}
        elif not closes or applied & {"anyOf", "oneOf"}:
            part.refuse(key, "is not supported beside `$ref`, `allOf`, `anyOf` or `oneOf` here")
    return own


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
