from __future__ import annotations

import json
import tracemalloc
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.errors import RequestError
from llmserve.http.schema_limits import DEPTH_LIMIT, NODES_LIMIT, PATTERN_LIMIT, check_constraints
from tests.unit.effort import calls

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=20,
)
SCHEMA = {"type": "object", "properties": {"a": {"type": "array", "minItems": 10**9}}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            "response_format.json_schema.schema.properties.a.minItems",
        ),
        (
            {"structured_outputs": {"json": json.dumps(SCHEMA)}},
            "structured_outputs.json.properties.a.minItems",
        ),
        ({"structured_outputs": {"regex": "a{1000000}"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "(ab){2, 99999999999999}"}}, "structured_outputs.regex"),
        (
            {"tools": [{"function": {"parameters": {"maxLength": 1e12}}}]},
            "tools.0.function.parameters.maxLength",
        ),
        ({"text": {"format": {"schema": {"pattern": "x{,200000}"}}}}, "text.format.schema.pattern"),
        (
            {"structured_outputs": {"structural_tag": json.dumps(SCHEMA)}},
            "structured_outputs.structural_tag.properties.a.minItems",
        ),
        ({"structured_outputs": {"regex": "a{ 1 , 2 0 0 0 0 0 }"}}, "structured_outputs.regex"),
    ],
)
def test_counts_that_no_answer_could_reach_are_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        check_constraints(body)
    assert refused.value.param == param


@given(JSON)
def test_checking_constraints_takes_any_body(value: Any) -> None:
    with suppress(RequestError):
        check_constraints({"response_format": value, "tools": value})


def test_counts_that_people_use_are_taken() -> None:
    schema = {"maxLength": 65536, "pattern": "^[a-z]{1,64}$", "properties": {"maxItems": {}}}
    check_constraints({"response_format": {"schema": schema}, "structured_outputs": {"json": "{"}})


# Text that an expression with backtracking takes seconds to hours for.
SLOW = st.builds(
    lambda begin, middle, end, size: begin * size + middle + end * size,
    st.sampled_from(["{", "{1", " ", "1", "{,", "{ ", "{1}"]),
    st.sampled_from(["", ",", "{", "}", " "]),
    st.sampled_from([" ", "1", ",", "{", "}", "\t1"]),
    st.sampled_from([1000, PATTERN_LIMIT // 8]),
)


@given(SLOW)
def test_checking_a_pattern_takes_steps_by_its_counts(pattern: str) -> None:
    def check() -> None:
        with suppress(RequestError):
            check_constraints({"structured_outputs": {"regex": "{" + pattern}})

    _, steps = calls(check)
    assert steps < 8 * PATTERN_LIMIT


def test_checking_a_pattern_of_spaces_ends() -> None:
    spaces = " " * 30_000
    check_constraints({"structured_outputs": {"regex": "{" + spaces + "," + spaces}})


def test_a_long_pattern_is_refused() -> None:
    with pytest.raises(RequestError, match="up to 65536"):
        check_constraints({"structured_outputs": {"grammar": "a" * (PATTERN_LIMIT + 1)}})


def test_checking_a_long_key_over_many_items_takes_little_memory() -> None:
    body = {"tools": {"k" * 20_000: [[0]] * 30_000}}
    tracemalloc.start()
    try:
        check_constraints(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * 2**20


@pytest.mark.parametrize("item", [0, [], {}, "a"])
def test_checking_stops_at_the_limit_of_values(item: Any) -> None:
    def check() -> None:
        with pytest.raises(RequestError, match="values in schemas"):
            check_constraints({"tools": [[item] * NODES_LIMIT] * 50})

    _, steps = calls(check)
    assert steps < 10 * NODES_LIMIT


def test_schemas_nested_too_deep_are_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(DEPTH_LIMIT):
        schema = {"items": schema}
    with pytest.raises(RequestError, match="levels") as caught:
        check_constraints({"tools": schema})
    assert (caught.value.param or "").startswith("tools.items.items")
