from __future__ import annotations

import json

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmserve.api import json_text
from llmserve.api.json_text import COST_LIMIT, KEY_LIMIT, REST_LIMIT, TEXT_LIMIT, load
from llmserve.errors import BodyTooLarge, LLMServeError, RequestError
from tests.unit.effort import calls

MIB = 2**20
# What ends of slices can fall into: characters of several bytes, escapes, surrogate pairs.
ATOMS = ["a", "é", "東", "🙂", '\\"', "\\\\", "\\n", "\\/", "\\u0041", "\\ud83d\\ude00", "{,[:"]
CONTENTS = st.builds(
    lambda atoms, begin, size: begin + "".join(atoms) * (size // len("".join(atoms))),
    st.lists(st.sampled_from(ATOMS), min_size=1, max_size=5),
    st.text(st.sampled_from("abcdefghijkl"), max_size=12),
    st.sampled_from([10, KEY_LIMIT - 5, KEY_LIMIT + 5, 3 * KEY_LIMIT, 17 * KEY_LIMIT]),
)


def refused(body: bytes) -> LLMServeError:
    with pytest.raises(RequestError) as caught:
        load(body)
    assert caught.value.message.isprintable()
    return caught.value


@given(st.lists(CONTENTS, min_size=1, max_size=3))
def test_load_long_strings_gives_what_orjson_gives(contents: list[str]) -> None:
    strings = [f'"{each}"' for each in contents]
    text = f'[{",".join(strings)},{{"k":{strings[0]},"n":[1,{{}},2.5]}}]'.encode()
    assert load(text) == orjson.loads(text)


@given(CONTENTS, st.integers(0, 400_000), st.sampled_from(b'"\\,u\x80\xf0\x00d{}'))
@example("\\ud83d" * 6000, 0, ord('"'))
def test_load_changed_byte_agrees_with_orjson(content: str, at: int, byte: int) -> None:
    text = bytearray(f'{{"a":"{content}","b":["{content}"]}}'.encode())
    text[at % len(text)] = byte
    try:
        expected = orjson.loads(text)
    except orjson.JSONDecodeError:
        assert refused(bytes(text)).code in {"invalid_json", "invalid_value"}
    else:
        assert load(text) == expected


MANY: dict[str, bytes] = {
    "numbers": b"[" + b"0," * COST_LIMIT + b"0]",
    "strings": b"[" + b'"",' * (COST_LIMIT // 2) + b"0]",
    "objects": b"[" + b"{}," * (COST_LIMIT // 5) + b"0]",
    "arrays": b"[" * COST_LIMIT,
    "keys": b"{" + b'"a":0,' * (COST_LIMIT // 5) + b'"b":0}',
    "quotes": b'"' * (4 * COST_LIMIT),
    "after a string": b'["' + b'\\"' * MIB + b'",' + b"0," * COST_LIMIT + b"0]",
}


@pytest.mark.parametrize("body", MANY.values(), ids=MANY)
def test_load_more_than_the_cost_limit_is_refused_unparsed(
    body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_text, "_loads", None)
    error = refused(body)
    assert isinstance(error, BodyTooLarge)
    assert str(COST_LIMIT) in error.message


def test_load_values_at_the_cost_limit_are_taken() -> None:
    count = COST_LIMIT - 10
    assert len(load(b"[" + b"7," * count + b"7]")) == count + 1


@pytest.mark.parametrize(
    "body",
    [b"[" + b" " * REST_LIMIT + b"]", b"[" + b"1" * REST_LIMIT + b"]"],
    ids=["spaces", "digits"],
)
def test_load_more_than_the_rest_limit_is_refused(body: bytes) -> None:
    error = refused(body)
    assert isinstance(error, BodyTooLarge)
    assert str(REST_LIMIT) in error.message


def test_load_a_long_key_is_refused() -> None:
    assert "key" in refused(b'{"' + b"k" * 100_000 + b'" :1}').message


def test_load_a_string_without_an_end_is_refused() -> None:
    assert refused(b'["' + b"a" * 100_000).code == "invalid_json"


@pytest.mark.parametrize("character", ["é", "🙂", "\\u00e9"])
def test_load_a_long_string_beyond_ascii_is_refused(character: str) -> None:
    body = b'{"url":"' + b"a" * TEXT_LIMIT + character.encode() + b'"}'
    assert isinstance(refused(body), BodyTooLarge)


def test_load_a_long_text_is_refused_with_its_key() -> None:
    error = refused(b'{"content":"' + b"a" * (TEXT_LIMIT + 1) + b'"}')
    assert (type(error), error.param) == (BodyTooLarge, "content")


def test_load_base64_may_be_longer_than_a_text() -> None:
    data = "data:image/png;base64," + "A" * (TEXT_LIMIT + 1)
    value = load(json.dumps({"image_url": {"url": data}}).encode())
    assert value == {"image_url": {"url": data}}


def test_load_a_mistake_after_a_long_string_is_placed() -> None:
    body = b'["' + b"a" * 100_000 + b'", oops]'
    assert f"character {body.index(b'oops')}" in refused(body).message


@pytest.mark.parametrize("body", [b'["\\ud800"]', b"[NaN]", b"[1e999]", b"[" * 1100, b"\xff"])
def test_load_what_is_no_json_is_refused(body: bytes) -> None:
    assert refused(body).code == "invalid_json"


@pytest.mark.parametrize(
    "content", [b"a", b'\\"', b"\\\\", b"\\n", b"\\u0041"], ids=["a", "quote", "slash", "n", "u"]
)
def test_load_a_long_string_takes_steps_by_the_slice(content: bytes) -> None:
    body = b'{"url":"' + content * (16 * MIB // len(content)) + b'"}'
    _, steps = calls(lambda: load(body))
    assert steps < 40 * len(body) / KEY_LIMIT
