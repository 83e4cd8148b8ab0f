from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmserve.registry import yaml_positions

if TYPE_CHECKING:
    from pathlib import Path

KEYS = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=6)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.text(max_size=8).filter(lambda t: "$" not in t)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=15,
)
# Each example writes the file again.
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(folder: Path, text: str | bytes, **more: Any) -> yaml_positions.Document:
    file = folder / "models.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return yaml_positions.read(file, **more)


def line(document: yaml_positions.Document, path: yaml_positions.Path) -> int:
    return yaml_positions.line(document.lines, path)


def problems(document: yaml_positions.Document) -> list[str]:
    return [problem.within("models.yaml") for problem in document.problems]


def leaves(value: Any, path: yaml_positions.Path = ()) -> dict[yaml_positions.Path, Any]:
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {path: value}
    return {p: v for key, item in items for p, v in leaves(item, (*path, key)).items()}


@in_one_folder
@given(st.dictionaries(KEYS, VALUES, max_size=4), st.booleans())
def test_values_are_as_written(tmp_path: Path, value: Any, flow: Any) -> None:
    text = yaml.safe_dump(value, default_flow_style=flow, sort_keys=False)
    document = read(tmp_path, text)
    assert document.value == value
    assert document.problems == []


@in_one_folder
@given(st.lists(st.tuples(KEYS, st.integers(0, 3)), min_size=1, unique_by=lambda pair: pair[0]))
def test_every_key_knows_its_line(tmp_path: Path, keys: list[tuple[str, int]]) -> None:
    """Keys with so many empty lines before each, in a mapping inside a mapping."""
    lines = ["top:"]
    expected: dict[yaml_positions.Path, int] = {("top",): 1}
    for key, blank in keys:
        lines += [""] * blank + [f"  '{key}': [1]"]
        expected["top", key] = len(lines)
    document = read(tmp_path, "\n".join(lines))
    assert {path: line(document, path) for path in expected} == expected
    assert {line(document, (*path, 0)) for path in expected if len(path) == 2} == {
        line for path, line in expected.items() if len(path) == 2
    }


@in_one_folder
@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=4))
def test_every_leaf_has_a_line_of_the_file(tmp_path: Path, value: Any) -> None:
    text = yaml.safe_dump(value, default_flow_style=False, sort_keys=False)
    document = read(tmp_path, text)
    for path in leaves(value):
        assert 1 <= document.lines[path] <= len(text.splitlines())


@in_one_folder
@given(st.text(max_size=60) | st.binary(max_size=30))
def test_reading_never_raises(tmp_path: Path, text: str | bytes) -> None:
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogatepass")
    document = read(tmp_path, text)
    assert all(problem.message.isprintable() for problem in document.problems)


@pytest.mark.parametrize(
    "text",
    [
        b"PK\x03\x04\x14\x00binary",
        b"a: 1\x00\n",
        b"\xff\xfe\x00\x01",
        b"a: !!int abc\n",
        b"a: !!python/object:os.system x\n",
        b"a: &x [*x]\n",
        b"a: *unknown\n",
        b"a: 1\n---\nb: 2\n",
        b"{a: 1\n",
        b"\ta: 1\n",
        b"a: " + b"9" * 5000 + b"\n",
    ],
    ids=lambda text: repr(text[:14]),
)
def test_invalid_yaml_is_one_problem(tmp_path: Path, text: bytes) -> None:
    (problem,) = problems(read(tmp_path, text))
    assert problem.startswith("models.yaml")
    assert "\n" not in problem


def test_file_of_brackets_is_one_problem(tmp_path: Path) -> None:
    try:
        found = problems(read(tmp_path, "[" * 2000))
    except RecursionError:
        found = ["crashed"]
    assert [problem[:11] for problem in found] == ["models.yaml"]


def test_a_missing_file_and_a_folder_are_problems_without_a_line(tmp_path: Path) -> None:
    missing = problems(yaml_positions.read(tmp_path / "no.yaml"))
    assert missing == ["models.yaml: cannot be read: No such file or directory"]
    assert problems(yaml_positions.read(tmp_path)) == [
        "models.yaml: cannot be read: Is a directory"
    ]


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n", "---\n"])
def test_an_empty_file_has_no_value(tmp_path: Path, text: str) -> None:
    document = read(tmp_path, text)
    assert document.value is None
    assert document.problems == []


@pytest.mark.parametrize(
    "text",
    [
        "base: &base {a: 1, b: 2}\nown:\n  <<: *base\n  b: 3\n",
        "base: &base\n  a: 1\n  b: 2\nown: {b: 3, <<: *base}\n",
        "own: {<<: &base {a: 1, b: 2}, b: 3}\n",
    ],
)
def test_key_over_a_merged_one_is_no_duplicate(tmp_path: Path, text: str) -> None:
    document = read(tmp_path, text)
    assert document.problems == []
    assert document.value["own"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", ["4: a.b: duplicate key; first on line 2"]),
        ("a: {d: 4}\na: {d: 4, d: 5}\n", ["2: a: duplicate key; first on line 1"]),
        ("a: {d: 4, d: 5}\n", ["1: a.d: duplicate key; first on line 1"]),
        ("base: &base {a: 1}\nown:\n  <<: *base\n  b: 2\n  b: 3\n",
         ["5: own.b: duplicate key; first on line 4"]),
        ("a: 1\nb: [x, '${LLMSERVE_NO_SUCH} ${LLMSERVE_NOR_THIS}']\n",
         ["2: b.1: environment variable LLMSERVE_NO_SUCH is not set",
          "2: b.1: environment variable LLMSERVE_NOR_THIS is not set"]),
        ("a: {'${NAME}': 1}\n", ["1: a.${NAME}: references are not allowed in keys"]),
        ("a: 1\n? [b]\n: 2\n", ["2: not valid YAML: a key must be text"]),
        ("a: 1\nb: [1\nc: 2\n", ["3: not valid YAML: expected ',' or ']', but got ':'"]),
    ],
)  # fmt: skip
def test_problem_has_its_line_and_key(tmp_path: Path, text: str, found: list[str]) -> None:
    assert problems(read(tmp_path, text)) == [f"models.yaml:{problem}" for problem in found]


# --- ${NAME}


def test_environment_variables_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMSERVE_TEST_A", "x: ${LLMSERVE_TEST_B}")
    monkeypatch.setenv("LLMSERVE_TEST_B", "y")
    document = read(
        tmp_path,
        "a: ${LLMSERVE_TEST_B}\nb: ['pre-${LLMSERVE_TEST_B}-${LLMSERVE_TEST_B}']\nc: ${LLMSERVE_TEST_A}\n",
    )
    assert document.value == {"a": "y", "b": ["pre-y-y"], "c": "x: ${LLMSERVE_TEST_B}"}
    assert document.problems == []


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("$${NAME}", "${NAME}"),
        ("a$${", "a${"),
        ("$$NAME", "$NAME"),
        ("$$", "$"),
        ("a$", "a$"),
        ("$5", "$5"),
        ("50% of 100%", "50% of 100%"),
    ],
)
def test_dollar_outside_a_reference_stays(tmp_path: Path, written: str, meant: str) -> None:
    document = read(tmp_path, f"a: '{written}'\n")
    assert document.value == {"a": meant}
    assert document.problems == []


@pytest.mark.parametrize(
    "written",
    ["${KEY:-x}", "${KEY-x}", "$KEY", "a$KEY", "${}", "${1A}", "${KEY", "$(KEY)", "%KEY%"],
)
def test_text_that_resembles_a_reference_is_refused(tmp_path: Path, written: str) -> None:
    (problem,) = problems(read(tmp_path, f"a: 1\nb: ['{written}']\n"))
    assert problem.startswith("models.yaml:2: b.0: invalid reference; ")
    assert "KEY" not in problem  # it may be a secret


# --- values that are not text in YAML

PLAIN = ["1.10", "010", "0x1f", "0o17", "1:30", "1_000", "2025-10-01", "1e3", "yes", "off", "~",
         "null", "true", "=", "+1", ".inf", "12345678901234567890"]  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_key_is_the_text_as_written(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, f"models:\n  {name}: {{}}\n").value == {"models": {name: {}}}


@pytest.mark.parametrize(
    "text",
    ["010", "0x1f", "0o17", "1:30", "1_000", "2025-10-01", "yes", "No", "on", "off", "=", "1.2.3"],
)
def test_other_plain_words_are_text(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, f"a: {text}\n").value == {"a": text}


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("true", True), ("False", False), ("~", None), ("null", None), ("", None), ("0", 0),
        ("-7", -7), ("+7", 7), ("1.5", 1.5), (".5", 0.5), ("5.", 5.0), ("1e3", 1000.0),
        ("2.5e-1", 0.25), (".inf", float("inf")),
    ],
)  # fmt: skip
def test_true_false_null_and_numbers_have_yaml_s_value(
    tmp_path: Path, written: str, value: object
) -> None:
    document = read(tmp_path, f"a: {written}\n")
    assert document.value == {"a": value}
    assert type(document.value["a"]) is type(value)
    assert document.written["a",] == written


def test_verbatim_key_does_not_change(tmp_path: Path) -> None:
    document = read(
        tmp_path, "m: {chat_template: '{{ ${NO_SUCH} }}'}\n", verbatim=frozenset({"chat_template"})
    )
    assert document.value == {"m": {"chat_template": "{{ ${NO_SUCH} }}"}}
    assert document.problems == []


# --- problems


def test_problems_sort_by_line() -> None:
    found = [
        yaml_positions.Problem(10, "b", "x"),
        yaml_positions.Problem(9, "z", "x"),
        yaml_positions.Problem(9, "a", "x"),
    ]
    assert [problem.within("f") for problem in sorted(found)] == [
        "f:9: a: x",
        "f:9: z: x",
        "f:10: b: x",
    ]


def test_unknown_path_has_the_line_of_its_ancestor(tmp_path: Path) -> None:
    document = read(tmp_path, "a:\n  b: 1\n")
    assert line(document, ("a", "b", "c", 0)) == 2
    assert line(document, ("a", "z")) == 1
    assert line(document, ("z",)) == 1
    assert line(read(tmp_path, ""), ("z",)) == 0
