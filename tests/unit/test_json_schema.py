from __future__ import annotations

import contextlib
import datetime as dt  # noqa: TC003  # pydantic reads the annotations
import enum
from typing import Annotated, Any, Literal, Optional, Union
from uuid import UUID  # noqa: TC003

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib._pydantic import to_strict_json_schema
from pydantic import BaseModel, EmailStr, Field, HttpUrl, JsonValue, TypeAdapter, conint, constr

from llmserve.engine.structured_output.json_schema import rewrite_schema
from llmserve.engine.structured_output.subschema import ARGUMENTS, IN_PLACE, KEYWORDS, Unsupported
from llmserve.engine.structured_output.subschema import REFUSED as REFUSED_KEYS


class Color(enum.Enum):
    RED = "red"
    GREEN = "green"


class Address(BaseModel):
    """Where."""

    street: str = Field(description="A street", max_length=80)
    zip_code: constr(pattern=r"^\d{5}$")  # type: ignore[valid-type]
    since: dt.datetime | None = None


class Tree(BaseModel):
    value: int
    children: list[Tree] = []


class Link(BaseModel):
    next: Optional[Link] = None  # noqa: UP045  # as users write it


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    friends: list[Annotated[Union[Cat, Dog], Field(discriminator="kind")]]  # noqa: UP007


class Everything(BaseModel):
    name: str
    age: Annotated[int, Field(ge=0, lt=150)]
    ratio: float = Field(gt=0, le=1)
    color: Color
    home: Address
    others: list[Address] = Field(default_factory=list, max_length=3)
    scores: dict[str, float]
    by_color: dict[Color, int] = {}
    either: int | str | None
    literal: Literal[1, "a", None]
    pair: tuple[int, str]
    day: dt.date
    at: dt.time
    for_s: dt.timedelta
    id: UUID
    site: HttpUrl
    animal: Annotated[Union[Cat, Dog], Field(discriminator="kind")]  # noqa: UP007
    anything: Any
    value: JsonValue
    nested: dict[str, list[dict[str, int]]]
    small: conint(multiple_of=1)  # type: ignore[valid-type]
    tree: Tree


@pytest.mark.parametrize("model", [Address, Tree, Link, Cat, Dog, Everything])
def test_schema_of_pydantic_is_honoured(model: type[BaseModel]) -> None:
    made = rewrite_schema(model.model_json_schema())
    assert made["type"] == "object"
    assert list(made["properties"]) == list(model.model_fields)


@pytest.mark.parametrize("kind", [list[int], dict[str, Tree], int | str, Color, EmailStr | None])
def test_schema_of_a_type_is_honoured(kind: Any) -> None:
    if kind == (EmailStr | None):
        pytest.importorskip("email_validator")
    assert rewrite_schema(TypeAdapter(kind).json_schema())


@pytest.mark.parametrize("model", [Address, Tree, Link, Cat])
def test_strict_schema_of_the_openai_sdk_is_honoured(model: type[BaseModel]) -> None:
    made = rewrite_schema(to_strict_json_schema(model))
    assert made["required"] == list(model.model_fields)


def test_discriminator_is_required() -> None:
    branches = rewrite_schema(Everything.model_json_schema())
    animal = branches["properties"]["animal"]["anyOf"]
    names = [each["$ref"].rpartition("/")[2] for each in animal]
    assert ["kind" in branches["$defs"][name]["required"] for name in names] == [True, True]


REFUSED: dict[str, tuple[Any, str]] = {
    "not": ({"not": {}}, "`not`"),
    "place": ({"properties": {"a": {"items": {"not": {}}}}}, "`not` at properties.a.items"),
    "in a definition": (
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer", "multipleOf": 2}}},
        "`multipleOf` at #/$defs/a",
    ),
    "remote": ({"$ref": "http://a/b"}, "`$ref` must be a JSON Pointer"),
    "file": ({"$ref": "b.json#/a"}, "`$ref` must be a JSON Pointer"),
    "dangling": ({"$ref": "#/$defs/a"}, "`$ref` has no target"),
    "dynamic": ({"$dynamicRef": "#a"}, "`$dynamicRef`"),
    "inner id": ({"properties": {"a": {"$id": "http://a"}}}, "`$id` at properties.a"),
    "itself": ({"$ref": "#"}, "refers to itself"),
    "endless": ({"required": ["a"], "properties": {"a": {"$ref": "#"}}}, "endless"),
    "no value": ({"type": "string", "allOf": [{"type": "integer"}]}, "no value"),
    "false": (False, "no value"),
    "empty range": ({"type": "number", "minimum": 2, "exclusiveMaximum": 2}, "no value"),
    "empty anyOf": ({"anyOf": []}, "`anyOf` must not be empty"),
    "overlap": ({"oneOf": [{"minLength": 1}, {"maxLength": 2}]}, "`oneOf`"),
    "type": ({"type": "foo"}, "`type` must be"),
    "an infinite bound": ({"type": "integer", "minimum": float("-inf")}, "`minimum` must be"),
    "no schema": ({"anyOf": [1]}, "at anyOf.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_schema_refused_has_keyword_and_place(name: str) -> None:
    schema, reason = REFUSED[name]
    with pytest.raises(Unsupported) as refused:
        rewrite_schema(schema)
    assert reason in str(refused.value)


REWRITTEN: dict[str, tuple[Any, Any]] = {
    "free": ({}, {}),
    "annotations": ({"title": "x", "$comment": "y", "nullable": True, "format": "int32"}, {}),
    "a required name": (
        {"type": "object", "required": ["a"]},
        {
            "type": "object",
            "properties": {"a": {}},
            "required": ["a"],
            "additionalProperties": False,
        },
    ),
    "allOf": (
        {"allOf": [{"type": "string", "minLength": 1}, {"minLength": 3}]},
        {"type": "string", "minLength": 3},
    ),
    "a bound beside a reference": (
        {"$ref": "#/$defs/a", "minimum": 5, "$defs": {"a": {"type": "integer"}}},
        {"type": "integer", "minimum": 5},
    ),
    "anyOf beside a type": (
        {"type": "integer", "anyOf": [{"minimum": 5}, {"type": "string"}]},
        {"anyOf": [{"$ref": "#/$defs/d0"}], "$defs": {"d0": {"type": "integer", "minimum": 5}}},
    ),
    "an enum beside a type": ({"type": "string", "enum": ["a", 1]}, {"enum": ["a"]}),
    "fractions beside an integer": ({"type": "integer", "enum": [1.5, 2, 3.0]}, {"enum": [2, 3.0]}),
    "fractions beside a number": ({"type": "number", "enum": [1.5, 2, "a"]}, {"enum": [1.5, 2]}),
    "a length alone": ({"minLength": 3}, {"type": "string", "minLength": 3}),
    "a name of a keyword": (
        {"properties": {"not": {"type": "null"}}},
        {
            "type": "object",
            "properties": {"not": {"type": "null"}},
            "additionalProperties": False,
        },
    ),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_schema_is_rewritten(name: str) -> None:
    schema, expected = REWRITTEN[name]
    made = rewrite_schema(schema)
    if "$defs" not in expected:
        made.pop("$defs", None)
    else:
        made["$defs"] = {
            key: each for key, each in made["$defs"].items() if key in expected["$defs"]
        }
    assert made == expected


def test_arguments_leave_out_what_cannot_be_honoured() -> None:
    parameters = {"properties": {"a": {"type": "integer", "multipleOf": 2}}, "not": {}}
    made = rewrite_schema({**parameters, ARGUMENTS: False})
    assert made["properties"] == {"a": {"type": "integer"}}
    with pytest.raises(Unsupported):
        rewrite_schema({**parameters, ARGUMENTS: True})


def test_arguments_inside_a_schema_are_a_document_of_their_own() -> None:
    parameters = {"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"const": 1}}}
    made = rewrite_schema({"properties": {"in": {"allOf": [{**parameters, ARGUMENTS: True}]}}})
    (inner,) = (each for each in made["$defs"].values() if "properties" in each)
    assert "a" in inner["properties"]


def test_schema_that_multiplies_is_refused() -> None:
    """A choice in each of 20 members of an `allOf` makes a million of them."""
    choices = [
        {"anyOf": [{"required": [f"a{number}"]}, {"required": [f"b{number}"]}]}
        for number in range(20)
    ]
    with pytest.raises(Unsupported, match="too large"):
        rewrite_schema({"allOf": choices})


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [*KEYWORDS, *IN_PLACE, *REFUSED_KEYS, "type", "enum", "const", "$id", "$defs"]
)


@given(schema=st.dictionaries(KEYS, ANY | st.dictionaries(KEYS, ANY, max_size=4), max_size=4))
def test_any_schema_is_honoured_or_refused(schema: dict[str, Any]) -> None:
    with contextlib.suppress(Unsupported):
        rewrite_schema(schema)
