"""What `llmserve.engine.structured_output.json_schema` promises of xgrammar: each text of a grammar satisfies its schema."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
import xgrammar as xgr
from jsonschema import Draft202012Validator
from xgrammar.testing import _is_grammar_accept_string

from llmserve.engine.structured_output.json_schema import rewrite_schema
from llmserve.engine.structured_output.subschema import Unsupported
from tests.contract.grammar_texts import texts

if TYPE_CHECKING:
    from collections.abc import Callable


def wrong(schema: Any, seed: int = 0, count: int = 8) -> list[str]:
    """Texts that are allowed and do not satisfy the schema; none if it is refused."""
    try:
        rewritten = rewrite_schema(schema)
    except Unsupported:
        return []
    validator = Draft202012Validator(schema)
    return [text for text in texts(rewritten, count, seed) if not is_valid(validator, text)]


def is_valid(validator: Draft202012Validator, text: str) -> bool:
    try:
        return bool(validator.is_valid(json.loads(text)))
    except RecursionError:
        return True  # a branch that refers to itself means nothing


class Schemas:
    """Random schemas of keywords that go together, and of some that do not."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def root(self) -> dict[str, Any]:
        depth = self.chance.randint(1, 3)
        return self.made(depth) | {"$defs": {name: self.made(1) for name in "ab"}}

    def leaf(self) -> Any:
        return self.chance.choice(LEAVES)

    def any(self, depth: int) -> Any:
        return self.made(depth) if depth > 0 else self.leaf()

    def made(self, depth: int) -> dict[str, Any]:
        families = self._families(depth - 1)
        kind = self.chance.choice([*families, "object"])
        pool = families[kind]
        if self.chance.random() < 0.35:
            pool = pool | self.chance.choice(list(families.values()))
        keys = self.chance.sample(list(pool), min(len(pool), self.chance.randint(1, 3)))
        schema = {key: pool[key]() for key in keys}
        if self.chance.random() < 0.5:
            mixed = ["integer", ["string", "null"], ["integer", "array", "object"]]
            schema["type"] = self.chance.choice([kind, *mixed] if kind != "all" else mixed)
        if self.chance.random() < 0.3:
            schema["$ref"] = self.chance.choice(["#", "#/$defs/a", "#/$defs/b"])
        return schema

    def _families(self, depth: int) -> dict[str, dict[str, Callable[[], Any]]]:
        pick = self.chance.choice

        def inner() -> Any:
            return self.any(depth)

        def inners() -> list[Any]:
            return [inner() for _ in range(self.chance.randint(1, 3))]

        def size() -> int:
            return self.chance.randint(0, 3)

        def bound() -> float:
            return pick([0, 1, 5, -1, 1.5, 0.1, 10, 15])

        return {
            "string": {
                **dict.fromkeys(("minLength", "maxLength"), size),
                "pattern": lambda: pick(PATTERNS),
                "format": lambda: pick(["date", "other"]),
            },
            "number": {
                **dict.fromkeys(("minimum", "maximum"), bound),
                **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), bound),
                "multipleOf": lambda: pick([1, 2]),
            },
            "array": {
                **dict.fromkeys(("items", "contains", "unevaluatedItems"), inner),
                **dict.fromkeys(("minItems", "maxItems"), size),
                "prefixItems": inners,
                "uniqueItems": lambda: pick([True, False]),
            },
            "object": {
                "properties": lambda: {pick("abk"): inner() for _ in range(size())},
                "required": lambda: self.chance.sample("abk", self.chance.randint(1, 2)),
                "additionalProperties": inner,
                "unevaluatedProperties": lambda: pick([False, inner()]),
                "patternProperties": lambda: {pick(["^a+$", "b"]): inner()},
                "propertyNames": self.leaf,
                "dependentRequired": lambda: {"a": ["b"]},
                **dict.fromkeys(("minProperties", "maxProperties"), size),
            },
            "all": {
                **dict.fromkeys(("allOf", "anyOf", "oneOf"), inners),
                "enum": lambda: [pick(VALUES) for _ in range(3)],
                "not": inner,
            },
        }


VALUES = ["a", "b", "", 1, 1.0, 1.5, 5, True, None, [], ["a"], {}, {"a": 1}]
PATTERNS = ["^a+$", "a", "^(a|b)$", "^[^a]$", "^a|b$", "(?=a)b", "^[ -~]*$", r"^\w\s\D$", '"']
LEAVES: list[Any] = [
    *({}, True, False, {"const": "a"}, {"const": 1}),
    *({"type": kind} for kind in ("string", "integer", "null", "boolean")),
    *({"type": "string", "pattern": pattern} for pattern in PATTERNS),
    *({"$ref": ref} for ref in ("#", "#/$defs/a", "#/$defs/b")),
]


@pytest.mark.parametrize("seed", range(20))
def test_honoured_schema_allows_nothing_wrong(seed: int) -> None:
    schemas = Schemas(seed)
    for number in range(40):
        schema = schemas.root()
        assert wrong(schema, number) == [], schema


def test_many_schemas_are_honoured() -> None:
    """Else the test above shows nothing."""
    schemas = Schemas(0)
    made = [schemas.root() for _ in range(100)]
    assert sum(is_honoured(each) for each in made) > 30


def is_honoured(schema: Any) -> bool:
    try:
        rewrite_schema(schema)
    except Unsupported:
        return False
    return True


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"allOf": [{"type": "string"}, {"minLength": 2}]}, "1"),
        ({"not": {"type": "string"}}, '"a"'),
        ({"$ref": "#/$defs/a", "minimum": 5, "$defs": {"a": {"type": "integer"}}}, "1"),
        ({"type": "object", "required": ["a"]}, "{}"),
        ({"minLength": 3}, '"a"'),
        ({"enum": [1, "a"], "type": "string"}, "1"),
        ({"$ref": "http://localhost/a"}, "1"),
    ],
)
def test_xgrammar_ignores_what_is_rewritten_or_refused(schema: Any, text: str) -> None:
    """When this fails, xgrammar honours more than it did."""
    grammar = xgr.Grammar.from_json_schema(json.dumps(schema))
    assert _is_grammar_accept_string(grammar, text)
