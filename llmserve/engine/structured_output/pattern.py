"""Which regular expressions xgrammar honours. Pure.

xgrammar 0.2.8 matches a whole text, ignores lookaheads and anchors in the middle, and writes the
text of a pattern into a JSON string without escaping it.
"""

from __future__ import annotations

import re

# An escape, the head of a group, a class, or a character.
_TOKEN = re.compile(
    r"\\(?:u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)|\(\?(?:<?[=!])?|\[\^?(?:\\.|[^\]\\])*\]?|.",
    re.DOTALL,
)
_START = re.compile(r"(?:\(\?i\))?(?:\((?:\?:)?)*")  # allowed before an anchor
_ESCAPES = re.compile(r"\\[AZzGkK0-9]")
_CLASSES = frozenset("dDwWsS")
_UNSUPPORTED = "which is not supported"


def check_regex(pattern: str) -> str:
    """Return why a regular expression cannot be honoured; empty if it can."""
    depth = 0
    first = _START.match(pattern)
    last = len(pattern.rstrip(")"))
    for found in _TOKEN.finditer(pattern):
        piece, begin, end = found[0], found.start(), found.end()
        if piece.startswith("(?") and piece[-1] in "=!":
            return f"has a lookaround, {_UNSUPPORTED}"
        is_first = (first and begin <= first.end()) or (pattern[begin - 1] == "|" and not depth)
        if piece == "^" and not is_first:
            return f"has `^` in the middle, {_UNSUPPORTED}"
        is_last = end >= last or (pattern[end] == "|" and not depth)
        if piece == "$" and not is_last:
            return f"has `$` in the middle, {_UNSUPPORTED}"
        if _ESCAPES.match(piece):
            return f"has `{piece}`, {_UNSUPPORTED}"
        depth += (piece[0] == "(") - (piece == ")")
    return ""


def check_pattern(pattern: str) -> str:
    """As `check_regex`, for a `pattern` of a string in JSON."""
    for found in _TOKEN.finditer(pattern):
        piece = found[0]
        is_class = piece[0] == "[" and len(piece) > 1
        if is_class and piece[1] == "^":
            continue  # xgrammar allows only characters without an escape here
        for each in _TOKEN.finditer(piece[1:-1]) if is_class else [found]:
            if reason := _unescaped(each[0]):
                return reason
    return check_regex(pattern)


def _unescaped(piece: str) -> str:
    """Return why a character of a pattern would break its JSON string; empty if not."""
    character = piece[0] if len(piece) == 1 or piece[0] != "\\" else piece[1]
    if len(piece) > 2 and character in "ux" and piece[0] == "\\":
        character = chr(int(piece[2:], base=16))  # noqa: FURB166  # not a Python literal
    elif piece[0] == "\\" and len(piece) == 2 and character.isalpha():
        return "" if character in _CLASSES else f"has `{piece}`, {_UNSUPPORTED} in JSON"
    if character in '"\\' or character < " ":
        return f"allows a quote, a backslash or a control character, {_UNSUPPORTED} in JSON"
    return ""
