from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.engine.tool_call_text import Calls

START, END = "<call>", "</call>"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='a"\\<>/cal{}[]:, \n'),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "arguments", "a", END]), inner, max_size=3)
    ),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.sampled_from(["name", "arguments", "x", START]), JSON, max_size=3)


def read(*deltas: str) -> Calls:
    calls = Calls(START, END)
    for delta in deltas:
        calls.feed(delta)
    return calls


@given(
    arguments=st.lists(OBJECTS, min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 400), max_size=8),
    first=st.booleans(),
)
def test_calls_are_found_wherever_the_text_is_cut(
    arguments: list[object], cuts: list[int], first: bool
) -> None:
    members = ('"arguments": {}, "name": "go"', '"name": "go", "arguments": {}')[first]
    text = "before" + "\n".join(
        START + "{" + members.replace("{}", json.dumps(each)) + "}" + END for each in arguments
    )
    ends = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    calls = read(*(text[low:high] for low, high in pairwise(ends)))
    assert calls.text[: calls.found[0].begin] == "before"
    assert [json.loads(each.arguments or "") for each in calls.found] == arguments
    assert all(each.is_complete and not each.is_broken for each in calls.found)


@given(arguments=OBJECTS)
def test_arguments_grow_by_what_was_written(arguments: object) -> None:
    text = START + '{"name": "go", "arguments": ' + json.dumps(arguments) + "}" + END
    calls = Calls(START, END)
    seen = ""
    for character in text:
        calls.feed(character)
        now = (calls.found[0].arguments if calls.found else None) or ""
        assert now.startswith(seen)
        seen = now
    assert json.loads(seen) == arguments


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("[1]", "[1]" + END),
        ('{"arguments": {}}', ""),
        ('{"name": 1, "arguments": {}}', ""),
        ('{"name": "go", "arguments": []}', ""),
        ('{"name": "go", "arguments": {a: 1}}', ""),
        ("nothing", "nothing" + END),
        ("", END),
        ("{}}", ""),
    ],
)
def test_call_that_is_none_is_broken(text: str, rest: str) -> None:
    whole = START + text + END
    (call,) = read(whole + "after").found
    assert call.is_broken
    assert whole[call.end :] == rest


@pytest.mark.parametrize(
    ("text", "outside"),
    [("a<ca", "a"), ("a<cat>", "a<cat>"), ("a<call>", "a"), ("a<call>b<", "a<call>b")],
)
def test_text_that_may_become_a_tag_is_held_back(text: str, outside: str) -> None:
    calls = read(*text)
    assert text[: calls.outside_end] == outside
    calls.finish()
    assert calls.outside_end == len(text)


def test_call_without_end_tag_is_complete_at_the_end() -> None:
    calls = read(START + '{"name": "go", "arguments": {}}')
    assert not calls.found[0].is_complete
    calls.finish()
    assert calls.found[0].is_complete


def test_call_that_is_cut_off_is_not_complete() -> None:
    calls = read(START + '{"name": "go", "arguments": {"a": "</call>')
    calls.finish()
    (call,) = calls.found
    assert (call.is_complete, call.arguments) == (False, '{"a": "</call>')
