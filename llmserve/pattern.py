"""Which regular expressions xgrammar honours. Pure.

xgrammar 0.2.8 matches a whole text, ignores lookaheads and anchors in the middle, and
writes what a pattern allows into a JSON string without escaping it.
"""

from __future__ import annotations

import re

_TOKEN = re.compile(
    r"\\(?:u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)|\(\?(?:<?[=!])?|.", re.DOTALL
)  # an escape, the head of a group, or a character
_START = re.compile(r"(?:\(\?i\))?(?:\((?:\?:)?)*$")  # before an anchor at the start
_CLASSES = frozenset("dDwWsS")


def check_regex(pattern: str) -> str:
    """Why a regular expression cannot be honoured; empty if it can."""
    return _check(pattern, is_json=False)


def check_pattern(pattern: str) -> str:
    """The same for a `pattern` of a string in JSON."""
    return _check(pattern, is_json=True)


def _check(pattern: str, *, is_json: bool) -> str:
    depth = 0
    in_class = is_negated = False
    for found in _TOKEN.finditer(pattern):
        token = found[0]
        before, after = pattern[: found.start()], pattern[found.end() :]
        if is_json and not is_negated and (reason := _unescaped(token)):
            return reason
        if in_class:
            in_class = token != "]"
            is_negated = is_negated and in_class
        elif token == "[":
            in_class, is_negated = True, after.startswith("^")
        elif token.startswith("(?") and token[-1] in "=!":
            return "has a lookaround, which is not supported"
        elif token.startswith("("):
            depth += 1
        elif token == ")":
            depth -= 1
        elif token == "^" and not (_START.fullmatch(before) or (not depth and before[-1] == "|")):
            return "has `^` in the middle, which is not supported"
        elif token == "$" and after.strip(")") and not (not depth and after[0] == "|"):
            return "has `$` in the middle, which is not supported"
        elif len(token) > 1 and token[1] in "AZzGkK0123456789":
            return f"has `{token}`, which is not supported"
    return ""


def _unescaped(token: str) -> str:
    """Why a character of a pattern would break the JSON string that it is in."""
    if token[0] != "\\" or len(token) == 1:
        character = token[0]
    elif token[1] in "ux" and len(token) > 2:
        character = chr(int(token[2:], 16))
    elif token[1].isalpha():
        return "" if token[1] in _CLASSES else f"has `{token}`, which is not supported in JSON"
    else:
        character = token[1]
    if character in '"\\' or character < " ":
        return "allows a quote, a backslash or a control character, which is not supported in JSON"
    return ""
