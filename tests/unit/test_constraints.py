from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.constraints import check_constraints
from llmserve.errors import RequestError

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
