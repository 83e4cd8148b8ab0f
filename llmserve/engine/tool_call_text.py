"""Tool calls in growing text: JSON objects between tags. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass
class Call:
    """A call, possibly incomplete. Its arguments are the text of a JSON object."""

    begin: int  # of its tag, in the text
    name: str | None = None
    arguments: str | None = None
    is_complete: bool = False
    is_broken: bool = False  # invalid JSON, or not a call
    raw: str = ""  # its text with the tags, once it is complete or broken


class Calls:
    """Reads each character once. A tag inside a JSON string belongs to that string."""

    def __init__(self, start: str, end: str) -> None:
        self._start = start
        self._end = end
        self._text = ""
        self._position = 0
        self._open: _Members | None = None
        self.found: list[Call] = []
        self.content = ""  # the text before the first call

    def feed(self, delta: str) -> None:
        self._text += delta
        while self._read_outside() if self._open is None else self._read_inside(self._open):
            pass

    def finish(self) -> None:
        """End the text, in which the last call may lack its end tag."""
        if self._open is None:
            self.content += "" if self.found else self._text[self._position :]
        elif self._open.is_closed:
            self._close(len(self._text))

    def _read_outside(self) -> bool:
        begin = self._text.find(self._start, self._position)
        until = begin if begin >= 0 else len(self._text) - self._overlap(self._start)
        if not self.found:
            self.content += self._text[self._position : until]
        self._position = max(until, self._position)
        if begin < 0:
            return False
        self._position = begin + len(self._start)
        self.found.append(Call(begin))
        self._open = _Members()
        return True

    def _read_inside(self, members: _Members) -> bool:
        call = self.found[-1]
        if not members.is_broken:
            self._position = members.read(self._text, self._position)
        call.name = members.name
        call.arguments = members.arguments(self._text)
        if not (members.is_closed or members.is_broken):
            return False
        ends = []
        if (end := self._text.find(self._end, self._position)) >= 0:
            ends.append(end + len(self._end))
        if (begin := self._text.find(self._start, self._position)) >= 0:
            ends.append(begin)  # a call without an end tag
        if ends:
            self._close(min(ends))
        return bool(ends)

    def _close(self, end: int) -> None:
        call = self.found[-1]
        members, self._open = self._open, None
        call.raw = self._text[call.begin : end]
        call.is_complete = members is not None and not members.is_broken
        if call.arguments is None and members is not None and members.argument_span is None:
            call.arguments = "{}"
        call.is_broken = (
            not call.is_complete or not call.name or not isinstance(_loaded(call.arguments), dict)
        )
        self._position = end

    def _overlap(self, tag: str) -> int:
        """Return how many characters at the end of the text can begin a tag."""
        lengths = range(min(len(tag) - 1, len(self._text) - self._position), 0, -1)
        return next((each for each in lengths if self._text.endswith(tag[:each])), 0)


class _Members:
    """The members `name` and `arguments` of a JSON object, read character by character."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_closed = False
        self.is_broken = False
        self._depth = 0
        self._in_string = self._escaped = False
        self._string = (0, 0)
        self._key: str | None = None
        self._value = 0  # where the value of `_key` begins
        self.argument_span: tuple[int, int | None] | None = None

    def arguments(self, text: str) -> str | None:
        """Return the arguments so far; None before the brace, and for other values."""
        if self.argument_span is None:
            return None
        begin, end = self.argument_span
        value = text[begin:end].lstrip()
        if value.startswith("{"):
            return value if end is None else value.rstrip()
        if (
            value.startswith('"') and end is not None
        ):  # some models write the object as a JSON string
            inner = _loaded(value)
            return inner if isinstance(inner, str) and isinstance(_loaded(inner), dict) else None
        return None

    def read(self, text: str, position: int) -> int:
        """Read from `position`; return where reading stopped."""
        for at in range(position, len(text)):
            if self.is_closed:
                return at
            self._next(text, at)
            if self.is_broken:
                return at
        return len(text)

    def _next(self, text: str, at: int) -> None:
        character = text[at]
        if self._in_string:
            self._in_text(character, at)
        elif character == '"':
            self._in_string, self._string = True, (at, at)
        elif character in "{[":
            self._depth += 1
            self.is_broken = self._depth == 1 and character == "["
        elif character in "}]":
            if self._depth == 1:
                self._end_value(text, at)
            self._depth -= 1
            self.is_closed = self._depth == 0
            self.is_broken = self._depth < 0
        elif self._depth == 0:
            self.is_broken = not character.isspace()
        elif self._depth == 1 and character == ":":
            self._begin_value(text, at)
        elif self._depth == 1 and character == ",":
            self._end_value(text, at)

    def _in_text(self, character: str, at: int) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string, self._string = False, (self._string[0], at + 1)
        elif character == "\n":
            self.is_broken = True  # invalid in a JSON string

    def _begin_value(self, text: str, at: int) -> None:
        begin, end = self._string
        self._key, self._value = text[begin + 1 : end - 1], at + 1
        if self._key == "arguments":
            self.argument_span = (at + 1, None)

    def _end_value(self, text: str, at: int) -> None:
        if self._key == "arguments":
            self.argument_span = (self._value, at)
        elif self._key == "name":
            name = _loaded(text[self._value : at])
            self.name = name if isinstance(name, str) else None
        self._key = None


def _loaded(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None
