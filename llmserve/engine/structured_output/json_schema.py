"""Rewrites JSON schemas into schemas that xgrammar honours. Pure.

xgrammar 0.2.8 ignores some keywords, and many next to others, without an error: its grammar then
allows answers that the schema forbids. Each text of the grammar of a rewritten schema satisfies
the original schema. It may allow less: an object with `properties` and no `additionalProperties`
is closed, for example, and a schema whose keywords are those of one type has that type.

Keywords that JSON Schema does not define, `format` and the annotations constrain nothing.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any
from urllib.parse import unquote

from llmserve.engine.structured_output.schema_containers import rewrite_array, rewrite_object
from llmserve.engine.structured_output.schema_types import (
    BranchFacts,
    constants_of,
    enumerated,
    explicit_types,
    rewrite_number,
    rewrite_string,
    types_of,
)
from llmserve.engine.structured_output.subschema import (
    APPLICATORS,
    ARGUMENTS,
    IN_PLACE,
    KEYWORDS,
    REFUSED,
    TYPES,
    Subschema,
    Unsatisfiable,
    Unsupported,
    dict_of,
    distinct,
    document_of,
    has_any,
    key_of,
    subschemas_of,
)

_NODES = 20_000  # subschemas of a result
_BRANCHES = 200  # of a `oneOf`, which are compared in pairs


def rewrite_schema(schema: Any, place: str = "") -> Any:
    """Return a schema for xgrammar whose values all satisfy `schema`. Raises Unsupported."""
    return _Rewriting().result(Subschema(schema, place, document_of(schema, place)))


class _Rewriting:
    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._defs: dict[str, Any] = {}
        self._nodes = 0

    def result(self, root: Subschema) -> Any:
        try:
            rewritten = self._inline([root])
        except Unsatisfiable:
            raise Unsupported("no value satisfies the schema") from None
        except RecursionError:
            raise Unsupported("the schema is nested too deeply, or refers to itself") from None
        if not _has_finite_text(rewritten, self._defs):
            raise Unsupported("only endless text satisfies the schema")
        return {**rewritten, "$defs": self._defs} if self._defs else rewritten

    # --- conjunctions

    def _rewrite(self, parts: list[Subschema]) -> Any:
        """Return the conjunction of `parts` for xgrammar; False if no value satisfies it."""
        parts = distinct(parts)
        is_simple = len(parts) < 2 and not any(has_any(each, "$ref", "allOf") for each in parts)
        try:
            return self._inline(parts) if is_simple else self._definition(parts)
        except Unsatisfiable:
            return False

    def _definition(self, parts: list[Subschema]) -> Any:
        """Return a reference to a definition of the conjunction, which can contain itself."""
        key = "\n".join(sorted(key_of(each) for each in parts))
        name = self._names.get(key)
        if name is None:
            name = self._names[key] = f"d{len(self._names)}"
            self._defs[name] = True  # while it is rewritten, it can refer to itself
            try:
                self._defs[name] = self._inline(parts)
            except Unsatisfiable:
                self._defs[name] = False
        return self._defs[name] and {"$ref": f"#/$defs/{name}"}

    def _inline(self, parts: list[Subschema]) -> dict[str, Any]:
        """Return the conjunction itself. Raises Unsatisfiable."""
        self._nodes += 1
        if self._nodes > _NODES:
            raise Unsupported("the schema is too large after resolving references and `allOf`")
        assertions: list[Subschema] = []
        choices: list[list[Subschema]] = []
        for part in parts:
            self._flatten(part, assertions, choices, frozenset(), alone=len(parts) == 1)
        if not choices:
            return self._rewrite_values(assertions)
        first, *others = choices
        assertions += [
            each[0].with_schema({"anyOf": [part.schema for part in each]}) for each in others
        ]
        branches = [self._rewrite([*assertions, each]) for each in first]
        branches = [each for each in branches if each is not False]
        if not branches:
            raise Unsatisfiable
        return {"anyOf": branches}

    def _flatten(
        self,
        part: Subschema,
        assertions: list[Subschema],
        choices: list[list[Subschema]],
        through: frozenset[str],
        *,
        alone: bool,
    ) -> None:
        """Split a subschema into assertions and alternatives. Raises Unsatisfiable."""
        schema = part.schema
        if schema is False:
            raise Unsatisfiable
        if not isinstance(schema, dict):
            if schema is not True:
                part.refuse("schema", "must be an object or a boolean")
            return
        if ARGUMENTS in schema:
            part = _as_document(part)
            assertions.append(part.with_schema({"type": "object"}))
        self._refuse_keywords(part)
        if "$ref" in schema and (target := self._target(part)) is not None:
            if target.place in through:
                raise Unsupported(f"`$ref` at {part.place or 'the root'} refers to itself")
            self._flatten(target, assertions, choices, through | {target.place}, alone=False)
        for each in subschemas_of(part, "allOf"):
            self._flatten(each, assertions, choices, through, alone=False)
        choices += filter(None, (subschemas_of(part, "anyOf"), self._exclusive(part)))
        own = {key: value for key, value in schema.items() if key not in IN_PLACE}
        if any(map(_asserts, own)):
            assertions.append(part.with_schema(_without_unevaluated(part, own, alone=alone)))

    def _refuse_keywords(self, part: Subschema) -> None:
        schema = part.schema
        for key in REFUSED:
            if key in schema and not (key == "if" and not {"then", "else"} & schema.keys()):
                part.refuse(key, "is not supported. Remove it, or use `anyOf` instead.")
        if "$id" in schema and schema is not part.document.root:
            part.refuse("$id", "is supported only at the root")

    def _target(self, part: Subschema) -> Subschema | None:
        """Return the target of a `$ref`: a JSON Pointer into the same document."""
        ref, document = part.schema["$ref"], part.document
        if isinstance(ref, str):
            own = document.root.get("$id") if isinstance(document.root, dict) else None
            pointer = unquote(ref.removeprefix(own) if own and isinstance(own, str) else ref)
            if pointer == "#" or pointer.startswith("#/"):
                try:
                    found = document.target(pointer)
                    return Subschema(found, document.place + pointer, document)
                except (LookupError, ValueError, TypeError):
                    part.refuse("$ref", "has no target in this schema")
                    return None
        part.refuse("$ref", "must be a JSON Pointer into the same schema, such as `#/$defs/name`")
        return None

    # --- oneOf

    def _exclusive(self, part: Subschema) -> list[Subschema]:
        """Return the branches of a `oneOf` as branches of an `anyOf` that exclude each other."""
        branches = subschemas_of(part, "oneOf")
        if len(branches) > _BRANCHES:
            raise Unsupported(f"`oneOf` has {len(branches)} branches; at most {_BRANCHES}")
        facts = [self._facts(each) for each in branches]
        required: list[set[str]] = [set() for _ in branches]
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
            required[one].add(tags[0])
            required[other].add(tags[0])
        return [
            each.with_schema({"type": "object", "required": sorted(names), "allOf": [each.schema]})
            if names
            else each
            for each, names in zip(branches, required, strict=True)
        ]

    def _facts(self, part: Subschema) -> BranchFacts:
        assertions: list[Subschema] = []
        try:
            self._flatten(part, assertions, [], frozenset(), alone=False)
            types = explicit_types(assertions) or set(TYPES)
            constants = constants_of(assertions)
            properties: dict[str, set[str]] = {}
            for assertion in assertions:
                for name in dict_of(assertion, "properties"):
                    inner: list[Subschema] = []
                    child = assertion.child("properties", name)
                    self._flatten(child, inner, [], frozenset(), alone=False)
                    if (values := constants_of(inner)) is not None:
                        properties[name] = set(values)
        except Unsatisfiable:
            return BranchFacts(set(), set(), {})
        return BranchFacts(types, None if constants is None else set(constants), properties)

    # --- values

    def _rewrite_values(self, assertions: list[Subschema]) -> dict[str, Any]:
        """Raises Unsatisfiable."""
        constants = constants_of(assertions)
        if constants is not None:
            return enumerated(constants, assertions)
        types = types_of(assertions)
        if len(types) == len(TYPES) - 1 and not any(
            key in KEYWORDS for each in assertions for key in each.schema
        ):
            return {}
        branches: list[dict[str, Any]] = []
        for kind in (each for each in TYPES if each in types):
            try:
                branches.append(self._rewrite_type(kind, assertions))
            except Unsatisfiable:
                continue
        if not branches:
            raise Unsatisfiable
        return branches[0] if len(branches) == 1 else {"anyOf": branches}

    def _rewrite_type(self, kind: str, assertions: list[Subschema]) -> dict[str, Any]:
        match kind:
            case "string":
                return rewrite_string(assertions)
            case "integer" | "number":
                return rewrite_number(kind, assertions)
            case "array":
                return rewrite_array(assertions, self._rewrite)
            case "object":
                return rewrite_object(assertions, self._rewrite)
        return {"type": kind}


def _as_document(part: Subschema) -> Subschema:
    """Return a tool's parameters as a document of their own."""
    if part.schema is part.document.root:
        return part
    return Subschema(part.schema, part.place, document_of(part.schema, part.place))


def _asserts(key: str) -> bool:
    return key in KEYWORDS or key in {"type", "enum", "const", "format"}


def _without_unevaluated(part: Subschema, own: dict[str, Any], *, alone: bool) -> dict[str, Any]:
    """Replace `unevaluatedProperties` and `unevaluatedItems` by equivalent keywords."""
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
            part.refuse(key, "is not supported next to `$ref`, `allOf`, `anyOf` or `oneOf` here")
    return own


def _has_finite_text(root: Any, defs: dict[str, Any]) -> bool:
    """Whether some text of a rewritten schema ends: each recursion has an exit."""
    finite: set[str] = set()

    def is_finite(schema: Any) -> bool:
        if not isinstance(schema, dict):
            return bool(schema)
        if "$ref" in schema:
            return schema["$ref"].rpartition("/")[2] in finite
        if "anyOf" in schema:
            return any(map(is_finite, schema["anyOf"]))
        needed = [schema["properties"][name] for name in schema.get("required", ())]
        least = schema.get("minItems", 0)
        needed += schema.get("prefixItems", [])[:least]
        if least > len(schema.get("prefixItems", ())):
            needed.append(schema["items"])
        return all(map(is_finite, needed))

    while found := {name for name, each in defs.items() if name not in finite and is_finite(each)}:
        finite |= found
    return is_finite(root)
