from __future__ import annotations

from collections.abc import Iterable  # noqa: TC003  # pydantic reads it
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from llmserve.engine.schema_nulls import schema_of, without_nulls

KEYS = st.text(max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)
NONE: frozenset[str] = frozenset()


class Typed(TypedDict):
    a: int | None


class Filter(BaseModel):
    kind: Literal["and"] = "and"
    filters: list[Filter] | None = None


class Tool(BaseModel):
    name: str | None = None
    input: dict[str, Any] | None = None
    anything: Any = None
    thing: object = None
    typed: Typed | None = None
    schema_: Annotated[dict[str, object] | None, Field(alias="schema")] = None
    filter: Filter | None = None


class Text(BaseModel):
    text: str | None = None
    mixed: Filter | None = None


class Other(BaseModel):
    mixed: dict[str, Any] | None = None


class Answer(BaseModel):
    model_config = ConfigDict(extra="allow")

    id: str | None = None
    items: list[Annotated[Tool | Text | Other, "one of"]] | None = None
    more: Iterable[Tool] | None = None
    error: str | None = None


SCHEMA = schema_of(Answer)
DATA = {"a": None, "b": [{"c": None}, None], "d": {"e": {"f": None}}}


@pytest.mark.parametrize("field", ["input", "anything", "thing", "typed", "schema"])
@pytest.mark.parametrize("many", ["items", "more"])
def test_nulls_in_field_of_free_type_stay(field: str, many: str) -> None:
    answer = {many: [{"name": None, field: DATA}]}
    assert without_nulls(answer, SCHEMA, NONE) == {many: [{field: DATA}]}


@given(JSON)
def test_nulls_in_any_data_stay(data: Any) -> None:
    answer = {"items": [{"input": data}, {"anything": data}]}
    kept = [{"input": data} if data is not None else {}]
    kept.append({"anything": data} if data is not None else {})
    assert without_nulls(answer, SCHEMA, NONE) == {"items": kept}


def test_nulls_of_fields_go_at_any_depth() -> None:
    filters = {"kind": "and", "filters": [{"kind": None, "filters": None}]}
    answer = {"id": None, "items": [{"text": None}, {"filter": filters}], "error": None}
    pruned = {"items": [{}, {"filter": {"kind": "and", "filters": [{}]}}]}
    assert without_nulls(answer, SCHEMA, NONE) == pruned


def test_nulls_that_are_kept_by_name_stay() -> None:
    answer = {"id": None, "items": [{"text": None}], "error": None}
    assert without_nulls(answer, SCHEMA, frozenset({"error", "text"})) == {
        "items": [{"text": None}],
        "error": None,
    }


def test_nulls_of_extra_keys_are_data() -> None:
    assert without_nulls({"extra": None, "other": DATA}, SCHEMA, NONE) == {
        "extra": None,
        "other": DATA,
    }


def test_nulls_where_one_of_two_models_has_data_stay() -> None:
    answer = {"items": [{"mixed": {"kind": None}}]}
    assert without_nulls(answer, SCHEMA, NONE) == answer


@given(JSON, st.frozensets(st.sampled_from(["id", "items", "error"])))
def test_pruning_takes_whatever_comes(value: Any, keep: frozenset[str]) -> None:
    pruned = without_nulls(value, SCHEMA, keep)
    assert without_nulls(pruned, SCHEMA, keep) == pruned
