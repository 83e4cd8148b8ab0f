from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, field_validator
from typing_extensions import TypedDict

from llmserve.api.validation_errors import mistake, name_as_sent, path_of
from llmserve.engine.request_validation import bounded
from llmserve.errors import RequestError

KEYS = st.text(max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


class Text(TypedDict):
    type: Literal["text"]
    text: str


class Image(TypedDict):
    type: Literal["image"]
    url: str
    detail: NotRequired[Literal["low", "high"]]


class Said(TypedDict):
    role: Literal["user"]
    content: str | list[Text | Image]
    name: NotRequired[str]


class Called(TypedDict):
    role: Literal["tool"]
    content: str
    id: str


class Body(BaseModel):
    messages: list[Said | Called]
    n: int = Field(default=1, ge=1, le=128)
    rate: float | None = None
    stop: str | Annotated[list[str], Field(max_length=2)] = ""
    on: bool = False

    @field_validator("n")
    @classmethod
    def check(cls, n: int) -> int:
        if n == 13:
            raise ValueError("thirteen is not allowed")
        return n


BODY = bounded(Body)
USER = {"role": "user", "content": "a"}


def told(body: Any, kind: TypeAdapter[Any] = BODY) -> RequestError:
    with pytest.raises(ValidationError) as caught:
        kind.validate_python(body)
    return mistake(caught.value.errors(include_url=False), body)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "messages", "`messages` is required."),
        ({"messages": 3}, "messages", "`messages` must be a list; it is 3."),
        (
            {"messages": [{"role": "user", "content": 1}]},
            "messages.0.content",
            "`messages.0.content` must be a string or a list; it is 1.",
        ),
        (
            {"messages": [{"role": "x", "content": "a"}]},
            "messages.0.role",
            "`messages.0.role` must be 'user' or 'tool'; it is `x`.",
        ),
        ({"messages": [{}]}, "messages.0.role", "`messages.0.role` is required."),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            "messages.0.id",
            "`messages.0.id` is required.",
        ),
        (
            {"messages": [USER, {"role": "user", "content": [{"type": "text", "text": None}]}]},
            "messages.1.content.0.text",
            "`messages.1.content.0.text` must be a string; it is null.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": ""} | {"detail": 3}]}]},
            "messages.0.content.0.detail",
            "`messages.0.content.0.detail` must be 'low' or 'high'; it is 3.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "sound"}]}]},
            "messages.0.content.0.type",
            "`messages.0.content.0.type` must be 'text' or 'image'; it is `sound`.",
        ),
        (
            {"messages": [USER], "n": "many"},
            "n",
            "`n` must be an integer; it is a string of 4 characters.",
        ),
        ({"messages": [USER], "n": 1.5}, "n", "`n` must be an integer; it is 1.5."),
        ({"messages": [USER], "n": 0}, "n", "`n` must be at least 1; it is 0."),
        ({"messages": [USER], "n": 13}, "n", "thirteen is not allowed"),
        ({"messages": [USER], "rate": {}}, "rate", "`rate` must be a number; it is an object."),
        ({"messages": [USER], "on": "no way"}, "on", None),
        (
            {"messages": [USER], "stop": ["a", "b", "c"]},
            "stop",
            "`stop` must be a string or a list of at most 2; it is a list of 3.",
        ),
        ([], None, "The body must be an object; it is a list of 0."),
    ],
)  # fmt: skip
def test_mistake_tells_where_and_what_is_allowed(
    body: Any, param: str | None, message: str | None
) -> None:
    error = told(body)
    assert error.param == param
    assert message is None or error.message == message
    missing = error.message.endswith("is required.")
    assert error.code == ("missing_required_parameter" if missing else "invalid_value")


def test_mistake_tells_no_text_of_the_body() -> None:
    assert "secret" not in told({"messages": [USER], "n": "secret"}).message


@given(JSON | st.builds(dict, messages=JSON, n=JSON, stop=JSON, on=JSON))
def test_mistake_of_any_body_is_a_line_and_a_path(body: Any) -> None:
    try:
        BODY.validate_python(body)
    except ValidationError as error:
        found = mistake(error.errors(include_url=False), body)
        assert found.message.isprintable()
        assert len(found.message) < 1000
        assert "Input should" not in found.message


@pytest.mark.parametrize(
    ("loc", "body", "expected"),
    [
        (("messages", 0, "role"), {"messages": [{"role": 1}]}, "messages.0.role"),
        (
            ("messages", 0, "ChatCompletionUserMessageParam", "content"),
            {"messages": [{"content": 3}]},
            "messages.0.content",
        ),
        (("function-after[_check(), Request]", "temperature"), {"temperature": "x"}, "temperature"),
        (("messages", 0, "content", "str"), {"messages": [{"content": 1}]}, "messages.0.content"),
        (("input", "list[str]"), {"input": 3}, "input"),
        (("input", "list[int]", 1), {"input": [1, "x"]}, "input.1"),
        ((), {}, ""),
    ],
)
def test_path_of_holds_only_what_is_in_the_body(
    loc: tuple[int | str, ...], body: Any, expected: str
) -> None:
    assert ".".join(path_of(loc, body)) == expected


@given(st.lists(st.integers() | KEYS, max_size=5), JSON, st.booleans())
def test_path_of_anything_never_raises(loc: list[int | str], body: Any, missing: bool) -> None:
    assert isinstance(path_of(loc, body, missing=missing), tuple)


@pytest.mark.parametrize(
    ("param", "body", "sent"),
    [
        ("input_tokens", {"messages": []}, "messages"),
        ("input_tokens", {"prompt": ""}, "prompt"),
        ("max_tokens", {"max_output_tokens": 5}, "max_output_tokens"),
        ("max_tokens", {"max_tokens": 5}, "max_tokens"),
        ("temperature", {"messages": []}, "temperature"),
        (None, {"messages": []}, None),
    ],
)
def test_name_as_sent_is_that_of_the_body(
    param: str | None, body: dict[str, Any], sent: str | None
) -> None:
    error = RequestError(f"{param} is wrong", param=param)
    name_as_sent(error, body)
    assert (error.param, error.message) == (sent, f"{sent} is wrong")


class Field2(TypedDict):
    name: NotRequired[str]
    note: NotRequired[str | None]
    data: NotRequired[dict[str, Any]]


class Nulls(BaseModel):
    parts: list[Field2] = []
    n: int = 3
    rate: float | None = 0.5


def test_null_of_a_field_that_takes_none_is_as_if_left_out() -> None:
    part = {"name": None, "note": None, "data": {"name": None}}
    taken = bounded(Nulls).validate_python({"parts": [part], "n": None, "rate": None})
    assert taken.n == 3
    assert taken.rate is None
    assert taken.parts == [{"note": None, "data": {"name": None}}]


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, "9" * 40])
def test_integer_beyond_64_bits_is_refused(number: Any) -> None:
    assert told({"messages": [USER], "n": number}).param == "n"
    assert told({"n": number}, bounded(Nulls)).param == "n"
