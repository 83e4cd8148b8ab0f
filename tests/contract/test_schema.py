"""What `llmserve.schema` promises of xgrammar: each text of a grammar satisfies its schema."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import xgrammar as xgr
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from llmserve.schema import honoured
from llmserve.subschema import Unsupported

# One token a character, so that random texts end soon.
VOCABULARY = [*'{}[]",:\\-+.0159aAbBcgiyokelnrtfsuxX_ \n@é', "</s>"]
ENDS = frozenset('"}],')
LENGTH = 300


@cache
def tokenizer() -> xgr.TokenizerInfo:
    return xgr.TokenizerInfo(
        [each.encode() for each in VOCABULARY], stop_token_ids=[len(VOCABULARY) - 1]
    )


def texts(schema: Any, count: int, seed: int) -> list[str]:
    """Some texts that xgrammar allows."""
    compiled = xgr.GrammarCompiler(tokenizer(), cache_enabled=False).compile_json_schema(
        json.dumps(schema)
    )
    chance = random.Random(seed)
    found = (text_of(compiled, chance) for _ in range(count))
    return [text for text in found if text is not None]


def text_of(compiled: xgr.CompiledGrammar, chance: random.Random) -> str | None:
    matcher = xgr.GrammarMatcher(compiled)
    mask = xgr.allocate_token_bitmask(1, len(VOCABULARY))
    text = ""
    for _ in range(LENGTH):
        matcher.fill_next_token_bitmask(mask)
        bits = [int(word) & 0xFFFFFFFF for word in mask[0]]
        allowed = [n for n in range(len(VOCABULARY)) if bits[n // 32] >> n % 32 & 1]
        if not allowed:
            return None
        ends = [n for n in allowed if VOCABULARY[n] in ENDS or n == len(VOCABULARY) - 1]
        token = chance.choice(ends if ends and chance.random() < 0.5 else allowed)
        assert matcher.accept_token(token)
        if matcher.is_terminated():
            return text
        text += VOCABULARY[token]
    return None


def wrong(schema: Any, seed: int = 0, count: int = 20) -> list[str]:
    """Texts that are allowed and do not satisfy the schema; none if it is refused."""
    try:
        rewritten = honoured(schema)
    except Unsupported:
        return []
    validator = Draft202012Validator(schema)
    return [
        text for text in texts(rewritten, count, seed) if not validator.is_valid(json.loads(text))
    ]


NAMES = st.sampled_from(["a", "b", "k"])
SIZES = st.integers(0, 3)
BOUNDS = st.sampled_from([0, 1, 5, -1, 1.5, 0.1, 10, 15])
VALUES = st.sampled_from(["a", "b", "", 1, 1.0, 5, True, None, [], ["a"], {}, {"a": 1}])
PATTERNS = st.sampled_from(
    [
        "^a+$",
        "a",
        "^(a|b)$",
        "^[^a]$",
        "^a|b$",
        "(?=a)b",
        "^[ -~]*$",
        r"^\d{1,2}$",
        '"',
        r"^\w\s\D$",
    ]
)
TYPES = st.sampled_from(["string", "integer", "number", "boolean", "null", "array", "object"])


def keywords(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    lists = st.lists(inner, min_size=1, max_size=3)
    properties = st.dictionaries(NAMES, inner, max_size=3)
    return st.fixed_dictionaries(
        {},
        optional={
            "type": TYPES | st.lists(TYPES, min_size=1, max_size=3, unique=True),
            "enum": st.lists(VALUES, min_size=1, max_size=4),
            "const": VALUES,
            "properties": properties,
            "required": st.lists(NAMES, max_size=2, unique=True),
            "additionalProperties": inner,
            "unevaluatedProperties": inner,
            "patternProperties": st.dictionaries(PATTERNS, inner, max_size=2),
            "propertyNames": inner,
            "minProperties": SIZES,
            "maxProperties": SIZES,
            "dependentRequired": st.just({"a": ["b"]}),
            "items": inner,
            "prefixItems": lists,
            "unevaluatedItems": inner,
            "minItems": SIZES,
            "maxItems": SIZES,
            "uniqueItems": st.booleans(),
            "contains": inner,
            "minLength": SIZES,
            "maxLength": SIZES,
            "pattern": PATTERNS,
            "format": st.sampled_from(["date", "other"]),
            "minimum": BOUNDS,
            "maximum": BOUNDS,
            "exclusiveMinimum": BOUNDS,
            "exclusiveMaximum": BOUNDS,
            "multipleOf": st.sampled_from([1, 2]),
            "allOf": lists,
            "anyOf": lists,
            "oneOf": lists,
            "not": inner,
            "if": inner,
            "then": inner,
            "$ref": st.sampled_from(
                ["#", "#/$defs/a", "#/$defs/b", "#/$defs/x~1y", "#/properties/a"]
            ),
            "title": st.just("x"),
        },
    ).map(lambda each: dict(list(each.items())))


def few(schema: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """A schema of a few of the keywords: with all of them nothing is ever allowed."""
    keys = list(schema)
    return {keys[n % len(keys)]: schema[keys[n % len(keys)]] for n in kept} if keys else {}


def some(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(few, keywords(inner), st.lists(st.integers(0, 40), max_size=4))


SCHEMAS = st.builds(
    lambda root, defs: {**root, "$defs": defs},
    some(st.recursive(st.booleans() | some(st.booleans()), some, max_leaves=6)),
    st.fixed_dictionaries({name: some(some(st.booleans())) for name in ("a", "b", "x/y")}),
)


@given(schema=SCHEMAS, seed=st.integers(0, 1000))
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@example({"type": "object", "required": ["a"]}, 0)
def test_honoured_schema_allows_nothing_wrong(schema: dict[str, Any], seed: int) -> None:
    assert wrong(schema, seed) == []
