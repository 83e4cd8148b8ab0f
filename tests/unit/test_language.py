"""The code is described in plain English: no banned word in its strings and comments."""

from __future__ import annotations

import pytest

from tests.language import PACKAGES, Prose, banned_words, findings, prose

SOURCE = '''"""Docstring
of two lines."""
x = f"a message {name!r} of two parts"  # a comment
# of one line; another
# of two
y = "identifier"
'''


def test_prose_of_a_module_is_its_messages_and_comments() -> None:
    assert [each for each in prose(SOURCE) if each.text] == [
        Prose(1, "Docstring of two lines."),
        Prose(3, "a message"),
        Prose(3, "of two parts"),
        Prose(3, "a comment"),
        Prose(4, "of one line; another of two"),
    ]


def test_banned_words_are_found_outside_backquotes() -> None:
    assert banned_words("Nobody is told what `says` is; it waits in line.") == [
        "Nobody",
        "told",
        "waits in line",
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_package_uses_no_banned_words(package: str) -> None:
    assert list(map(str, findings(package))) == []
