from __future__ import annotations

import pytest

from llmserve.engine.structured_output.pattern import check_pattern, check_regex

HONOURED = [
    "",
    "a",
    "^a+$",
    "^a|b$",
    "^a$|^b$",
    "(^a|b)c",
    "^(a|b)$",
    "(^a$)",
    r"^\d{3}-\d{4}$",
    r"^[\w.+-]+@[\w-]+\.[\w.-]+$",
    '^[^"\\\\]*$',
    "^[^\n]*$",
    "^[ -~]*$",
    r"^\/a$",
    r"\$5",
    "[$^]",
    "^(?:a|b)$",
    "(?i)^a$",
    r"^\u00e9$",
]
LOOKAROUNDS = ["(?=a)", "^(?!a).*$", "(?<=a)b", "(?<!a)b", "a(?:b(?=c))"]
ANCHORS = ["a$b", "(a$|b)c", "(a|^b)", "a^", r"\Aa", r"a\Z", r"(a)\1"]
IN_JSON = ['^"$', r"^\\$", r"^\n$", "^\n$", '["]', r"[\\]", r"^\x22$", r"^\u0022$", r"^\t"]


@pytest.mark.parametrize("pattern", HONOURED)
def test_pattern_honoured(pattern: str) -> None:
    assert (check_regex(pattern), check_pattern(pattern)) == ("", "")


@pytest.mark.parametrize("pattern", [*LOOKAROUNDS, *ANCHORS])
def test_pattern_refused(pattern: str) -> None:
    assert check_regex(pattern)
    assert check_pattern(pattern)


@pytest.mark.parametrize("pattern", IN_JSON)
def test_pattern_refused_in_json_alone(pattern: str) -> None:
    assert not check_regex(pattern)
    assert check_pattern(pattern)


@pytest.mark.parametrize("piece", ["^", "$|", "(", ")", "[", "\\", "|^a$", "(?:^"])
def test_long_pattern_is_checked_in_linear_time(piece: str) -> None:
    check_pattern(piece * 20_000)  # with a square in it, minutes
